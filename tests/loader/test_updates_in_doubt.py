"""A file that is there although its write failed is recognised by its writer; one of another process is not."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peraxis_format import files
from peraxis_format.torch.updates import UpdateWriter, follow
from tests.loader.test_updates_writes import move, same, weights


def fail_syncs(monkeypatch: pytest.MonkeyPatch, *, after: int = 0) -> None:
    """Let one flush of a folder fail, after `after` others; the name is there by then."""
    sync, left = files.sync_folder, [after]

    def broken(folder: Path) -> None:
        left[0] -= 1
        if left[0] == -1:
            raise OSError(errno.EIO, "the disk is gone", str(folder))
        sync(folder)

    monkeypatch.setattr(files, "sync_folder", broken)


def fail_step(
    writer: UpdateWriter, model: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, *, after: int = 0
) -> None:
    """Change the model, and let a step fail as `fail_syncs` says."""
    move(model)
    with monkeypatch.context() as patch:
        fail_syncs(patch, after=after)
        with pytest.raises(OSError, match="the disk is gone"):
            writer.step()


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("anchor_every", [None, 1])
def test_a_file_that_got_its_name_before_the_disk_failed_is_the_writers_own(
    steps: int, anchor_every: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = weights()
    writer = UpdateWriter(model, tmp_path, anchor_every=anchor_every)
    for _ in range(steps):
        writer.step()
        move(model)
    with monkeypatch.context() as patch:
        fail_syncs(patch)
        with pytest.raises(OSError, match="the disk is gone"):
            writer.step()
    move(model)
    assert writer.step().step == steps + 1
    server = {name: torch.zeros_like(tensor) for name, tensor in model.items()}
    assert follow(server, tmp_path).poll().step == steps + 1
    assert same(server, model)


def test_an_anchor_that_got_its_name_before_the_disk_failed_is_left_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = weights()
    writer = UpdateWriter(model, tmp_path, anchor_every=1)
    writer.step()
    fail_step(writer, model, monkeypatch, after=1)
    assert writer.step_number == 1
    move(model)
    assert writer.step().step == 2
    assert len(list(tmp_path.glob("*.pxd"))) == 5


def test_a_local_file_that_failed_before_it_was_sent_does_not_remain(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fsspec")
    model, url = weights(), "memory://in-doubt/run"
    writer = UpdateWriter(model, url)
    writer.step()
    fail_step(writer, model, monkeypatch)
    assert writer.step().step == 1
    server = {name: torch.zeros_like(tensor) for name, tensor in model.items()}
    with follow(server, url) as follower:
        assert follower.poll().step == 1
    assert same(server, model)


def test_a_trainer_whose_last_update_was_pruned_goes_on_from_its_anchor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = weights()
    writer = UpdateWriter(model, tmp_path, anchor_every=1)
    for _ in range(3):
        writer.step()
        move(model)
    writer.prune(anchors=1)
    with monkeypatch.context() as patch:
        patch.setattr(files, "_give_name", broken_off)
        with pytest.raises(KeyboardInterrupt):
            writer.step()
    assert writer.step().step == 3


def broken_off(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("the disk is full")])
def test_a_file_that_another_process_wrote_meanwhile_is_not_continued(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = weights()
    writer = UpdateWriter(model, tmp_path)
    first = writer.step()
    arrays = {name: array for name, (_, array) in writer._snapshot.items()}
    other = UpdateWriter(weights(), tmp_path)
    move(model)

    def broken(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(files, "_give_name", broken)
        with pytest.raises(type(error)):
            writer.step()
    other.step()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for _ in range(2):
        with pytest.raises(FileExistsError, match="another process publishes there"):
            writer.step()
        assert (writer.step_number, writer.result, writer._snapshot.keys()) == (0, first.result, arrays.keys())
        assert all(writer._snapshot[name][1] is array for name, array in arrays.items())
        assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
