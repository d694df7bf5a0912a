"""VariantSwitch(base="undo") has the reference's bits after any swap and failure, without a copy of the base."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import peraxis_format as pf
from peraxis_format.torch import DeviceError, LiveModelError, SwapError, VariantSwitch
from peraxis_format.torch.swap import undo
from tests.loader.support import Small, base_of, bytes_of, expected_bytes, named_tensors, random_module, write_delta


def variants(folder: Path, base: dict[str, Tensor], count: int) -> dict[str | None, Path]:
    """Variants that change different modules by signs, by whole tensors, or not at all."""
    same = [(), ("second.weight", "norm.bias"), ("embed.weight",), ("first.weight", "first.bias", "head.weight")]
    full = [(), ("head.weight",), (), ("embed.weight",)]
    return {
        str(i): write_delta(folder / f"{i}.pxd", base, seed=i, components=1 + i % 3, same=same[i % 4], full=full[i % 4])
        for i in range(count)
    }


@pytest.fixture
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split each tensor into several stretches, so that errors occur between them."""
    monkeypatch.setattr(undo, "_STRETCH", 200)


@pytest.mark.usefixtures("short_stretches")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_random_swaps_end_in_the_bits_of_the_reference(dtype: torch.dtype, tmp_path: Path) -> None:
    model = Small(dtype=dtype)
    with torch.no_grad():  # values that arithmetic cannot restore
        model.embed.weight[:4, 0] = torch.tensor([float("nan"), float("inf"), -0.0, torch.finfo(dtype).max])
        model.first.weight[:, 1] *= 1e-4
    base = base_of(model)
    wanted = {None: bytes_of(base)}
    chooser = random.Random(5)
    with VariantSwitch(model, base="undo") as live:
        for name, path in variants(tmp_path, base, 4).items():
            live.add(str(name), path)
            wanted[name] = expected_bytes(path, base)
        assert live.base_place == "undo"
        assert (live.base_size, live.undo_size) == (0, 0)
        for _ in range(200):
            name = chooser.choice(list(wanted))
            swap = live.use(name)
            assert swap.name == live.current == name
            assert bytes_of(named_tensors(model)) == wanted[name]
        assert live.undo_size > 0
        live.use(None)
        assert bytes_of(named_tensors(model)) == wanted[None]


def test_no_copy_of_the_base_is_kept_and_the_log_is_small(tmp_path: Path) -> None:
    torch.manual_seed(0)
    live = {"w": torch.randn(1024, 1024).mul_(0.02).bfloat16()}
    base = {name: tensor.clone() for name, tensor in live.items()}
    module = rows_of_one_size(live["w"], 1e-4)
    path = tmp_path / "d.pxd"
    with pf.DeltaWriter(path, base=pf.Identity(id="b"), fine_tuned=pf.Identity(id="f")) as writer:
        writer.add(module)
        writer.finish()
    with VariantSwitch(live, base="undo") as switch:
        switch.add("d", path)
        switch.use("d")
        assert bytes_of(live) == expected_bytes(path, base)
        assert 0 < switch.undo_size < 0.06 * live["w"].nbytes
        assert not switch._registry.bases
        size = switch.undo_size
        for name in (None, "d", None):
            switch.use(name)
        assert switch.undo_size == size
        assert bytes_of(live) == bytes_of(base)


def rows_of_one_size(base: Tensor, size: float) -> pf.ModuleDelta:
    module = random_module("w", base, np.random.default_rng(0), [pf.Axis.ROW], pf.Encoding.SIGN)
    row, exponent = pf.encode_scales(np.full(base.shape[0], size))
    mask = module.components[0].mask
    component = pf.Component(axis=pf.Axis.ROW, exponent=exponent, mask=mask, row=row)
    return pf.ModuleDelta(
        name="w", shape=module.shape, dtype=module.dtype, encoding=module.encoding, base=module.base,
        components=(component,),
    )  # fmt: skip


@pytest.mark.usefixtures("short_stretches")
@pytest.mark.parametrize("previous", [None, "0"])
@pytest.mark.parametrize("moment", ["before the write", "half of it written"])
@pytest.mark.parametrize("nth", [0, 3, 10])
def test_a_failed_swap_goes_back_to_the_variant_before(
    previous: str | None, moment: str, nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Small()
    base = base_of(model)
    with VariantSwitch(model, base="undo") as live:
        for name, path in variants(tmp_path, base, 2).items():
            live.add(str(name), path)
        live.use(previous)
        before, epoch = bytes_of(named_tensors(model)), live.epoch
        plain, count = undo.InPlace._put, [0]

        def failing(self: Any, stretch: Any, i: int, *, old: Tensor, new: Tensor, applied: bool) -> None:
            count[0] += 1
            if count[0] != nth + 1:
                return plain(self, stretch, i, old=old, new=new, applied=applied)
            if moment == "half of it written":
                self._open[i] = old, not applied
                stretch.live[:1].copy_(new[:1])
            raise RuntimeError("the link is down")

        monkeypatch.setattr(undo.InPlace, "_put", failing)
        with pytest.raises(SwapError, match="link is down") as caught:
            live.use("1")
        assert caught.value.now == live.current == previous
        assert bytes_of(named_tensors(model)) == before
        assert live.epoch > epoch
        for name in ("1", None):
            live.use(name)
            wanted = expected_bytes(tmp_path / "1.pxd", base) if name else bytes_of(base)
            assert bytes_of(named_tensors(model)) == wanted


@pytest.mark.usefixtures("short_stretches")
def test_where_the_variant_before_cannot_be_had_the_model_is_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Small()
    base = base_of(model)
    with VariantSwitch(model, base="undo") as live:
        for name, path in variants(tmp_path, base, 2).items():
            live.add(str(name), path)
        live.use("0")

        def failing(*_: Any) -> None:
            raise RuntimeError("no kernel")

        monkeypatch.setattr(undo.InPlace, "_forward", failing)
        with pytest.raises(SwapError, match="the model is the base") as caught:
            live.use("1")
        assert caught.value.now is live.current is None
        assert bytes_of(named_tensors(model)) == bytes_of(base)


def test_what_cannot_be_taken_back_at_all_is_said_and_nothing_more_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Small()
    with VariantSwitch(model, base="undo") as live:
        live.add("0", write_delta(tmp_path / "d.pxd", base_of(model)))

        def failing(*_: Any) -> int:
            raise RuntimeError("the device is lost")

        monkeypatch.setattr(undo.InPlace, "write", failing)
        with pytest.raises(LiveModelError, match=r"neither the base's nor a variant's; load the base again"):
            live.use("0")
        with pytest.raises(LiveModelError, match="load the base again"):
            live.use(None)


@pytest.mark.parametrize("at", [None, "v"])
def test_weights_that_somebody_else_wrote_are_refused_and_not_spread(at: str | None, tmp_path: Path) -> None:
    model = Small()
    path = write_delta(tmp_path / "d.pxd", base_of(model))
    with VariantSwitch(model, base="undo") as live:
        live.add("v", path)
        live.use("v")
        live.use(at)
        # torch does not see this write: the version counter does not change.
        model.second.weight.data[3, 3] += 1
        before = bytes_of(named_tensors(model))
        with pytest.raises(SwapError, match=r"second\.weight: was written by other code") as caught:
            live.use(None if at else "v")
        assert caught.value.now == live.current == at
        assert bytes_of(named_tensors(model)) == before
        with torch.no_grad():
            model.head.weight[0, 0] += 1
        for overwrite in (False, True):
            with pytest.raises(LiveModelError, match=r"head\.weight: was written .* keeps no copy"):
                live.use(None if at else "v", overwrite=overwrite)
        with pytest.raises(LiveModelError, match=r"head\.weight: was written .* keeps no copy"):
            live.add("w", path)


def test_variants_are_registered_while_another_one_is_in_use(tmp_path: Path) -> None:
    model = Small()
    base = base_of(model)
    paths = variants(tmp_path, base, 3)
    other = write_delta(tmp_path / "other.pxd", base_of(Small(seed=9)))
    with VariantSwitch(model, base="undo") as live:
        live.add("0", paths["0"])
        live.use("0")
        live.add("1", paths["1"])
        with pytest.raises(pf.BindingError, match="E404"):
            live.add("other", other)
        live.use("1")
        live.remove("0")
        live.add("0", paths["0"])
        live.use("0")
        assert bytes_of(named_tensors(model)) == expected_bytes(paths["0"], base)


@pytest.mark.parametrize("residency", ["file", "gpu"])
def test_payloads_stay_in_host_memory(residency: Any, tmp_path: Path) -> None:
    model = Small()
    path = write_delta(tmp_path / "d.pxd", base_of(model))
    with VariantSwitch(model, base="undo") as live:
        with pytest.raises(DeviceError, match='use residency="pinned"'):
            live.add("v", path, residency)
        assert live.add("v", path).residency == "pinned"


def test_tied_strided_and_widened_weights_are_taken_back_too(tmp_path: Path) -> None:
    model = Small()
    base = base_of(model)
    live = {name: tensor.clone() for name, tensor in base.items()}
    turned = live.pop("second.weight").t().contiguous()
    live["norm.weight"] = live["norm.weight"].float()
    with VariantSwitch(live, views={"second.weight": turned.t()}, base="undo") as switch:
        for name, path in variants(tmp_path, base, 3).items():
            switch.add(str(name), path)
        for name in ("0", "1", None, "2", "1"):
            switch.use(name)
            wanted = bytes_of(base) if name is None else expected_bytes(tmp_path / f"{name}.pxd", base)
            held = {**live, "second.weight": turned.t(), "norm.weight": live["norm.weight"].bfloat16()}
            assert bytes_of(held) == wanted


@pytest.mark.cuda
def test_swaps_on_a_gpu_end_in_the_bits_of_the_reference(tmp_path: Path) -> None:
    model = Small().cuda()
    base = {name: tensor.cpu() for name, tensor in base_of(model).items()}
    wanted = {None: bytes_of(base)}
    with VariantSwitch(model, base="undo") as live:
        for name, path in variants(tmp_path, base, 3).items():
            live.add(str(name), path)
            wanted[name] = expected_bytes(path, base)
        for name in ("0", "1", None, "2", "0", None):
            live.use(name)
            assert bytes_of({n: tensor.cpu() for n, tensor in named_tensors(model).items()}) == wanted[name]
