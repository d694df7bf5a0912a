"""Chains that are long, that return to an earlier state, or whose files make false claims."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import peraxis_format as pxd
from peraxis_format import CHANGED_KEY
from peraxis_tools.apply import apply
from peraxis_tools.chain import compact, log, update
from peraxis_tools.checkpoints.checkpoint import open_checkpoint
from peraxis_tools.cli import cli
from tests.factories import write_checkpoint

KIND = pxd.DType.BF16
STATES = [np.arange(64, dtype=np.uint16) + np.uint16(0x3F00 + 7 * i) for i in range(5)]


def write_chain(folder: Path, states: list[np.ndarray], metadata: dict[str, str] | None = None) -> list[Path]:
    """Write folder/base, folder/last, and the updates from each state to the next."""
    write_checkpoint(folder / "base", {"w": (states[0], KIND)})
    write_checkpoint(folder / "last", {"w": (states[-1], KIND)})
    (folder / "updates").mkdir()
    paths, previous = [], None
    for i, (old, new) in enumerate(itertools.pairwise(states), 1):
        paths.append(folder / "updates" / f"step-{i:08d}.pxd")
        ref = pxd.BaseRef(dtype=KIND, shape=(64,), sha256=hashlib.sha256(old.tobytes()).hexdigest())
        with pxd.DeltaWriter(
            paths[-1], base=pxd.Identity(id="a"), fine_tuned=pxd.Identity(id="b"), previous=previous, chained=True,
            metadata=metadata,
        ) as writer:  # fmt: skip
            writer.add(pxd.lossless_module("w", new, KIND, old=old, base=ref))
            previous = writer.finish().content_id
    return paths


def weights(folder: Path) -> bytes:
    with open_checkpoint(folder) as checkpoint:
        return checkpoint.tensors.read("w").tobytes()


@pytest.fixture
def little_room() -> Iterator[None]:
    """Limit open files and frames, so that a short chain exceeds them as a chain of thousands would."""
    depth, (soft, hard) = sys.getrecursionlimit(), resource.getrlimit(resource.RLIMIT_NOFILE)
    others = [os.open(os.devnull, os.O_RDONLY) for _ in range(200)]  # the limit is on the numbers of files
    held = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").is_dir() else 64
    sys.setrecursionlimit(len(inspect.stack()) + 150)
    resource.setrlimit(resource.RLIMIT_NOFILE, (held + 100, hard))
    yield
    sys.setrecursionlimit(depth)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for descriptor in others:
        os.close(descriptor)


def test_a_chain_may_be_longer_than_a_process_has_files_and_frames(tmp_path: Path, little_room: None) -> None:
    states = [STATES[0] + np.uint16(i) for i in range(201)]
    paths = write_chain(tmp_path, states)
    apply(tmp_path / "base", paths[::-1], tmp_path / "out")
    assert weights(tmp_path / "out") == states[-1].tobytes()
    compact(tmp_path / "base", paths, tmp_path / "c.pxd")
    update(tmp_path / "base", tmp_path / "last", tmp_path / "next.pxd", after=paths)
    assert len(log(tmp_path / "updates").updates) == 200


@pytest.mark.parametrize(
    "way", [(0, 1, 0, 1), (0, 1, 2, 0, 1, 2, 3), (0, 0, 1, 1), (0, 1, 0, 1, 0), (0, 1, 2, 1, 2, 1)]
)
def test_a_chain_that_returns_to_an_earlier_state_is_listed_whole(tmp_path: Path, way: tuple[int, ...]) -> None:
    paths = write_chain(tmp_path, [STATES[i] for i in way])
    found = log(tmp_path / "updates")
    assert [entry.name for entry in found.updates] == [path.name for path in paths]
    assert found.folded == ()
    apply(tmp_path / "base", paths, tmp_path / "out")
    assert weights(tmp_path / "out") == STATES[way[-1]].tobytes()


@pytest.mark.parametrize("text", ["9" * 5000, "9" * 17, "65", "٣", "-1", "1.5", "", " 1", "\x1b[31m"])
def test_a_number_of_changes_that_cannot_be_is_not_shown(tmp_path: Path, text: str) -> None:
    """A foreign file with 64 weights has any text in the place of the tools' note of changes."""
    write_chain(tmp_path, STATES[:2], {CHANGED_KEY: text})
    result = CliRunner().invoke(cli, ["log", str(tmp_path / "updates"), "--json"])
    assert result.exit_code == 0, result.output
    assert [entry["changed"] for entry in json.loads(result.stdout)["updates"]] == [None]
    plain = CliRunner().invoke(cli, ["log", str(tmp_path / "updates")])
    assert plain.exit_code == 0
    assert "\x1b[31m" not in plain.output


def test_a_note_that_all_weights_changed_is_shown(tmp_path: Path) -> None:
    write_chain(tmp_path, STATES[:2], {CHANGED_KEY: "64"})
    assert [entry.changed for entry in log(tmp_path / "updates").updates] == [64]
