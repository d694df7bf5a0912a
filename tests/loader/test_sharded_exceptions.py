"""Any exception on one rank ends a collective call on all of them, with one error, and the next call succeeds."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from peraxis_format import files
from peraxis_format.torch import LiveModelError, VariantSwitch, apply_
from peraxis_format.torch.place import pieces, sharded_exact
from peraxis_format.torch.place.ranks import Ranks
from peraxis_format.torch.place.watch import LiveTensors
from peraxis_format.torch.swap import apply, registry, switch
from peraxis_format.torch.updates import ShardedUpdateWriter, follow, shared_mirror, staged
from peraxis_format.torch.updates.destination import Destination
from tests.loader.support import bytes_of
from tests.loader.test_sharded_faults import UnpicklableError, failing
from tests.loader.test_sharded_updates import Pieces, publish_alone, run, start, state

STEP = "step-00000001.pxd"


@contextmanager
def raised_by_all() -> Iterator[None]:
    """All ranks raise the same error."""
    error: Exception | None = None
    try:
        yield
    except Exception as found:
        error = found
    told = Ranks().all_gather(f"{type(error).__name__}: {error}")
    assert len(set(told)) == 1
    assert "this rank" in told[0]


def errors() -> tuple[Exception, ...]:
    return MemoryError("this rank"), UnpicklableError("this rank", required=1)


def publishing(rank: int, world: int, folder: str) -> None:
    """Test the trainer."""
    path, mesh = start(rank, world, folder)
    model, last = Pieces(state(0, torch.float32), mesh), rank == world - 1
    writer = ShardedUpdateWriter(model, path / "chain", anchor_every=1)
    for error in errors():
        with failing(pieces.Layout, "check_complete", error, here=last), raised_by_all():
            writer.step()
    assert writer.step().step == 0
    model.become(state(1, torch.float32), mesh)
    with failing(files, "sync_folder", OSError("this rank"), here=rank == 0), raised_by_all():
        writer.step()
    distributed.barrier()
    assert (path / "chain" / STEP).exists()
    model.become(state(2, torch.float32), mesh)
    assert writer.step().step == 2
    for error in (*errors(), OSError("this rank")):
        with failing(Destination, "prune", error, here=rank == 0), raised_by_all():
            writer.prune(anchors=1)
    assert [Path(file).name for file in writer.prune(anchors=1)] == ["anchor-00000000.pxd", STEP, "step-00000002.pxd"]
    pytest.importorskip("fsspec")
    for error in errors():
        with failing(shared_mirror, "Mirror", error, here=rank == 0), raised_by_all():
            ShardedUpdateWriter(model, f"memory://{path.name}")
    if last:
        shared_mirror._reads = lambda *_: False  # as on another host, where this rank makes a folder
    for error in errors():
        with failing(tempfile, "mkdtemp", error, here=last), raised_by_all():
            ShardedUpdateWriter(model, f"memory://{path.name}")
    distributed.destroy_process_group()


def following(rank: int, world: int, folder: str) -> None:
    """Test the server."""
    path, mesh = start(rank, world, folder)
    model, last = Pieces(state(0), mesh), rank == world - 1
    refused: list[bool] = []

    def on_update(_: Any) -> None:
        if last and refused:
            refused.clear()
            raise RuntimeError("this rank")

    server = follow(model, path / "later", on_update=on_update)
    for owner, name in (
        (pieces, "as_bytes"),
        (pieces, "storage_array"),
        (pieces, "raw_bytes"),
        (pieces, "_buffer"),
        (staged, "_pieces"),
    ):
        for error in errors():
            for here in (rank == 0, last):
                before = model.whole()
                with failing(owner, name, error, here=here):
                    try:
                        found: Any = server.poll()
                        outcome = [str(found.applied), *sorted(found.waiting.values())]
                    except Exception as raised:
                        outcome = [type(raised).__name__, str(raised)]
                assert len(set(map(str, Ranks().all_gather(outcome)))) == 1
                assert model.whole() in (before, bytes_of(state(4)))
                if model.whole() != before:
                    model.become(state(0), mesh)
                    server = follow(model, path / "later", on_update=on_update)
    refused.append(True)
    with raised_by_all():
        server.poll()
    assert server.poll().step == 4
    distributed.destroy_process_group()


def swapping(rank: int, world: int, folder: str) -> None:
    """Test apply_ and VariantSwitch."""
    path, mesh = start(rank, world, folder)
    model, last = Pieces(state(0), mesh), rank == world - 1
    for error in errors():
        for owner, name in (
            (pieces, "as_bytes"),
            (pieces, "_buffer"),
            (sharded_exact, "in_box"),
            (apply, "copy_aside"),
            (apply, "stream"),
        ):
            with failing(owner, name, error, here=last), raised_by_all():
                apply_(model, path / "later" / STEP)
            assert model.whole() == bytes_of(state(0))
    for base in ("device", "undo"):
        with VariantSwitch(model, base=base) as variants:
            if base == "undo":
                with failing(registry, "UndoLog", MemoryError("this rank"), here=last), raised_by_all():
                    variants.add("one", path / "later" / STEP)
            variants.add("one", path / "later" / STEP)
            with failing(LiveTensors, "check", LiveModelError("this rank"), here=last), raised_by_all():
                variants.use("one")
            if base == "device":
                with failing(switch, "stream", MemoryError("this rank"), here=last), raised_by_all():
                    variants.use("one")
            variants.use("one")
            assert model.whole() == bytes_of(state(1))
            variants.use(None)
            assert model.whole() == bytes_of(state(0))
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("job", [publishing, following, swapping])
def test_any_exception_on_one_rank_is_one_error_of_all(job: Any, tmp_path: Path) -> None:
    publish_alone(tmp_path / "later")
    run(job, tmp_path, 2)
