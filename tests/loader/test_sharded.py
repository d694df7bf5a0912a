"""Sharded models over gloo: each rank reads and writes its slice, and all ranks or none become the fine-tune."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

import peraxis_format as pf
from peraxis_format.torch import LiveModelError, Shard, SwapError, VariantSwitch, apply_, chunk, place
from peraxis_format.torch.serve.api import serve
from peraxis_format.torch.swap.transfer_plan import cut_transfers
from tests.loader.support import bytes_of, expected_bytes, write_delta
from tests.processes import run_ranks

# A column-parallel weight, a row-parallel one (its slices begin inside a byte), experts, and a norm on all ranks.
SHAPES = {"up.weight": (44, 72), "down.weight": (24, 86), "experts.weight": (4, 10, 24), "norm.weight": (24,)}
DIMS = {"up.weight": 0, "down.weight": 1, "experts.weight": 0}


def base_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in SHAPES.items()}


def cut(tensor: Tensor, name: str, rank: int, world: int) -> Tensor:
    if name not in DIMS:
        return tensor.clone()
    begin, end = chunk((0, tensor.shape[DIMS[name]]), rank, world)
    return tensor.narrow(DIMS[name], begin, end - begin).clone().contiguous()


def wanted_slices(path: Path, base: dict[str, Tensor], rank: int, world: int) -> dict[str, bytes]:
    whole = expected_bytes(path, base)
    out = {}
    for name, tensor in base.items():
        full = torch.frombuffer(bytearray(whole[name]), dtype=torch.bfloat16).view(tensor.shape)
        out[name] = bytes_of({name: cut(full, name, rank, world)})[name]
    return out


def start(rank: int, world: int, folder: str) -> Path:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=600),
    )  # fmt: skip
    return Path(folder)


def plain_slices(rank: int, world: int, folder: str) -> None:
    path = start(rank, world, folder) / "d.pxd"
    base = base_tensors()
    live = {name: cut(tensor, name, rank, world) for name, tensor in base.items()}
    shards = {name: Shard(dim, rank, world) for name, dim in DIMS.items()}
    applied = apply_(live, path, shards=shards, workers=1)
    assert bytes_of(live) == wanted_slices(path, base, rank, world)
    with pf.open(path) as delta:
        stored = sum(b - a for a, b in map(delta.span, delta))
        # A rank reads its slice of masks and scales, about 1 / `world` of them, and the unsharded tensors.
        whole = sum(b - a for a, b in [delta.span("norm.weight")])
        assert applied.read_bytes <= (stored - whole) / world * 1.35 + whole
        assert applied.verified_bytes < stored
        runs = cut_transfers(delta, place(live, delta.manifest, shards=shards), limit=1 << 20)
        assert applied.read_bytes == sum(run.size for transfer in runs for run in transfer.runs)
    total = torch.tensor([applied.verified_bytes])
    distributed.all_reduce(total)
    assert int(total) == stored
    distributed.destroy_process_group()


def dtensors(rank: int, world: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor
    from torch.distributed.tensor import Shard as Sharded

    path = start(rank, world, folder) / "d.pxd"
    base = base_tensors()
    shape = (2, 2) if world == 4 else (world,)
    mesh = init_device_mesh("cpu", shape)
    live = {}
    for name, tensor in base.items():
        placements: list[Any] = [Replicate()] * len(shape)
        if name in DIMS:
            placements[-1] = Sharded(DIMS[name])
        if name == "up.weight" and world == 4:
            placements[0] = Sharded(1)  # sharded along both dimensions
        live[name] = distribute_tensor(tensor, mesh, placements)
    apply_(live, path, workers=1)
    whole = expected_bytes(path, base)
    for name, tensor in live.items():
        assert bytes_of({name: tensor.full_tensor()})[name] == whole[name], name
    distributed.destroy_process_group()


def one_bad_rank(rank: int, world: int, folder: str) -> None:
    path = start(rank, world, folder) / "d.pxd"
    base = base_tensors()
    live = {name: cut(tensor, name, rank, world) for name, tensor in base.items()}
    if rank == world - 1:
        live["down.weight"].view(torch.int16)[1, 1] ^= 1
    before = bytes_of(live)
    with pytest.raises(pf.BindingError, match=r"E404.*down\.weight"):
        apply_(live, path, shards={name: Shard(dim, rank, world) for name, dim in DIMS.items()}, workers=1)
    assert bytes_of(live) == before
    distributed.destroy_process_group()


def one_failing_rank(rank: int, world: int, folder: str) -> None:
    from peraxis_format.torch.swap.engine import HostEngine

    path = start(rank, world, folder) / "d.pxd"
    base = base_tensors()
    live = {name: cut(tensor, name, rank, world) for name, tensor in base.items()}
    before = bytes_of(live)
    if rank == 0:

        def failing(*_: Any) -> None:
            raise OSError("this rank only")

        HostEngine.write = failing  # type: ignore[method-assign]
    with pytest.raises(OSError, match="this rank only"):
        apply_(live, path, shards={name: Shard(dim, rank, world) for name, dim in DIMS.items()}, workers=1)
    assert bytes_of(live) == before
    distributed.destroy_process_group()


def swaps(rank: int, world: int, folder: str) -> None:
    path = start(rank, world, folder)
    base = base_tensors()
    live = {name: cut(tensor, name, rank, world) for name, tensor in base.items()}
    pristine = bytes_of(live)
    shards = {name: Shard(dim, rank, world) for name, dim in DIMS.items()}
    with VariantSwitch(live, shards=shards, workers=1) as switch:
        switch.add("d", path / "d.pxd", "file")
        switch.add("e", path / "e.pxd")
        for name in ("d", "e", None, "d"):
            switch.use(name)
            file = None if name is None else path / f"{name}.pxd"
            assert bytes_of(live) == (pristine if file is None else wanted_slices(file, base, rank, world))
    distributed.destroy_process_group()


def undone_swaps(rank: int, world: int, folder: str) -> None:
    """With base="undo" each rank undoes its slices. An error on one rank undoes the swap on all ranks."""
    from peraxis_format.torch.swap.undo import InPlace

    path = start(rank, world, folder)
    base = base_tensors()
    live = {name: cut(tensor, name, rank, world) for name, tensor in base.items()}
    pristine = bytes_of(live)
    shards = {name: Shard(dim, rank, world) for name, dim in DIMS.items()}
    with VariantSwitch(live, shards=shards, workers=1, base="undo") as switch:
        switch.add("d", path / "d.pxd")
        switch.use("d")
        switch.add("e", path / "e.pxd")
        for name in ("e", None, "d"):
            switch.use(name)
            file = None if name is None else path / f"{name}.pxd"
            assert bytes_of(live) == (pristine if file is None else wanted_slices(file, base, rank, world))
        plain, put = [True], InPlace._put

        def failing(self: InPlace, *args: Any, **options: Any) -> None:
            if rank == world - 1 and plain and plain.pop():
                raise OSError("this rank only")
            put(self, *args, **options)

        InPlace._put = failing  # type: ignore[method-assign]
        with pytest.raises(SwapError, match="this rank only"):
            switch.use("e")
        assert switch.current == "d"
        assert bytes_of(live) == wanted_slices(path / "d.pxd", base, rank, world)
    distributed.destroy_process_group()


def serving(rank: int, world: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard as Sharded
    from torch.distributed.tensor import distribute_tensor

    path = start(rank, world, folder) / "d.pxd"
    model = torch.nn.ModuleDict({"up": torch.nn.Linear(72, 44, bias=False).bfloat16()})
    weight = distribute_tensor(model["up"].weight.detach(), init_device_mesh("cpu", (world,)), [Sharded(0)])
    model["up"].weight = torch.nn.Parameter(weight)
    with pytest.raises(LiveModelError, match=r"up\.weight: sharded weights .* use VariantSwitch"):
        serve(model, {"d": path})
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("job", [plain_slices, dtensors, one_bad_rank, one_failing_rank, swaps, undone_swaps, serving])
def test_ranks_become_the_fine_tune_together(world: int, job: Any, tmp_path: Path) -> None:
    base = base_tensors()
    write_delta(tmp_path / "d.pxd", base, components=2)
    write_delta(tmp_path / "e.pxd", base, seed=5)
    run_ranks(job, world, tmp_path)


def test_without_the_other_ranks_a_piece_cannot_be_checked(tmp_path: Path) -> None:
    base = base_tensors()
    path = write_delta(tmp_path / "d.pxd", base)
    live = {name: cut(tensor, name, 0, 2) for name, tensor in base.items()}
    with pytest.raises(Exception, match=r"initialise torch\.distributed"):
        apply_(live, path, shards={name: Shard(dim, 0, 2) for name, dim in DIMS.items()})
