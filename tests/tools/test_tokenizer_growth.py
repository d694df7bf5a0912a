"""A tokenizer that makes texts much longer is refused before it is loaded, and ordinary ones are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peraxis_tools.checkpoints.environment import load_tokenizer
from peraxis_tools.checkpoints.tokenizer_growth import growth_of
from peraxis_tools.errors import ToolError
from tests.tools.compress_pairs import write_tokenizer


def replace(content: str, **pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(parts)}


LLAMA = sequence({"type": "Prepend", "prepend": "\u2581"}, replace("\u2581", String=" "))
XLNET = sequence(
    replace('"', String="``"),
    {"type": "NFKD"},
    {"type": "StripAccents"},
    replace(" ", Regex=" {2,}"),
    {"type": "Lowercase"},
)
DECODER = {
    "type": "Sequence",
    "decoders": [replace(" ", String="\u2581"), {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip"}],
}
NESTED: dict[str, Any] = replace("aa", String="a")
for _ in range(13):
    NESTED = sequence(NESTED, NESTED)
HOSTILE = {
    "repeated": sequence(*[replace("a" * 10, String="a")] * 12),
    "between characters": sequence(*[replace("a", Regex="(?=a)")] * 40),
    "no pattern": sequence(*[replace("a", String="")] * 40),
    "one long": replace("a" * 5000, String="a"),
    "nested": NESTED,
    "prepended": {"type": "Prepend", "prepend": "a" * 5000},
    "decoder": {"type": "Sequence", "decoders": [replace("aa", String="a")] * 40},
}


def write(folder: Path, part: str, value: Any) -> Path:
    write_tokenizer(folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {part: value}))
    return folder


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_tokenizer_that_multiplies_a_text_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    part = "decoder" if kind == "decoder" else "normalizer"
    folder = write(tmp_path, part, HOSTILE[kind])
    with pytest.raises(ToolError, match=rf"tokenizer.json: its {part} can make a text more than 4096 times longer"):
        load_tokenizer(folder)


@pytest.mark.parametrize("part", [None, "x", [], LLAMA, XLNET, DECODER, sequence(*[XLNET] * 2)])
def test_ordinary_normalisers_are_far_below_the_bound(part: Any) -> None:
    assert growth_of(part) <= 64


def test_the_bound_holds_for_what_the_library_does(tmp_path: Path) -> None:
    for value in (LLAMA, XLNET, sequence(*[replace("aaa", String="a")] * 3), replace("bb", Regex="(?=a)")):
        tokenizer = load_tokenizer(write(tmp_path, "normalizer", value))
        for text in ("a", "a a", "``a\u00e9", "aaaa"):
            longer = tokenizer.backend_tokenizer.normalizer.normalize_str(text)
            assert len(longer) <= growth_of(value) * len(text), (value, text)
