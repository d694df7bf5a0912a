"""Exact tensors of a sharded model over gloo: every rank gets the bits of its slice, and an error is that of all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peraxis_format as pf
from peraxis_format.ops.exact import BLOCK
from peraxis_format.torch import Shard, VariantSwitch, apply_
from peraxis_format.torch.place import pieces
from tests.loader.support import bytes_of
from tests.loader.test_exact_variants import write_mixed
from tests.loader.test_sharded import DIMS, cut, start, wanted_slices
from tests.processes import run_ranks

# More than one block, cut within a row and within a block; one row, which one rank has alone; a vector on all ranks.
SHAPES = {"up.weight": (350, 300), "down.weight": (24, 86), "experts.weight": (4, 10, 24), "norm.weight": (60,)}
EXACT = ("up.weight", "down.weight", "norm.weight", "gate.weight")
CUTS = {**DIMS, "gate.weight": 0}


def base_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {**SHAPES, "gate.weight": (1, 60)}
    return {name: 0.02 * torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


def cut_all(rank: int, world: int) -> dict[str, Tensor]:
    return {name: cut_one(tensor, name, rank, world) for name, tensor in base_tensors().items()}


def cut_one(tensor: Tensor, name: str, rank: int, world: int) -> Tensor:
    if name == "gate.weight":
        return tensor.clone() if rank == 0 else tensor[:0].clone()
    return cut(tensor, name, rank, world)


def wanted(path: Path, rank: int, world: int) -> dict[str, bytes]:
    base = base_tensors()
    found = wanted_slices(path, base, rank, world)
    return {**found, "gate.weight": found["gate.weight"] if rank == 0 else b""}


def applied(rank: int, world: int, folder: str, shards: dict[str, Shard]) -> None:
    path = Path(folder)
    for keep in ("device", "host"):
        live = cut_all(rank, world)
        before = bytes_of(live)
        with pytest.raises(pf.BindingError, match=r"E405: .*wrong\.pxd.*at up\.weight"):
            apply_(live, path / "wrong.pxd", shards=shards, workers=1, undo=keep)  # type: ignore[arg-type]
        assert bytes_of(live) == before
        apply_(live, path / "d.pxd", shards=shards, workers=1, undo=keep)  # type: ignore[arg-type]
        assert bytes_of(live) == wanted(path / "d.pxd", rank, world)


def swapped(rank: int, world: int, folder: str, shards: dict[str, Shard]) -> None:
    path = Path(folder)
    for base, residency in (("device", "file"), ("device", "pinned"), ("undo", None)):
        live = cut_all(rank, world)
        pristine = bytes_of(live)
        with VariantSwitch(live, shards=shards, workers=1, base=base) as switch:  # type: ignore[arg-type]
            for name in ("d", "e"):  # the second one is added while the model is the first
                variant = switch.add(name, path / f"{name}.pxd", residency)  # type: ignore[arg-type]
                switch.use(name)
                assert variant.host > 0
            with pytest.raises(pf.BindingError, match=r"E405: .*wrong\.pxd.*at up\.weight"):
                switch.add("wrong", path / "wrong.pxd", residency)  # type: ignore[arg-type]
            for name in ("e", None, "d", "e"):
                switch.use(name)
                assert bytes_of(live) == (wanted(path / f"{name}.pxd", rank, world) if name else pristine)


def damaged(rank: int, world: int, folder: str, shards: dict[str, Shard]) -> None:
    path = Path(folder)
    data = (path / "d.pxd").read_bytes()
    with pf.open(path / "d.pxd") as file:
        names = [entry.name for entry in file.manifest.modules if entry.sha256 is not None]
        places = {name: file.span(name)[0] for name in names}
    for name in names:  # in the share of each rank in turn
        own = path / f"damaged-{rank}.pxd"
        own.write_bytes(data[: places[name]] + bytes([data[places[name]] ^ 1]) + data[places[name] + 1 :])
        live = cut_all(rank, world)
        before = bytes_of(live)
        with pytest.raises(pf.PxdError, match=r"E30\d"):
            apply_(live, own, shards=shards, workers=1)
        with VariantSwitch(live, shards=shards, workers=1) as switch, pytest.raises(pf.PxdError, match=r"E30\d"):
            switch.add("v", own)
        assert bytes_of(live) == before


def refused(rank: int, world: int, folder: str, shards: dict[str, Shard]) -> None:
    """One rank alone has no file, or a tensor of another type: the others do not wait for it."""
    path = Path(folder)
    for odd in range(world):
        file = path / ("missing.pxd" if rank == odd else "d.pxd")
        live = cut_all(rank, world)
        other = {**live, "up.weight": live["up.weight"].double()} if rank == odd else live
        before = bytes_of(live)
        with pytest.raises(FileNotFoundError):
            apply_(live, file, shards=shards, workers=1)
        with pytest.raises(pf.BindingError, match=r"E403: .*up\.weight"):
            apply_(other, path / "d.pxd", shards=shards, workers=1)
        with VariantSwitch(live, shards=shards, workers=1) as switch, pytest.raises(FileNotFoundError):
            switch.add("v", file)
        with VariantSwitch(other, shards=shards, workers=1) as switch:
            with pytest.raises(pf.BindingError, match=r"E403: .*up\.weight"):
                switch.add("v", path / "d.pxd")
            assert not switch.variants()
        assert bytes_of(live) == before


def job(rank: int, world: int, folder: str, body: Any) -> None:
    start(rank, world, folder)
    pieces._STRETCH = BLOCK  # type: ignore[misc]  # several ranges a tensor
    body(rank, world, folder, {name: Shard(dim, rank, world) for name, dim in CUTS.items()})
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("body", [applied, swapped, damaged, refused])
def test_ranks_decode_exact_tensors_together(world: int, body: Any, tmp_path: Path) -> None:
    base = base_tensors()
    write_mixed(tmp_path / "d.pxd", base, 0, EXACT)
    write_mixed(tmp_path / "e.pxd", base, 20, ("down.weight", "experts.weight", "gate.weight"))
    write_mixed(tmp_path / "wrong.pxd", base, 0, EXACT, wrong="up.weight")
    run_ranks(job, world, tmp_path, body)
