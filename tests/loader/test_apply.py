"""apply_ writes the bits of the reference into the existing storage, or changes nothing."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import peraxis_format as pf
from peraxis_format.torch import LiveModelError, apply_
from peraxis_format.torch.device import HostDevice
from peraxis_format.torch.place import binding, digests
from peraxis_format.torch.ring import Ring
from peraxis_format.torch.swap.engine import HostEngine
from tests.loader.support import AXES, Small, base_of, bytes_of, expected_bytes, named_tensors, refused, write_delta


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("undo", ["device", "host"])
def test_applied_weights_have_the_bits_of_the_reference(
    dtype: torch.dtype, axis: pf.Axis, backend: str, undo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(backend)
    monkeypatch.setenv("PERAXIS_BACKEND", backend)
    model = Small(dtype=dtype)
    base = base_of(model)
    path = write_delta(tmp_path / "d.pxd", base, axes=(axis, pf.Axis.ROW))
    pointers = {name: tensor.data_ptr() for name, tensor in named_tensors(model).items()}
    applied = apply_(model, path, undo=undo)
    assert bytes_of(named_tensors(model)) == expected_bytes(path, base)
    assert pointers == {name: tensor.data_ptr() for name, tensor in named_tensors(model).items()}
    assert applied.modules == len(base)


def test_a_state_dict_is_written_in_place_and_tied_weights_once(tmp_path: Path) -> None:
    model = Small(tied=True)
    base = base_of(model)
    path = write_delta(tmp_path / "d.pxd", base, tied={"head.weight": "embed.weight"}, components=2)
    state = model.state_dict()
    applied = apply_(state, path)
    assert bytes_of(named_tensors(model)) == expected_bytes(path, base)
    assert applied.uploads == 1
    assert model.head.weight is model.embed.weight


def test_an_alias_with_storage_of_its_own_is_written_too(tmp_path: Path) -> None:
    model = Small(tied=False)
    model.head.weight.data.copy_(model.embed.weight.data)
    base = base_of(model)
    path = write_delta(tmp_path / "d.pxd", base, tied={"head.weight": "embed.weight"})
    apply_(model, path)
    assert bytes_of(named_tensors(model)) == expected_bytes(path, base)
    assert model.head.weight.data_ptr() != model.embed.weight.data_ptr()


def test_another_base_is_refused_before_the_first_write(tmp_path: Path) -> None:
    model = Small()
    base = base_of(model)
    path = write_delta(tmp_path / "d.pxd", base)
    other = Small(seed=1)
    refused(other, path, pf.BindingError, "E404")
    one_bit = base_of(model)
    one_bit["second.weight"].view(torch.int16)[3, 5] ^= 1
    refused(one_bit, path, pf.BindingError, r"E404.*second\.weight")
    refused({k: v for k, v in base.items() if k != "norm.bias"}, path, pf.BindingError, r"E402.*norm\.bias")
    refused({f"x.{k}": v for k, v in base.items()}, path, pf.BindingError, "E401")
    refused({**base, "norm.bias": base["norm.bias"].half()}, path, pf.BindingError, r"E403.*norm\.bias")


def test_a_second_apply_meets_the_fine_tune_and_not_the_base(tmp_path: Path) -> None:
    model = Small()
    path = write_delta(tmp_path / "d.pxd", base_of(model))
    apply_(model, path)
    refused(model, path, pf.BindingError, "E404")


def test_a_damaged_file_leaves_the_base(tmp_path: Path) -> None:
    model = Small()
    path = write_delta(tmp_path / "d.pxd", base_of(model))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(model, path, pf.PayloadError, r"E301: .*d\.pxd")


def test_a_pad_that_is_not_zero_is_refused(tmp_path: Path) -> None:
    model = Small()
    path = write_delta(tmp_path / "d.pxd", base_of(model))
    with pf.open(path) as delta:
        module_ends = {delta.span(name)[1] for name in delta}
        begin = next(
            delta.header_size + r.begin for r in delta.records
            if r.name.startswith("__pad__.") and delta.header_size + r.begin in module_ends
        )  # fmt: skip
    data = bytearray(path.read_bytes())
    data[begin] = 1  # between two modules, so no module's digest covers it
    path.write_bytes(data)
    refused(model, path, pf.PayloadError, "E304")


@pytest.mark.parametrize("undo", ["device", "host"])
@pytest.mark.parametrize("nth", [0, 3, 6])
def test_an_error_while_writing_puts_the_old_weights_back(
    nth: int, undo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Small()
    path = write_delta(tmp_path / "d.pxd", base_of(model))
    plain, count = HostEngine._storage_jobs, [0]

    def failing(self: HostEngine, *args: Any) -> Any:
        count[0] += 1
        if count[0] > nth:
            raise OSError("no more")
        jobs = list(plain(self, *args))
        for job in jobs:
            job()  # already written when the next one fails
        return iter(())

    monkeypatch.setattr(HostEngine, "_storage_jobs", failing)
    refused(model, path, OSError, "no more", undo=undo)


def test_a_base_is_hashed_once_and_again_only_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Small()
    path = write_delta(tmp_path / "d.pxd", base_of(model))
    hashed: list[int] = []
    plain = digests.as_bytes

    def counted(tensor: Tensor) -> Tensor:
        hashed.append(1)
        return plain(tensor)

    monkeypatch.setattr(digests, "as_bytes", counted)
    ring = Ring(HostDevice())
    with pf.open(path) as delta:
        placement = pf_place(model, delta.manifest)
        binding.check_live(delta.manifest, placement, ring=ring)
        first = len(hashed)
        binding.check_live(delta.manifest, placement, ring=ring)
        assert len(hashed) == first == len(placement)
        with torch.no_grad():
            model.first.weight[0, 0] += 1
        with pytest.raises(pf.BindingError, match=r"E404.*first\.weight"):
            binding.check_live(delta.manifest, placement, ring=ring)
        assert len(hashed) == first + 1


def pf_place(model: nn.Module, manifest: pf.Manifest) -> Any:
    from peraxis_format.torch import place

    return place(model, manifest)


class Fused(nn.Module):
    """A runtime's model, which fuses q, k, v into one parameter and gate, up into another."""

    def __init__(self, base: dict[str, Tensor]) -> None:
        super().__init__()
        self.qkv_proj = nn.Linear(16, 40, bias=True, dtype=torch.bfloat16)
        self.gate_up_proj = nn.Linear(16, 42, bias=False, dtype=torch.bfloat16)
        self.qkv_proj.weight.data = torch.cat([base[f"{n}_proj.weight"] for n in "qkv"])
        self.qkv_proj.bias.data = torch.cat([base[f"{n}_proj.bias"] for n in "qkv"])
        self.gate_up_proj.weight.data = torch.cat([base["gate_proj.weight"], base["up_proj.weight"]])


def fused_base() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {
        "q_proj.weight": (24, 16), "q_proj.bias": (24,), "k_proj.weight": (8, 16), "k_proj.bias": (8,),
        "v_proj.weight": (8, 16), "v_proj.bias": (8,), "gate_proj.weight": (21, 16), "up_proj.weight": (21, 16),
    }  # fmt: skip
    return {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}


def test_rows_of_fused_parameters_get_their_own_modules_with_their_own_axes(tmp_path: Path) -> None:
    base = fused_base()
    path = write_delta(tmp_path / "d.pxd", base)
    model = Fused(base)
    apply_(model, path)
    wanted = expected_bytes(path, base)
    assert bytes_of({"w": model.qkv_proj.weight})["w"] == b"".join(wanted[f"{n}_proj.weight"] for n in "qkv")
    assert bytes_of({"b": model.qkv_proj.bias})["b"] == b"".join(wanted[f"{n}_proj.bias"] for n in "qkv")
    gate_up = wanted["gate_proj.weight"] + wanted["up_proj.weight"]
    assert bytes_of({"w": model.gate_up_proj.weight})["w"] == gate_up


def test_a_transposed_layout_is_reached_through_a_view(tmp_path: Path) -> None:
    base = {"w": torch.randn(24, 17).bfloat16()}
    path = write_delta(tmp_path / "d.pxd", base)
    for undo in ("device", "host"):
        live = base["w"].t().contiguous()
        apply_({}, path, views={"w": live.t()}, undo=undo)
        assert bytes_of({"w": live.t()}) == expected_bytes(path, base)


def test_what_cannot_hold_the_fine_tune_is_refused(tmp_path: Path) -> None:
    model = Small()
    base = base_of(model)
    path = write_delta(tmp_path / "d.pxd", base)
    quantised = copy.deepcopy(model)
    quantised.hf_quantizer = object()
    refused(quantised, path, LiveModelError, "quantised")
    with torch.device("meta"):
        empty = Small()
    with pytest.raises(LiveModelError, match="meta"):
        apply_(empty, path)
    longer = pf.ModuleDelta(
        name="w", shape=(3, 8), dtype=pf.DType.BF16, encoding=pf.Encoding.FULL,
        full=np.zeros((3, 8), np.uint16),
        base=pf.BaseRef(dtype=pf.DType.BF16, shape=(2, 8), sha256="0" * 64),
    )  # fmt: skip
    with pf.DeltaWriter(
        tmp_path / "r.pxd", base=pf.Identity(id="b"), fine_tuned=pf.Identity(id="f")
    ) as writer:  # fmt: skip
        writer.add(longer)
        writer.drop("gone")
        writer.finish()
    refused({"w": torch.zeros(2, 8).bfloat16()}, tmp_path / "r.pxd", LiveModelError, "storage cannot change in place")


def test_a_part_of_a_delta_is_refused(tmp_path: Path) -> None:
    from peraxis_tools.split import split

    model = Small()
    whole = write_delta(tmp_path / "whole.pxd", base_of(model))
    parts = split(whole, tmp_path / "parts", parts=2).parts
    refused(model, parts[0].path, LiveModelError, "part of a delta")


def test_modules_that_share_storage_but_differ_are_refused(tmp_path: Path) -> None:
    model = Small(tied=True)
    path = write_delta(tmp_path / "d.pxd", base_of(model))
    refused(model, path, LiveModelError, "share storage")


def test_another_base_leaves_no_thread_however_long_its_error_lives(tmp_path: Path) -> None:
    path = write_delta(tmp_path / "d.pxd", base_of(Small()))
    before = set(threading.enumerate())
    with pytest.raises(pf.BindingError, match="E404") as error:
        apply_(Small(seed=5), path, workers=2)
    assert set(threading.enumerate()) <= before
    assert error.value.__traceback__ is not None  # keeps the frames and their variables alive
