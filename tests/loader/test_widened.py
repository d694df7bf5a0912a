"""Tensors that a live model keeps in F32 over a base in BF16 or F16 are checked, rebuilt and restored exactly."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peraxis_format as pf
from peraxis_format.torch import SwapError, VariantSwitch, apply_, serve
from tests.loader.support import Small, bytes_of, named_tensors, write_delta

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
WIDE = ("norm.weight", "norm.bias", "second.weight")


def narrow_tensors(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.detach().to(dtype) for name, tensor in named_tensors(model).items()}


def widened(dtype: torch.dtype) -> nn.Module:
    """A model with the norm and a matrix in F32, as transformers keeps some modules. Casts connect the dtypes."""
    model = Small(dtype=dtype)
    model.norm.float()
    model.second.float()
    model.norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    model.second.register_forward_hook(lambda _, __, output: output.to(dtype))
    return model.eval()


def expected(model: nn.Module, path: Path, dtype: torch.dtype) -> nn.Module:
    """The same model with the weights of the reference arithmetic in the base's dtype."""
    plain = Small(dtype=dtype)
    plain.load_state_dict(narrow_tensors(model, dtype))
    apply_(plain, path)
    made = copy.deepcopy(model)
    made.load_state_dict(plain.state_dict())  # casts up
    return made


@HALVES
def test_a_widened_tensor_becomes_the_cast_of_the_rebuilt_one(dtype: torch.dtype, tmp_path: Path) -> None:
    model = widened(dtype)
    path = write_delta(tmp_path / "d.pxd", narrow_tensors(model, dtype))
    wanted = expected(model, path, dtype)
    places = {name: tensor.data_ptr() for name, tensor in named_tensors(model).items()}
    apply_(model, path)
    assert bytes_of(named_tensors(model)) == bytes_of(named_tensors(wanted))
    assert {name: tensor.data_ptr() for name, tensor in named_tensors(model).items()} == places
    assert {name for name, tensor in named_tensors(model).items() if tensor.dtype is torch.float32} == set(WIDE)


@HALVES
def test_a_switch_brings_widened_tensors_there_and_back(dtype: torch.dtype, tmp_path: Path) -> None:
    model = widened(dtype)
    base = narrow_tensors(model, dtype)
    before = bytes_of(named_tensors(model))
    paths = {str(i): write_delta(tmp_path / f"{i}.pxd", base, seed=i) for i in range(2)}
    wanted = {name: bytes_of(named_tensors(expected(model, path, dtype))) for name, path in paths.items()}
    with VariantSwitch(model) as switch:
        switch.add("0", paths["0"])
        switch.use("0")
        switch.add("1", paths["1"])  # checked against the kept base, not against the variant in use
        for name in ("1", None, "0", "1", None):
            switch.use(name)
            assert bytes_of(named_tensors(model)) == (before if name is None else wanted[name])


def test_a_failed_swap_puts_widened_tensors_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peraxis_format.torch.swap import switch as module

    model = widened(torch.bfloat16)
    before = bytes_of(named_tensors(model))
    path = write_delta(tmp_path / "d.pxd", narrow_tensors(model, torch.bfloat16))
    stream = module.stream

    def fails(*arguments: Any, **options: Any) -> None:
        stream(*arguments, **options)
        raise OSError("gone")

    with VariantSwitch(model) as switch:
        switch.add("v", path)
        monkeypatch.setattr(module, "stream", fails)
        with pytest.raises(SwapError):
            switch.use("v")
    assert bytes_of(named_tensors(model)) == before


@HALVES
@torch.no_grad()
def test_rows_are_served_with_widened_tensors_of_their_own(dtype: torch.dtype, tmp_path: Path) -> None:
    model = widened(dtype)
    path = write_delta(tmp_path / "d.pxd", narrow_tensors(model, dtype), same=("embed.weight", "first.weight"))
    ids = torch.randint(0, 37, (4, 5))
    base, tuned = model(ids), expected(model, path, dtype)(ids)
    with serve(model, {"v": path}) as served, served.using(["v", None, None, "v"]):
        mixed = model(ids)
    wanted = torch.stack([tuned[0], base[1], base[2], tuned[3]])
    torch.testing.assert_close(mixed, wanted, rtol=0, atol=2.0**-6 * float(wanted.abs().max()))
    assert float((tuned - base).abs().max()) > 2.0**-3 * float(wanted.abs().max())


@HALVES
def test_values_that_the_base_cannot_have_are_another_base(dtype: torch.dtype, tmp_path: Path) -> None:
    model = widened(dtype)
    path = write_delta(tmp_path / "d.pxd", narrow_tensors(model, dtype))
    with torch.no_grad():
        model.norm.weight[3] += 2.0**-20
    before = bytes_of(named_tensors(model))
    with pytest.raises(pf.BindingError, match=r"E404.*F32.*norm\.weight"):
        apply_(model, path)
    assert bytes_of(named_tensors(model)) == before


def test_another_base_is_noticed_in_a_widened_tensor(tmp_path: Path) -> None:
    model = widened(torch.bfloat16)
    path = write_delta(tmp_path / "d.pxd", narrow_tensors(model, torch.bfloat16))
    with torch.no_grad():
        model.norm.weight[3] = 2.0
    with pytest.raises(pf.BindingError, match=r"E404.*norm\.weight"):
        apply_(model, path)


def test_a_whole_model_in_f32_is_still_refused(tmp_path: Path) -> None:
    model = Small()
    path = write_delta(tmp_path / "d.pxd", narrow_tensors(model, torch.bfloat16))
    with pytest.raises(pf.BindingError, match=r"E403.*load the model with dtype=torch\.bfloat16"):
        apply_(model.float(), path)
