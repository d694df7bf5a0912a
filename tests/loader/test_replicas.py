"""Replicated pieces (HSDP): a copy that differs on one rank is an error on all of them, which names both ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import peraxis_format as pf
from peraxis_format.torch import Shard, ShardView, apply_, chunk
from peraxis_format.torch.place.replicas import OddReplica, odd_replica
from peraxis_format.torch.updates import UpdateWriter, apply_update, follow
from tests.loader.support import bytes_of
from tests.loader.test_sharded import start
from tests.processes import run_ranks

# Ranks 1 and 2 have the same half of `w`.
HALF = {0: 0, 1: 1, 2: 1}


def state(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    w = 0.02 * torch.randn(60, 40, generator=generator)
    for seed in range(1, step + 1):
        w += 1e-4 * torch.randn(60, 40, generator=generator.manual_seed(seed))
    return {"w": w.bfloat16(), "norm": torch.ones(9).bfloat16()}


def piece(rank: int, step: int, *, wrong: bool = False) -> dict[str, Tensor]:
    begin, end = chunk((0, 60), HALF[rank], 2)
    found = {**state(step), "w": state(step)["w"][begin:end].clone()}
    if wrong and rank == 2:
        found["w"].view(torch.int16)[3, 3] ^= 1
    return found


def job(rank: int, world: int, folder: str) -> None:
    path = start(rank, world, folder)
    shards = {"w": Shard(0, HALF[rank], 2)}
    update = path / "chain" / "step-00000001.pxd"
    for become in (apply_, apply_update):
        live = piece(rank, 0, wrong=True)
        before = bytes_of(live)
        with pytest.raises(pf.BindingError, match=r"E404: .*rank 2 has other weights than rank 1.*at w,"):
            become(live, update, shards=shards)  # type: ignore[operator]
        assert bytes_of(live) == before
        live = piece(rank, 0)
        become(live, update, shards=shards)  # type: ignore[operator]
        assert bytes_of(live) == bytes_of(piece(rank, 1))
    # It is in no state of the chain, although the copies that are hashed are: it begins with the anchor.
    live = piece(rank, 1, wrong=True)
    found = follow(live, path / "chain", shards=shards).poll()
    assert [path.name for path in found.applied] == ["anchor-00000000.pxd", "step-00000001.pxd"]
    assert bytes_of(live) == bytes_of(piece(rank, 1))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_copy_that_differs_on_one_rank_is_refused_by_all(tmp_path: Path) -> None:
    live = state(0)
    writer = UpdateWriter(live, tmp_path / "chain")
    writer.step()
    live.update(state(1))
    writer.step()
    run_ranks(job, 3, tmp_path)


def test_only_copies_are_hashed_and_the_first_one_that_differs_is_named() -> None:
    weights = torch.randn(4, 6).bfloat16()
    boxes = [((0, 4), (0, 6)), ((4, 8), (0, 6)), ((4, 8), (0, 6)), ((4, 8), (0, 6))]
    sent: list[dict[str, str]] = []

    def gathered(mine: dict[str, str], *others: dict[str, str]) -> list[dict[str, str]]:
        sent.append(mine)
        return [{}, mine, mine, *others]

    known = [{"w": box} for box in boxes]
    alone = odd_replica({"w": ShardView(boxes[0], weights)}, known, lambda mine: gathered(mine, {}))
    assert (alone, sent.pop()) == (None, {})
    part = {"w": ShardView(boxes[1], weights)}
    assert odd_replica(part, known, lambda mine: gathered(mine, mine)) is None
    assert set(sent[0]) == {"w"}
    assert odd_replica(part, known, lambda mine: gathered(mine, {"w": "0"})) == OddReplica(name="w", rank=3, other=1)
