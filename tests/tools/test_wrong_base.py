"""Every verb names the base that a delta was made for, and for an update the file that it follows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import peraxis
import peraxis_format as pxd
from peraxis_tools.chain import update
from peraxis_tools.compress import compress
from tests.factories import random_storage
from tests.tools.compress_pairs import llama_pair
from tests.tools.output_cases import write_checkpoint

VERBS: dict[str, Callable[[Path, Path, Path], Any]] = {
    "apply": lambda base, delta, out: peraxis.apply(base, delta, out),
    "verify": lambda base, delta, out: peraxis.verify(delta, base=base),
    "diff": lambda base, delta, out: peraxis.diff(delta, base, base=base),
    "convert": lambda base, delta, out: peraxis.convert(delta, out, to="lora", base=base),
    "load": lambda base, delta, out: peraxis.load(delta, base=base),
    "evaluate": lambda base, delta, out: peraxis.evaluate(base, base, delta, texts={"t": base.parent / "text.jsonl"}),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_wrong_base_is_answered_with_the_name_of_the_right_one(tmp_path: Path, verb: str) -> None:
    base, tuned, text = llama_pair(tmp_path)
    if text.name != "text.jsonl":
        text.rename(tmp_path / "text.jsonl")
    made = compress(base, tuned, tmp_path / "d.pxd", fit="none", force=True, base_id="org/the-base@abc")
    with pytest.raises(pxd.BindingError) as caught:
        VERBS[verb](tuned, made.path, tmp_path / "out")
    assert str(caught.value).endswith("made for org/the-base at revision abc: pass that checkpoint as the base")


@pytest.fixture
def chain(tmp_path: Path) -> tuple[list[Path], list[Path]]:
    """Three states, and the updates between them."""
    g = np.random.default_rng(0)
    states = [
        write_checkpoint(tmp_path / f"state-{i}", {"a.weight": (random_storage(g, (8, 16)), pxd.DType.BF16)})
        for i in range(3)
    ]
    (tmp_path / "chain").mkdir()
    files = [tmp_path / "chain" / "1.pxd", tmp_path / "chain" / "2.pxd"]
    update(states[0], states[1], files[0])
    update(states[0], states[2], files[1], after=files[:1])
    return states, files


@pytest.mark.parametrize("verb", ["apply", "verify", "compact"])
def test_an_update_alone_names_the_file_before_it_and_one_remedy(
    chain: tuple[list[Path], list[Path]], tmp_path: Path, verb: str
) -> None:
    (first, _, _), files = chain
    calls: dict[str, Callable[[], Any]] = {
        "apply": lambda: peraxis.apply(first, files[1], tmp_path / "out"),
        "verify": lambda: peraxis.verify(files[1], base=first),
        "compact": lambda: peraxis.compact(first, files[1:], tmp_path / "c.pxd"),
    }
    with pytest.raises(pxd.BindingError) as caught:
        calls[verb]()
    said = str(caught.value)
    assert "it follows update sha256:" in said
    assert f"({files[0]}): pass that update too" in said
    assert "pass the base" not in said


@pytest.mark.parametrize("verb", ["diff", "convert", "evaluate"])
def test_a_verb_of_one_delta_asks_for_the_checkpoint_before_an_update_alone(tmp_path: Path, verb: str) -> None:
    base, tuned, _ = llama_pair(tmp_path)
    first = update(base, tuned, tmp_path / "1.pxd")
    update(base, base, tmp_path / "2.pxd", after=[tmp_path / "1.pxd"])
    with pytest.raises(pxd.BindingError) as caught:
        VERBS[verb](base, tmp_path / "2.pxd", tmp_path / "out")
    said = str(caught.value)
    assert f"it follows update {first.content_id}" in said
    assert said.endswith(": pass the checkpoint after that update as the base")
