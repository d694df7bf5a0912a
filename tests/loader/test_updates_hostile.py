"""A folder and a model that others change: nothing is silent, and each side goes on when it can."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import peraxis_format as pxd
from peraxis_format.errors import LiveModelError
from peraxis_format.torch.updates import ShardedUpdateWriter, UpdateWriter, apply_update, follow, mirror
from tests.loader.updates_pair import published, server, train, trainer


def test_two_followers_of_one_model_both_reach_the_end_of_the_chain(tmp_path: Path) -> None:
    model, live = trainer(), server()
    writer = UpdateWriter(model, tmp_path)
    writer.step()
    one, other = follow(live, tmp_path), follow(live, tmp_path)
    assert (one.poll().step, other.poll().step) == (0, 0)
    for step in range(1, 4):
        train(model, step)
        writer.step()
        assert len(one.poll().applied) == 1
    found = other.poll()
    assert (found.step, found.applied, dict(found.waiting)) == (3, (), {})
    train(model, 4)
    path = writer.step().path
    apply_update(live, path)  # by hand
    assert (one.poll().step, other.poll().step) == (4, 4)
    assert published(live) == published(model)


def test_two_threads_that_follow_one_model_both_reach_the_end(tmp_path: Path) -> None:
    model, live = trainer(), server()
    writer, lock = UpdateWriter(model, tmp_path), threading.Lock()
    writer.step()
    followers = [follow(live, tmp_path, lock=lock).start(every=0.002 * turn) for turn in (2, 3)]
    for step in range(1, 8):
        train(model, step)
        writer.step()
    assert [follower.wait(7, seconds=300.0) for follower in followers] == [True, True]
    for follower in followers:
        follower.close()
    assert published(live) == published(model)


def test_a_bit_that_flips_in_the_model_is_reported_at_each_poll(tmp_path: Path) -> None:
    model, live = trainer(), server()
    writer, follower = UpdateWriter(model, tmp_path), follow(live, tmp_path)
    writer.step()
    follower.poll()
    train(model, 1)
    path = writer.step().path
    live.up.weight.data[0, 0] += 1.0
    for _ in range(2):
        found = follower.poll()
        assert (found.step, found.applied, list(found.waiting)) == (0, (), [path])
    live.up.weight.data[0, 0] -= 1.0
    assert follower.poll().step == 1


def test_a_folder_that_cannot_be_read_is_named_on_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = UpdateWriter(trainer(), tmp_path)
    writer.step()
    scandir = os.scandir

    def refused(path: Any) -> Any:
        if Path(path) == tmp_path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    follower = follow(server(), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refused)
        assert "cannot be read (Permission denied)" in follower.poll().waiting[tmp_path]
        with pytest.raises(LiveModelError, match=r"cannot be read \(Permission denied\)$"):
            UpdateWriter(trainer(), tmp_path)
    assert follower.poll().step == 0


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder in which no one can make files")
def test_a_folder_that_cannot_be_written_is_named_with_the_file(tmp_path: Path) -> None:
    writer = UpdateWriter(trainer(), tmp_path)
    writer.folder = Path("/proc/self")
    with pytest.raises(OSError, match="anchor-00000000") as found:
        writer.step()
    assert found.value.filename == "/proc/self/anchor-00000000.pxd"


@pytest.mark.parametrize("failed", [0, 1])
def test_a_store_that_takes_a_file_and_does_not_answer_is_read_again(
    failed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fsspec")
    url = f"memory://unanswered-{failed}"
    model, live, send = trainer(), server(), mirror.Mirror.send
    writer = UpdateWriter(model, url)

    def unanswered(self: mirror.Mirror, path: Path) -> None:
        send(self, path)
        raise TimeoutError("the store does not answer")

    for step in range(3):
        if step == failed:
            with monkeypatch.context() as patch:
                patch.setattr(mirror.Mirror, "send", unanswered)
                with pytest.raises(TimeoutError):
                    writer.step()
            train(model, 10)
            assert writer.step().step == step + 1
        elif step != failed + 1:
            assert writer.step().step == step
        train(model, step)
    assert writer.step().step == 3
    with follow(live, url) as follower:
        assert follower.poll().step == 3
    assert published(live) == published(model)
    writer.close()


def rewritten(path: Path, to: Path, *more: pxd.ModuleDelta) -> None:
    """Write a file again under another name, with further modules."""
    with pxd.open(path) as file:
        manifest = file.manifest
        modules = [file.load(entry.name) for entry in manifest.modules]
    path.unlink()
    name = manifest.fine_tuned
    with pxd.DeltaWriter(to, base=name, fine_tuned=name, previous=manifest.previous, chained=True) as writer:
        for module in (*modules, *more):
            writer.add(module)
        writer.finish()


def test_a_trainer_refuses_a_folder_whose_files_are_no_chain_of_its_model(tmp_path: Path) -> None:
    model = trainer()
    writer = UpdateWriter(model, tmp_path / "a")
    writer.step()
    train(model, 1)
    step = Path(writer.step().path)
    more = pxd.ModuleDelta(
        name="new", shape=(4,), dtype=pxd.DType.F32, encoding=pxd.Encoding.FULL, full=np.zeros(4, np.float32)
    )
    rewritten(step, step, more)
    with pytest.raises(LiveModelError, match=r"new: is in .*step-00000001.pxd, but not before it"):
        UpdateWriter(model, tmp_path / "a")
    (tmp_path / "b").mkdir()
    rewritten(step, tmp_path / "b" / "anchor-00000000.pxd")
    with pytest.raises(LiveModelError, match=r"anchor-00000000.pxd: .* has a base, so this is no anchor"):
        UpdateWriter(model, tmp_path / "b")


def test_a_trainer_that_cannot_recover_does_not_begin_a_second_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trainer()
    writer = UpdateWriter(model, tmp_path)
    writer.step()
    train(model, 1)
    with monkeypatch.context() as broken:
        broken.setattr(UpdateWriter, "_step", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            writer.step()
    (anchor,) = tmp_path.iterdir()
    data = bytearray(anchor.read_bytes())
    data[-1] ^= 1
    anchor.write_bytes(data)
    with pytest.raises(pxd.PxdError):
        writer.step()
    anchor.unlink()
    for _ in range(2):
        with pytest.raises(LiveModelError, match="has no chain any more"):
            writer.step()
    assert list(tmp_path.iterdir()) == []


def test_one_process_without_a_group_publishes_with_a_sharded_writer(tmp_path: Path) -> None:
    model, live = trainer(), server()
    writer = ShardedUpdateWriter(model, tmp_path)
    writer.step()
    train(model, 1)
    writer.step()
    follow(live, tmp_path).poll()
    assert published(live) == published(model)
