"""A configuration of a stranger is read within bounds, and refused in one line that names it."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from peraxis_tools.card import missing_fields
from peraxis_tools.compress import CompressOptions
from peraxis_tools.errors import OptionError
from peraxis_tools.texts.documents import read_documents
from peraxis_tools.yaml_file import read_mapping

BOMB = "\n".join(
    ["a0: &a0 [lol, lol]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)), "masks: *a29"]
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, r"has a reference \(\*name\)"),
        ("a: &a [*a]", "has a reference"),
        ("masks: 0x" + "f" * 20000, "not a YAML file"),
        ("masks: " + "9" * 20000, "not a YAML file"),
        ("masks: [0x" + "f" * 20000 + "]", "not a YAML file"),
        ("[" * 20000, "has values at more than 64 levels"),
        ("a: " + "{a: " * 2000, "has values at more than 64 levels"),
        ("a: " + "x" * 70000, "is larger than 65536 bytes"),
        ("masks: !!python/object/apply:os.system [ls]", "not a YAML file"),
        ("- masks", "must have lines"),
        ("masks: 2\nseed: 1\nmasks: 3", "masks stands in lines 1 and 3; keep one"),
        ("seed: 2026-99-99", "not a YAML file"),
        ("\x00", "not a YAML file"),
    ],
)
def test_a_hostile_configuration_is_refused_in_one_line_and_little_memory(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    tracemalloc.start()
    with pytest.raises(OptionError, match=said) as caught:
        CompressOptions.from_yaml(path)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("option", ["masks", "fit", "seed", "held_out", "resume"])
def test_an_option_without_a_value_is_refused(option: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"{option}: ~\n")
    with pytest.raises(OptionError, match=f"{option} None: must be"):
        CompressOptions.from_yaml(tmp_path / "run.yaml")


def test_an_ordinary_configuration_is_read_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("recipe: fit\ncalibration: [a.jsonl, 'b.jsonl:0.5']\nseed: 0x10\n")
    assert read_mapping(path) == {"recipe": "fit", "calibration": ["a.jsonl", "b.jsonl:0.5"], "seed": 16}
    path.write_text("")
    assert read_mapping(path) == {}


@pytest.mark.parametrize(
    ("front", "said"), [(BOMB, r"has a reference"), ("a: " + "x" * 1_100_000, "is larger than 1048576 bytes")]
)
@pytest.mark.parametrize("line", ["\n", "\r\n"])
def test_the_front_matter_of_a_card_is_bounded_too(front: str, said: str, line: str) -> None:
    pytest.importorskip("huggingface_hub")
    with pytest.raises(OptionError, match=rf"README\.md: its front matter: {said}"):
        missing_fields(f"---\n{front}\n---\n# model\n".replace("\n", line))
    assert "license" not in missing_fields(f"---{line}license: mit{line}---{line}# *model* and `*a`{line}")


def test_rows_of_unlike_columns_are_refused_and_do_not_multiply(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"c{i}": {i}}}\n' for i in range(20_000)))
    with pytest.raises(OptionError, match="its rows have more than 1000 columns"):
        read_documents(str(path), text_column=None, limit=10)
