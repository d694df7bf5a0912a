"""Exact tensors and undo logs on a GPU have the bits of the reference."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from peraxis_format.torch import VariantSwitch, apply_, serve
from peraxis_format.torch.swap import undo
from tests.loader.support import bytes_of, expected_bytes, named_tensors
from tests.loader.test_cuda import on_host
from tests.loader.test_exact_variants import EXACT, Larger, write_mixed

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("keep", ["device", "host"])
def test_applied_exact_tensors_have_the_bits_of_the_reference(dtype: torch.dtype, keep: Any, tmp_path: Path) -> None:
    model = Larger(dtype=dtype)
    base = on_host(model)
    path = write_mixed(tmp_path / "d.pxd", base)
    apply_(model.cuda(), path, undo=keep)
    assert bytes_of(on_host(model)) == expected_bytes(path, base)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("place", "small"), [("device", False), ("pinned", False), ("undo", False), ("undo", True)])
def test_random_swaps_to_exact_variants_have_the_bits_of_the_reference(
    place: Any, small: bool, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small:
        monkeypatch.setattr(undo, "_STRETCH", 1 << 12)  # several stretches a tensor
    model = Larger(tied=tied)
    base = on_host(model)
    every = tuple(name for name in base if name != "head.weight" or not tied)
    model.cuda()
    wanted = {None: bytes_of(base)}
    with VariantSwitch(model, base=place) as switch:
        residencies: list[Any] = ["pinned"] * 3 if place == "undo" else ["pinned", "file", "gpu"]
        for seed, (name, exact) in enumerate({"a": EXACT, "b": ("second.weight", "norm.bias"), "c": every}.items()):
            path = write_mixed(tmp_path / f"{name}.pxd", base, 10 * seed, exact, tied=tied)
            switch.add(name, path, residencies[seed])
            wanted[name] = expected_bytes(path, base)
        chooser = random.Random(3)
        for _ in range(30):
            chosen = chooser.choice(list(wanted))
            switch.use(chosen)
            assert bytes_of(on_host(model)) == wanted[chosen]
        switch.use(None)
        assert bytes_of(on_host(model)) == wanted[None]


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_a_mixed_batch_serves_exact_tensors_as_the_merged_model_has_them(tied: bool, tmp_path: Path) -> None:
    model = Larger(tied=tied)
    base = on_host(model)
    model.cuda()
    every = tuple(name for name in base if name != "head.weight" or not tied)
    paths = {
        "mixed": write_mixed(tmp_path / "a.pxd", base, 0, EXACT, tied=tied),
        "all": write_mixed(tmp_path / "b.pxd", base, 7, every, tied=tied),
    }
    ids = torch.randint(0, 37, (3, 70), device="cuda")
    whole = []
    for i, name in enumerate(("mixed", None, "all")):
        merged = Larger(tied=tied).cuda()
        assert bytes_of(on_host(merged)) == bytes_of(base)
        if name is not None:
            apply_(merged, paths[name])
        whole.append(merged(ids[i : i + 1]))
    with serve(model, paths) as served, served.using(["mixed", None, "all"]):
        found = model(ids)
    torch.testing.assert_close(found, torch.cat(whole), rtol=0.03, atol=0.03)
    assert bytes_of({name: tensor.cpu() for name, tensor in named_tensors(model).items()}) == bytes_of(base)
