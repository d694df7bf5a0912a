"""The laws of the loader on a GPU, with real streams, page-locked memory and compiled kernels."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peraxis_format.torch import VariantSwitch, apply_
from peraxis_format.torch.device import CudaDevice
from peraxis_format.torch.serve.api import serve
from peraxis_format.torch.swap import registry
from peraxis_format.torch.updates import UpdateWriter, follow
from tests.loader import test_updates
from tests.loader.support import Small, bytes_of, expected_bytes, named_tensors, write_delta

pytestmark = pytest.mark.cuda


def on_host(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in named_tensors(model).items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("components", "undo"), [(1, "device"), (3, "host")])
def test_applied_weights_have_the_bits_of_the_reference(
    dtype: torch.dtype, components: int, undo: Any, tmp_path: Path
) -> None:
    model = Small(dtype=dtype)
    base = on_host(model)
    path = write_delta(tmp_path / "d.pxd", base, components=components)
    apply_(model.cuda(), path, undo=undo)
    assert bytes_of(on_host(model)) == expected_bytes(path, base)


def test_batches_of_matrices_and_strided_layouts_are_exact_too(tmp_path: Path) -> None:
    base = {"experts": torch.randn(3, 9, 24).bfloat16(), "turned": torch.randn(40, 24).bfloat16()}
    path = write_delta(tmp_path / "d.pxd", base, components=2)
    live = {name: tensor.cuda() for name, tensor in base.items()}
    turned = live.pop("turned").t().contiguous()
    apply_(live, path, views={"turned": turned.t()})
    assert bytes_of({"experts": live["experts"].cpu(), "turned": turned.t().cpu()}) == expected_bytes(path, base)


@pytest.mark.parametrize("place", ["device", "pinned"])
def test_random_swaps_from_every_residency_end_in_the_right_bits(
    place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "TRANSFER_LIMIT", 700)
    model = Small()
    base = on_host(model)
    model.cuda()
    wanted = {None: bytes_of(base)}
    with VariantSwitch(model, base=place) as live:
        for i, residency in enumerate(("gpu", "pinned", "file", "file")):
            path = write_delta(tmp_path / f"{i}.pxd", base, seed=i, components=1 + i % 2)
            live.add(str(i), path, residency, direct=i == 3)
            wanted[str(i)] = expected_bytes(path, base)
        chooser = random.Random(3)
        for _ in range(200):
            name = chooser.choice(list(wanted))
            live.use(name)
            assert bytes_of(on_host(model)) == wanted[name]


def test_a_swap_uploads_each_module_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "TRANSFER_LIMIT", 300)
    model = Small()
    path = write_delta(tmp_path / "d.pxd", on_host(model))
    with VariantSwitch(model.cuda()) as live:
        live.add("v", path, "file")
        device = live._registry.device
        assert isinstance(device, CudaDevice)
        allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
        device.counters.reset()
        live.use("v")
        assert set(device.counters.modules.values()) == {1}
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated


@torch.no_grad()
def test_a_decode_step_can_be_captured_in_a_graph(tmp_path: Path) -> None:
    model = nn.Linear(1024, 512, bias=False, dtype=torch.bfloat16, device="cuda")
    base = {"weight": model.weight.detach().cpu()}
    paths = {str(i): write_delta(tmp_path / f"{i}.pxd", base, seed=i, components=1 + i) for i in range(3)}
    for wanted in (["1"], ["2", None, "0", "1"]):
        x = torch.randn(len(wanted), 1, 1024, device="cuda").bfloat16()
        with serve(model, paths) as served, served.using(wanted):
            expected = model(x)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                model(x)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found = model(x)
        found.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(found, expected)


@pytest.mark.parametrize("length", [1, 7, 70])
@torch.no_grad()
def test_a_mixed_batch_gives_each_sequence_its_merged_model(length: int, tmp_path: Path) -> None:
    model = Small(dtype=torch.bfloat16)
    base = on_host(model)
    model.cuda().eval()
    paths = {str(i): write_delta(tmp_path / f"{i}.pxd", base, seed=i, components=1 + i) for i in range(3)}
    wanted = ["2", None, "0", "1", "0"]
    ids = torch.randint(0, 37, (len(wanted), length), device="cuda")
    whole = []
    for i, name in enumerate(wanted):
        one = copy.deepcopy(model)
        if name is not None:
            apply_(one, paths[name])
        whole.append(one(ids[i : i + 1])[0])
    with serve(model, paths) as served, served.using(wanted):
        found = model(ids)
    for one, expected in zip(found, whole, strict=True):
        torch.testing.assert_close(one, expected, rtol=0.03, atol=0.03)


@torch.no_grad()
def test_a_server_on_the_device_follows_a_trainer_on_the_device(tmp_path: Path) -> None:
    trained, live = test_updates.trainer().cuda(), test_updates.server().cuda()
    writer, follower = UpdateWriter(trained, tmp_path), follow(live, tmp_path)
    for step in range(3):
        writer.step()
        assert follower.poll().step == step
        held, wanted = (test_updates.published(copy.deepcopy(model).cpu()) for model in (live, trained))
        assert held == wanted
        for parameter in trained.parameters():
            parameter.add_(3e-5 * torch.randn_like(parameter))
