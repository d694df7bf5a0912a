"""Without a GPU, Triton or numba everything imports and works on the CPU, and errors name the need for CUDA."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from peraxis_format.torch import DeviceError, VariantSwitch, device
from peraxis_format.torch.device import HostDevice
from peraxis_format.torch.place.shards import Placement, ShardView, copy_aside
from peraxis_format.torch.serve.api import serve
from peraxis_format.torch.swap import registry
from tests.loader.support import Small, named_tensors, write_delta

_ALONE = """
import importlib, pkgutil, sys
from pathlib import Path
sys.modules.update(dict.fromkeys(sys.argv[2:]))  # importing one of these now fails
import peraxis_format.torch as loader
needs = {"kernels", "serving", "launch"}
for module in pkgutil.iter_modules(loader.__path__):
    if module.name not in needs or "triton" not in sys.argv[2:]:
        importlib.import_module(f"{loader.__name__}.{module.name}")
import torch
from peraxis_format.torch import DeviceError, VariantSwitch, apply_
from peraxis_format.torch.serve.api import serve
from peraxis_format.torch.device import CudaDevice
assert not torch.cuda.is_available()
state = torch.load(Path(sys.argv[1]) / "base.pt", weights_only=True)
delta = Path(sys.argv[1]) / "d.pxd"
model = torch.nn.ModuleDict({"a": torch.nn.Linear(600, 500, bias=False)}).bfloat16()
model["a"].weight.data.copy_(state["a.weight"])
with VariantSwitch(model) as switch:
    switch.add("v", delta)
    switch.use("v")
    swapped = model["a"].weight.clone()
    switch.use(None)
with serve(model, {"v": delta}) as served, served.using(["v", None]):
    model["a"](torch.ones(2, 1, 600).bfloat16())
apply_(model, delta)
assert torch.equal(model["a"].weight, swapped) and not torch.equal(swapped, state["a.weight"])
try:
    CudaDevice(torch.device("cuda"))
except DeviceError as error:
    print(error)
"""


@pytest.mark.parametrize("missing", [(), ("triton",), ("triton", "numba")])
def test_everything_imports_and_works_on_the_cpu(missing: tuple[str, ...], tmp_path: Path) -> None:
    base = {"a.weight": torch.randn(500, 600).bfloat16()}
    torch.save(base, tmp_path / "base.pt")
    write_delta(tmp_path / "d.pxd", base)
    command = [sys.executable, "-c", _ALONE, str(tmp_path), *missing]
    environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": "", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "cuda: torch finds no CUDA device here; use a model on the CPU"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_what_needs_cuda_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    model = Small()
    path = write_delta(tmp_path / "d.pxd", {name: t.detach() for name, t in named_tensors(model).items()})
    with VariantSwitch(model) as switch, pytest.raises(DeviceError, match=r'residency="gpu" needs .* CUDA device'):
        switch.add("v", path, "gpu")
    with VariantSwitch(model, base="pinned") as switch, pytest.raises(DeviceError, match=r'base="pinned" needs a CUDA'):
        switch.add("v", path)
    with pytest.raises(DeviceError, match=r'backend="triton" needs .* CUDA device'):
        serve(model, {"v": path}, backend="triton")
    monkeypatch.setattr(device, "find_spec", lambda _: None)
    with pytest.raises(DeviceError, match="need Triton, which is not installed: pip install triton"):
        device.require_triton()


@pytest.mark.parametrize(("free", "place"), [(10**9, "device"), (4000, "pinned")])
def test_the_base_is_kept_on_the_device_where_there_is_room(
    free: int, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Small()
    path = write_delta(tmp_path / "d.pxd", {name: t.detach() for name, t in named_tensors(model).items()})
    monkeypatch.setattr(HostDevice, "free_memory", lambda _: free)
    asked: list[bool] = []

    def copied(placement: Placement, *, pinned: bool) -> dict[ShardView, Tensor]:
        asked.append(pinned)
        return copy_aside(placement)

    monkeypatch.setattr(registry, "copy_aside", copied)
    with VariantSwitch(model) as switch:
        assert switch.base_place == "auto"
        switch.add("v", path)
        assert switch.base_place == place
    assert asked == [place == "pinned"]
