"""Staged exact updates are checked first and then written to all tensors or to none, on one rank and on several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

import peraxis_format as pf
from peraxis_format.errors import PxdError
from peraxis_format.torch import LiveModelError, Shard, place
from peraxis_format.torch.place.claims import claim, release
from peraxis_format.torch.updates import UpdateWriter, apply_update
from peraxis_format.torch.updates import staged as module
from peraxis_format.torch.updates.staged import StagedUpdate, stage
from tests.loader.support import bytes_of
from tests.loader.test_sharded import DIMS, base_tensors, cut, start
from tests.processes import run_ranks

STEP, ANCHOR = "step-00000001.pxd", "anchor-00000000.pxd"


def after_one_step() -> dict[str, Tensor]:
    """Return the base with a few changed weights in two tensors and all weights changed in a third."""
    tensors = {name: tensor.clone() for name, tensor in base_tensors().items()}
    tensors["up.weight"].view(torch.int16)[::7, ::5] += 1
    tensors["down.weight"].view(torch.int16)[3, 40:50] -= 1
    tensors["norm.weight"].view(torch.int16)[:] += 1
    return tensors


def publish(folder: Path, tied: dict[str, str] | None = None) -> None:
    """Publish the chain base -> after_one_step. tied: other names of tensors."""
    live = {name: tensor.clone() for name, tensor in base_tensors().items()}
    live |= {alias: live[name] for alias, name in (tied or {}).items()}
    writer = UpdateWriter(live, folder)
    writer.step()
    for name, tensor in after_one_step().items():
        live[name].copy_(tensor)
    writer.step()


def staged(path: Path, live: dict[str, Tensor], shards: dict[str, Shard] | None = None) -> StagedUpdate:
    with pf.open(path) as file:
        return stage(file, place(live, file.manifest, shards=shards))


def test_nothing_is_written_before_write_and_then_all_of_it(tmp_path: Path) -> None:
    publish(tmp_path)
    live = base_tensors()
    update = staged(tmp_path / STEP, live)
    assert bytes_of(live) == bytes_of(base_tensors())
    update.write()
    assert bytes_of(live) == bytes_of(after_one_step())
    staged(tmp_path / ANCHOR, live).write()
    assert bytes_of(live) == bytes_of(base_tensors())


def test_what_is_kept_grows_with_what_changes_and_not_with_the_model(tmp_path: Path) -> None:
    publish(tmp_path)
    with pf.open(tmp_path / STEP) as file:
        assert file.content_id == staged(tmp_path / STEP, base_tensors()).content_id
    changed = sum(
        int((a.view(torch.int16) != b.view(torch.int16)).sum())
        for a, b in zip(base_tensors().values(), after_one_step().values(), strict=True)
    )
    model = sum(tensor.nbytes for tensor in base_tensors().values())
    assert 0 < staged(tmp_path / STEP, base_tensors()).nbytes <= 10 * changed < model / 4
    assert staged(tmp_path / ANCHOR, base_tensors()).nbytes == model


def test_weights_in_another_state_are_refused_and_a_damaged_file_too(tmp_path: Path) -> None:
    publish(tmp_path)
    for name in ("up.weight", "experts.weight"):  # one tensor changes, the other does not
        live = base_tensors()
        live[name].view(torch.int16).view(-1)[11] ^= 1
        with pytest.raises(PxdError, match=rf"E40[45].*{name}"):
            staged(tmp_path / STEP, live)
    data = bytearray((tmp_path / STEP).read_bytes())
    data[-40] ^= 1
    (tmp_path / "bad.pxd").write_bytes(data)
    with pytest.raises(PxdError, match=r"E30"):
        staged(tmp_path / "bad.pxd", base_tensors())


def test_a_write_that_fails_restores_the_weights_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path)
    exchange = module._Change.exchange
    for name, before, after in (
        (STEP, base_tensors(), after_one_step()),
        (ANCHOR, after_one_step(), base_tensors()),
    ):
        live = {key: tensor.clone() for key, tensor in before.items()}
        if name == ANCHOR:
            live["up.weight"].zero_()
        found = bytes_of(live)
        update = staged(tmp_path / name, live)
        calls = [0]

        def broken(change: Any, calls: list[int] = calls) -> None:
            calls[0] += 1
            if calls[0] == 3:
                raise MemoryError
            exchange(change)

        with monkeypatch.context() as patch:
            patch.setattr(module._Change, "exchange", broken)
            with pytest.raises(MemoryError):
                update.write()
        assert calls[0] == 5  # two tensors were written and restored
        assert bytes_of(live) == found
        update.write()
        assert bytes_of(live) == bytes_of(after)


def test_equal_tensors_of_a_file_may_share_storage_in_the_model(tmp_path: Path) -> None:
    old = base_tensors()["up.weight"]
    trained = {"up": old.clone(), "again": old.clone()}
    writer = UpdateWriter(trained, tmp_path)
    writer.step()
    for tensor in trained.values():
        tensor.view(torch.int16)[::3] += 1
    writer.step()
    for write in (lambda live: apply_update(live, tmp_path / STEP), lambda live: staged(tmp_path / STEP, live).write()):
        shared = old.clone()
        write({"up": shared, "again": shared})
        assert shared.equal(trained["up"])


def test_weights_that_other_code_relies_on_are_refused(tmp_path: Path) -> None:
    class Owner:
        pass

    publish(tmp_path)
    live, owner = base_tensors(), Owner()
    claim([live["up.weight"]], owner, "close the owner first")
    for write in (lambda: apply_update(live, tmp_path / STEP), lambda: staged(tmp_path / STEP, live)):
        with pytest.raises(LiveModelError, match="close the owner first"):
            write()
    release(owner)
    apply_update(live, tmp_path / STEP)
    assert bytes_of(live) == bytes_of(after_one_step())


def test_a_piece_alone_is_refused(tmp_path: Path) -> None:
    publish(tmp_path)
    with pytest.raises(LiveModelError, match=r"have 1584 of its 3168 weights; check `shards`"):
        staged(tmp_path / STEP, slices(base_tensors(), 0, 2), {"up.weight": Shard(0, 0, 2)} | shards_of(0, 2))


# --- several ranks ---------------------------------------------------------------------------------------


def slices(tensors: dict[str, Tensor], rank: int, world: int) -> dict[str, Tensor]:
    return {name: cut(tensor, name, rank, world) for name, tensor in tensors.items()}


def shards_of(rank: int, world: int) -> dict[str, Shard]:
    return {name: Shard(dim, rank, world) for name, dim in DIMS.items()}


def ranks_take_their_slices(rank: int, world: int, folder: str) -> None:
    path = start(rank, world, folder)
    live = slices(base_tensors(), rank, world)
    update = staged(path / STEP, live, shards_of(rank, world))
    assert bytes_of(live) == bytes_of(slices(base_tensors(), rank, world))
    assert update.nbytes < sum(tensor.nbytes for tensor in live.values()) / 4
    update.write()
    assert bytes_of(live) == bytes_of(slices(after_one_step(), rank, world))
    staged(path / ANCHOR, live, shards_of(rank, world)).write()
    assert bytes_of(live) == bytes_of(slices(base_tensors(), rank, world))
    distributed.destroy_process_group()


def one_rank_is_in_another_state(rank: int, world: int, folder: str) -> None:
    path = start(rank, world, folder)
    for name in (*DIMS, "norm.weight"):
        live = slices(base_tensors(), rank, world)
        if rank == world - 1:
            live[name].view(torch.int16).view(-1)[0] ^= 1
        with pytest.raises(PxdError, match=rf"E40[45].*{name}"):
            staged(path / STEP, live, shards_of(rank, world))
    distributed.destroy_process_group()


def one_rank_has_a_damaged_file(rank: int, world: int, folder: str) -> None:
    path = start(rank, world, folder)
    data = bytearray((path / STEP).read_bytes())
    if rank == 0:
        with pf.open(path / STEP) as file:
            data[file.span("up.weight")[1] - 70] ^= 1  # rank 0 does not check `up`, the third tensor
    own = path / f"own-{rank}.pxd"
    own.write_bytes(data)
    live = slices(base_tensors(), rank, world)
    try:
        update = staged(own, live, shards_of(rank, world))
    except PxdError:
        told = [False]
    else:
        told = [True]
        del update
    found: list[Any] = [None] * world
    distributed.all_gather_object(found, told)
    assert found.count(found[0]) == world  # all, or none
    assert bytes_of(live) == bytes_of(slices(base_tensors(), rank, world))
    distributed.destroy_process_group()


def aliases_and_files_differ(rank: int, world: int, folder: str) -> None:
    path = start(rank, world, folder)
    publish(path / f"tied-{rank}", {"up.tied": "up.weight"})

    def pieces(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        cut_ = slices(tensors, rank, world)
        return cut_ | {"up.tied": cut_["up.weight"].clone()}

    shards = shards_of(rank, world) | {"up.tied": Shard(0, rank, world)}
    live = pieces(base_tensors())
    with pytest.raises(LiveModelError, match="different files"):
        staged(path / f"tied-{rank}" / (STEP if rank else ANCHOR), live, shards)
    if rank == world - 1:
        live["up.tied"].view(torch.int16)[0, 0] ^= 1
    with pytest.raises(PxdError, match=r"E404.*its aliases have other weights.*up\.weight"):
        staged(path / f"tied-{rank}" / STEP, live, shards)
    live = pieces(base_tensors())
    update = staged(path / f"tied-{rank}" / STEP, live, shards)
    for expected in (after_one_step(), base_tensors(), after_one_step()):
        update.write()  # a second call is the undo
        assert bytes_of(live) == bytes_of(pieces(expected))
    distributed.destroy_process_group()


@pytest.mark.parametrize(
    "job",
    [ranks_take_their_slices, one_rank_is_in_another_state, one_rank_has_a_damaged_file, aliases_and_files_differ],
)
def test_ranks_stage_an_update_together(job: Any, tmp_path: Path) -> None:
    publish(tmp_path)
    run_ranks(job, 2, tmp_path)
