"""Sharded models over gloo: a server and sharded followers hold exactly the weights that ranks publish together."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, nn

import peraxis_format as pxd
from peraxis_format.ops.exact import BLOCK
from peraxis_format.torch import LiveModelError, Shard, chunk
from peraxis_format.torch.place import pieces
from peraxis_format.torch.place.pieces import boxed_indices, flat_indices
from peraxis_format.torch.updates import ShardedUpdateWriter, UpdateWriter, apply_update, follow, staged
from tests.loader.support import bytes_of
from tests.processes import run_ranks

# Rows that match no shard and no block, columns, experts, one row, a vector, a scalar, and a tied pair.
SHAPES = {"up": (350, 300), "down": (90, 700), "experts": (5, 30, 8), "gate": (1, 40), "norm": (24,), "scale": ()}
DIMS = {"up": 0, "down": 1, "experts": 0, "gate": 0}


def state(step: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Return the trainer's weights after some steps. A step changes 5% of the weights; `experts` rests at step 2."""
    generator = torch.Generator().manual_seed(0)
    found = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    for seed in range(1, step + 1):
        generator.manual_seed(seed)
        for name, tensor in found.items():
            if (name, seed) != ("experts", 2):
                tensor += 1e-4 * torch.randn(tensor.shape, generator=generator)
    return {name: tensor.to(dtype) for name, tensor in found.items()}


class Pieces(nn.Module):
    """A model whose parameters in DIMS are DTensors. `again` is `up` under another name."""

    def __init__(self, tensors: dict[str, Tensor], mesh: Any) -> None:
        from torch.distributed.tensor import Shard as Sharded
        from torch.distributed.tensor import distribute_tensor

        super().__init__()
        for name, tensor in tensors.items():
            whole = distribute_tensor(tensor, mesh, [Sharded(DIMS[name])]) if name in DIMS else tensor
            self.register_parameter(name, nn.Parameter(whole))
        self.again = self.up

    @torch.no_grad()
    def become(self, tensors: dict[str, Tensor], mesh: Any) -> None:
        for name, new in Pieces(tensors, mesh).named_parameters():
            mine: Any = self.get_parameter(name)
            getattr(mine, "_local_tensor", mine).copy_(getattr(new, "_local_tensor", new))

    def whole(self) -> dict[str, bytes]:
        full: dict[str, Any] = dict(self.named_parameters())
        return bytes_of({n: t.full_tensor() if n in DIMS else t for n, t in full.items()})


def start(rank: int, world: int, folder: str) -> tuple[Path, Any]:
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    pieces._STRETCH = BLOCK  # type: ignore[misc]  # several stretches a tensor
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=600),
    )  # fmt: skip
    return Path(folder), init_device_mesh("cpu", (world,))


def publishing(rank: int, world: int, folder: str) -> None:
    """Test the trainer: it writes the chain of one process, continues a folder, and refuses bad input."""
    path, mesh = start(rank, world, folder)
    model = Pieces(state(0, torch.float32), mesh)
    with pytest.raises(LiveModelError, match=r"up: is sharded; use ShardedUpdateWriter"):
        UpdateWriter(model, path / "refused").step()
    writer = ShardedUpdateWriter(model, path / "chain", anchor_every=2)
    for step in range(3):
        model.become(state(step, torch.float32), mesh)
        done = writer.step()
        assert (done.step, writer.step_number) == (step, step)
    changed = sum(
        int(np.count_nonzero(new.view(torch.int16).numpy() != state(1)[name].view(torch.int16).numpy()))
        for name, new in state(2).items()
    )
    assert done.changed == changed
    # No rank keeps more of the published weights than its share and the part that it encodes.
    held = sum(array.nbytes for array in writer._pieces.values())
    owned = sum(array.nbytes for _, array in writer._snapshot.values())
    full = sum(tensor.nbytes for tensor in state(0).values())
    totals: list[Any] = [None] * world
    distributed.all_gather_object(totals, (held, owned))
    assert [sum(column) for column in zip(*totals, strict=True)] == [full, full]

    again = ShardedUpdateWriter(model, path / "chain")
    assert (again.step_number, again.result) == (2, writer.result)
    model.become(state(3, torch.float32), mesh)
    assert again.step().step == 3
    if rank == 0:
        (path / "chain" / "step-00000004.pxd").touch()
    distributed.barrier()
    model.become(state(4, torch.float32), mesh)
    with pytest.raises(FileExistsError):
        again.step()
    assert again.step_number == 3
    distributed.barrier()
    if rank == 0:
        (path / "chain" / "step-00000004.pxd").unlink()
    distributed.barrier()
    assert again.step().step == 4

    # Only rank 0 sees that its first anchor cannot be written.
    late = ShardedUpdateWriter(model, path / "late")
    if rank == 0:
        (path / "late" / "step-00000001.pxd").touch()
    with pytest.raises(FileExistsError, match="another process publishes there"):
        late.step()

    # Only one rank has a weight that is not finite, and all refuse the step: the first one, and a later one.
    strict = ShardedUpdateWriter(model, path / "strict", nonfinite="refuse")
    for step in range(2):
        weights = state(step, torch.float32)
        weights["up"][-1, -1] = float("nan")
        model.become(weights, mesh)
        with pytest.raises(LiveModelError, match=r"up: 1 of \d+ weights to publish are NaN or infinite"):
            strict.step()
        model.become(state(step, torch.float32), mesh)
        assert strict.step().step == step
    distributed.destroy_process_group()


def following(rank: int, world: int, folder: str) -> None:
    """Test the server: every state of the chain is exact, with DTensors and with plain local shards."""
    path, mesh = start(rank, world, folder)
    model = Pieces({name: torch.zeros_like(tensor) for name, tensor in state(0).items()}, mesh)
    pointers = [getattr(p, "_local_tensor", p).data_ptr() for p in model.parameters()]
    follower = follow(model, path / "chain")
    (path / f"seen-{rank}").mkdir()
    for step in range(5):
        if rank == 0:
            name = f"step-{step:08d}.pxd" if step else "anchor-00000000.pxd"
            (path / "later" / name).rename(path / "chain" / name)
        distributed.barrier()
        found = follower.poll()
        assert (found.step, len(found.applied), dict(found.waiting)) == (step, 1, {})
        assert model.whole() == bytes_of(state(step))
    assert [getattr(p, "_local_tensor", p).data_ptr() for p in model.parameters()] == pointers
    late = follow(model, path / "chain")
    assert late.poll().step == 4

    plain = {}
    for name, tensor in state(3).items():
        begin, end = chunk((0, tensor.shape[DIMS[name]]), rank, world) if name in DIMS else (0, 0)
        part = tensor.narrow(DIMS[name], begin, end - begin) if name in DIMS else tensor
        plain[name] = part.clone().contiguous()
    shards = {name: Shard(dim, rank, world) for name, dim in DIMS.items()}
    apply_update(plain, path / "chain" / "step-00000004.pxd", shards=shards)
    assert plain["up"].equal(state(4)["up"].chunk(world)[rank])
    assert plain["down"].equal(state(4)["down"].chunk(world, 1)[rank])
    distributed.destroy_process_group()


def failing(rank: int, world: int, folder: str) -> None:
    """If one rank has a wrong bit or cannot write, all ranks stay unchanged and report the same error."""
    path, mesh = start(rank, world, folder)
    step = path / "later" / "step-00000001.pxd"
    model = Pieces(state(0), mesh)
    local: Any = model.down
    local = local._local_tensor.detach()
    if rank == world - 1:
        local.view(torch.int16)[1, 1] ^= 1
    before = model.whole()
    with pytest.raises(pxd.PxdError, match=r"E405.*down"):
        apply_update(model, step)
    assert model.whole() == before
    if rank == world - 1:
        local.view(torch.int16)[1, 1] ^= 1
    before = model.whole()
    exchange, calls = staged._Change.exchange, [0]

    def broken(change: Any) -> None:
        calls[0] += 1
        if rank == world - 1 and calls[0] == 2:
            raise LiveModelError("this rank only")
        exchange(change)

    staged._Change.exchange = broken  # type: ignore[assignment,method-assign]
    with pytest.raises(LiveModelError, match="this rank only"):
        apply_update(model, step)
    assert model.whole() == before
    staged._Change.exchange = exchange  # type: ignore[method-assign]
    apply_update(model, step)
    assert model.whole() == bytes_of(state(1))
    distributed.destroy_process_group()


def run(job: Any, folder: Path, world: int = 2) -> None:
    (folder / "rendezvous").unlink(missing_ok=True)
    run_ranks(job, world, folder)


def publish_alone(folder: Path) -> None:
    live = state(0)
    writer = UpdateWriter(live, folder)
    for step in range(5):
        live.update(state(step))
        writer.step()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_publish_the_chain_that_one_process_would(world: int, tmp_path: Path) -> None:
    run(publishing, tmp_path, world)
    server = {name: torch.zeros_like(tensor) for name, tensor in state(0).items()}
    assert follow(server, tmp_path / "chain").poll().step == 4
    assert bytes_of(server) == bytes_of(state(4))
    publish_alone(tmp_path / "alone")
    with pxd.open(tmp_path / "chain" / "step-00000004.pxd") as together:
        assert together.manifest.tied == (("up", "again"),)
        with pxd.open(tmp_path / "alone" / "step-00000004.pxd") as alone:
            assert [m.sha256 for m in together.manifest.modules] == [m.sha256 for m in alone.manifest.modules]
    assert (tmp_path / "chain" / "anchor-00000002.pxd").exists()


@pytest.mark.slow
@pytest.mark.parametrize("job", [following, failing])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_follow_a_chain_together(world: int, job: Any, tmp_path: Path) -> None:
    publish_alone(tmp_path / "later")
    (tmp_path / "chain").mkdir()
    run(job, tmp_path, world)


def test_indices_in_a_box_and_in_the_tensor_are_each_others_inverse() -> None:
    shape, box = (5, 6, 7), ((1, 4), (0, 6), (2, 5))
    flat = np.arange(5 * 6 * 7, dtype=np.int64)
    inside, local = boxed_indices(flat, box, shape)
    assert inside.sum() == local.size == 3 * 6 * 3
    assert np.array_equal(local, np.arange(local.size))
    assert np.array_equal(flat_indices(local, box, shape), flat[inside])
    whole = np.arange(1, dtype=np.int64)
    assert np.array_equal(flat_indices(whole, (), ()), boxed_indices(whole, (), ())[1])
