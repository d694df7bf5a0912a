"""Four loaders that share no code agree on mutated files (the long run is tests/conformance/differential.py)."""

from __future__ import annotations

import time
from pathlib import Path

from peraxis_conformance.process import Reply

from tests.conformance.differential import base_disagreements, disagreements, loaders, mutated


def test_loaders_agree_on_mutated_files(tmp_path: Path) -> None:
    counter = [0]
    with loaders(tmp_path) as asked:
        inputs = mutated(11, 150, time.monotonic() + 6, counter, least=10)
        found = list(disagreements(asked, inputs, tmp_path / "input.pxd"))
    assert [said for _, said in found] == []
    assert counter[0] >= 10


def test_loaders_agree_on_mutated_bases(tmp_path: Path) -> None:
    counter = [0]
    with loaders(tmp_path) as asked:
        found = list(base_disagreements(asked, 5, 150, time.monotonic() + 6, counter, tmp_path, least=10))
    assert [said for _, said in found] == []
    assert counter[0] >= 10


def test_a_disagreement_on_a_base_is_found(tmp_path: Path) -> None:
    asked = {
        "strict": lambda _: Reply(exit=1, result={"phase": None}),
        "lenient": lambda _: Reply(exit=1, result={"phase": "binding"}),
    }
    ((_, said),) = base_disagreements(asked, 1, 1, time.monotonic() + 60, [0], tmp_path)
    assert said == {"strict": "rejected: None", "lenient": "rejected: binding"}


def test_a_disagreement_is_found(tmp_path: Path) -> None:
    asked = {
        "strict": lambda arguments: Reply(exit=1, result={"phase": "container"}),
        "lenient": lambda arguments: Reply(
            exit=int(Path(arguments[1]).stat().st_size % 2), result={"phase": "container"}
        ),
    }
    [(data, said)] = disagreements(asked, iter([b"1", b"22"]), tmp_path / "input.pxd")
    assert data == b"22"
    assert said["strict"] == "rejected: container"
