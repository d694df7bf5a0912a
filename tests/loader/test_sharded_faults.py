"""An error on one rank alone is raised by all ranks; nothing has changed then, and the next call succeeds."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from peraxis_format.torch import LiveModelError
from peraxis_format.torch.place.ranks import Ranks, agree
from peraxis_format.torch.updates import ShardedUpdateWriter, follow, follower, owned, publish_sharded
from peraxis_format.writer import DeltaWriter
from tests.loader.support import bytes_of
from tests.loader.test_sharded_updates import Pieces, publish_alone, run, start, state


def broken_disk() -> OSError:
    return OSError(errno.EIO, "this rank cannot read it")


def full_disk() -> OSError:
    return OSError(errno.ENOSPC, "this rank has no space")


@contextmanager
def failing(owner: Any, name: str, error: BaseException, *, here: bool) -> Iterator[None]:
    """Let the first call of a function on this rank raise an error."""
    original, left = getattr(owner, name), [here]

    def call(*args: Any, **options: Any) -> Any:
        if left.pop() if left else False:
            raise error
        return original(*args, **options)

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, original)


class UnpicklableError(Exception):
    """An error that another process cannot make from its arguments."""

    def __init__(self, message: str, *, required: int) -> None:
        super().__init__(message)


class Unwritable(dict[str, Any]):
    """A mapping that has no room for changes."""

    def __setitem__(self, key: str, value: Any) -> None:
        raise MemoryError("this rank")


def publishing(rank: int, world: int, folder: str) -> None:
    """Test the trainer: a rank fails in each part of a step, of resuming, and of an anchor."""
    path, mesh = start(rank, world, folder)
    chain, last = path / "chain", rank == world - 1
    model = Pieces(state(0, torch.float32), mesh)

    with failing(Path, "mkdir", full_disk(), here=last), pytest.raises(OSError, match="this rank has no space"):
        ShardedUpdateWriter(model, chain)
    writer = ShardedUpdateWriter(model, chain, anchor_every=2)
    for step in range(4):
        model.become(state(step, torch.float32), mesh)
        for owner, name, error, here in (
            (publish_sharded, "live_tensors", LiveModelError("this rank lost a tensor"), last),
            (publish_sharded, "published_array", MemoryError("this rank"), last),
            (publish_sharded, "lossless_module" if step else "digest_of", MemoryError("this rank"), last),
            (publish_sharded, "published_array", UnpicklableError("this rank", required=1), last),
            (DeltaWriter, "add", full_disk(), rank == 0),
            (DeltaWriter, "finish", full_disk(), rank == 0),
        ):
            before = sorted(chain.iterdir()), writer.step_number, writer.result
            distributed.barrier()
            with failing(owner, name, error, here=here), pytest.raises(Exception, match="this rank"):
                writer.step()
            assert before == (sorted(chain.iterdir()), writer.step_number, writer.result)
            distributed.barrier()
        assert writer.step().step == step
    if last:
        writer._snapshot = Unwritable(writer._snapshot)
    model.become(state(4, torch.float32), mesh)
    with pytest.raises(MemoryError, match="this rank"):  # after the file is published
        writer.step()
    assert (writer.step_number, (chain / "step-00000004.pxd").exists()) == (3, True)
    assert writer.step().step == 5

    for owner, name in ((owned, "DeltaFile"), (owned, "reconstruct"), (publish_sharded, "live_tensors")):
        for here in (rank == 0, last):
            with failing(owner, name, broken_disk(), here=here), pytest.raises(OSError, match="cannot read"):
                ShardedUpdateWriter(model, chain)
    again = ShardedUpdateWriter(model, chain)
    assert (again.step_number, again.result) == (5, writer.result)
    assert again.step().step == 6
    other = Pieces({name: tensor[:-1] if name == "norm" else tensor for name, tensor in state(4).items()}, mesh)
    with pytest.raises(LiveModelError, match="norm: rank 1 has another shape"):
        ShardedUpdateWriter(other if rank == 1 else model, path / "odd").step()
    distributed.destroy_process_group()


def following(rank: int, world: int, folder: str) -> None:
    """Test the server: a rank cannot read a file, list it, or lock; then all wait, and apply it at the next poll."""
    path, mesh = start(rank, world, folder)
    last = rank == world - 1
    model = Pieces({name: torch.zeros_like(tensor) for name, tensor in state(0).items()}, mesh)
    lock = Lock()
    server = follow(model, path / "chain", lock=lock)
    for step in range(5):
        if rank == 0:
            name = f"step-{step:08d}.pxd" if step else "anchor-00000000.pxd"
            (path / "later" / name).rename(path / "chain" / name)
        distributed.barrier()
        before = model.whole()
        for owner, name, error, here in (
            (follower, "DeltaFile", broken_disk(), last),
            (follower, "DeltaFile", broken_disk(), rank == 0),
            (Lock, "__enter__", LiveModelError("this rank cannot lock"), last),
        ):
            if step == 0 and name == "DeltaFile":
                continue  # the anchor is opened twice: see below
            with failing(owner, name, error, here=here):
                found = server.poll()
            assert (found.applied, model.whole()) == ((), before)
            assert ["this rank cannot" in reason for reason in found.waiting.values()] == [True]
        with (
            failing(follower, "list_updates", broken_disk(), here=rank == 0),
            pytest.raises(OSError, match="this rank"),
        ):
            server.poll()
        assert server.poll().step == step
        assert model.whole() == bytes_of(state(step))
    late = follow(model, path / "chain")
    with failing(follower, "DeltaFile", broken_disk(), here=last):  # while the state is looked for
        assert late.poll().step == 4
    assert model.whole() == bytes_of(state(4))
    distributed.destroy_process_group()


class Lock:
    """A lock that is never busy."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def closing(rank: int, world: int, folder: str) -> None:
    """Test the followers' threads: they end together when one rank closes, however many polls there were."""
    path, mesh = start(rank, world, folder)
    model = Pieces(state(0), mesh)
    group = distributed.new_group()
    server = follow(model, path / "later", group=group).start(every=0.01 * (rank + 1))
    assert server.wait(4)
    if rank:
        time.sleep(0.3)
    server.close()
    assert model.whole() == bytes_of(state(4))
    distributed.destroy_process_group()


def agreeing(rank: int, world: int, folder: str) -> None:
    """Test `agree`: all ranks raise one error, whichever ranks have one; an interrupt before others."""
    start(rank, world, folder)
    errors: list[dict[int, BaseException]] = [
        {world - 1: OSError("one")},
        {0: OSError("one"), 1: MemoryError("two")},
        {0: OSError("two"), 1: KeyboardInterrupt("one")},
        {world - 1: UnpicklableError("one", required=1)},
    ]
    for given in errors:
        with pytest.raises(BaseException, match="one") as found:
            agree(given.get(rank))
        kinds = Ranks().all_gather(type(found.value).__name__)
        assert len(set(kinds)) == 1
    agree(None)
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("job", [publishing, following, closing, agreeing])
def test_an_error_on_one_rank_is_raised_by_all_and_changes_nothing(job: Any, world: int, tmp_path: Path) -> None:
    publish_alone(tmp_path / "later")
    if job is following:
        (tmp_path / "chain").mkdir()
    run(job, tmp_path, world)
    if job is publishing:
        server: dict[str, Tensor] = {name: torch.zeros_like(tensor) for name, tensor in state(0).items()}
        assert follow(server, tmp_path / "chain").poll().step == 6
        assert bytes_of(server) == bytes_of(state(4))
