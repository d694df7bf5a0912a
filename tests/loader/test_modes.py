"""Inference mode, around any of the calls and in any combination, changes no outcome."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peraxis_format.torch import VariantSwitch, apply_, serve
from peraxis_format.torch.updates import UpdateWriter, follow
from tests.loader.support import Small, base_of, bytes_of, expected_bytes, write_delta
from tests.loader.test_exact_variants import write_mixed

MODES = [pytest.param(torch.inference_mode, id="inference"), pytest.param(contextlib.nullcontext, id="ordinary")]
Mode = Callable[[], Any]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Variants of Small: of signs, and of signs and exact tensors."""
    folder, base = tmp_path_factory.mktemp("modes"), base_of(Small())
    mixed = write_mixed(folder / "b.pxd", base, 3, ("embed.weight", "first.weight"))
    return {"a": write_delta(folder / "a.pxd", base, seed=1), "b": mixed}


@pytest.fixture(scope="module")
def wanted(paths: dict[str, Path]) -> dict[str | None, dict[str, bytes]]:
    base = base_of(Small())
    return {None: bytes_of(base)} | {name: expected_bytes(path, base) for name, path in paths.items()}


def loaded(mode: Mode, device: str) -> Small:
    with mode():
        return Small().to(device)


def held(model: Small) -> dict[str, bytes]:
    copies: dict[str, Tensor] = {name: tensor.cpu() for name, tensor in base_of(model).items()}
    return bytes_of(copies)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("place", ["device", "undo"])
@pytest.mark.parametrize("load", MODES)
@pytest.mark.parametrize("add", MODES)
def test_variants_are_added_and_used_in_any_mode(
    load: Mode, add: Mode, place: Any, device: str, paths: dict[str, Path], wanted: dict[str | None, dict[str, bytes]]
) -> None:
    model = loaded(load, device)
    with add():
        switch = VariantSwitch(model, base=place)
        for name, path in paths.items():
            switch.add(name, path)
    with switch:
        for turn, name in enumerate(("a", "b", None, "b", "a")):
            with contextlib.nullcontext() if turn % 2 else torch.inference_mode():
                switch.use(name)
            assert held(model) == wanted[name]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("load", MODES)
@pytest.mark.parametrize("call", MODES)
def test_a_delta_is_applied_in_any_mode(
    load: Mode, call: Mode, device: str, paths: dict[str, Path], wanted: dict[str | None, dict[str, bytes]]
) -> None:
    for name, path in paths.items():
        model = loaded(load, device)
        with call():
            apply_(model, path)
        assert held(model) == wanted[name]


@pytest.mark.parametrize("device", DEVICES)
def test_updates_are_written_and_followed_in_any_mode(device: str, tmp_path: Path) -> None:
    modes: list[Mode] = [torch.inference_mode, contextlib.nullcontext]
    for i, (load, write, poll) in enumerate(product(modes, repeat=3)):
        model, live = loaded(load, device), loaded(load, device)
        with write():
            writer = UpdateWriter(model, tmp_path / str(i))
        follower = follow(live, tmp_path / str(i))
        for _ in range(3):
            with write():
                writer.step()
            with poll():
                follower.poll()
            assert held(live) == held(model)
            with torch.inference_mode():
                for parameter in model.parameters():
                    parameter.mul_(1.01)


@pytest.mark.parametrize("create", MODES)
def test_a_server_answers_in_any_mode(create: Mode, paths: dict[str, Path]) -> None:
    model, ids = Small(), torch.randint(0, 37, (2, 70))
    whole = []
    for path in paths.values():
        apply_(merged := Small(), path)
        whole.append(merged(ids[:1]))
    with create():
        served = serve(model, paths)
    with served, served.using(["a", "b"]):
        for ask in (torch.inference_mode, contextlib.nullcontext, torch.inference_mode):
            with ask():
                found = model(ids[:1].repeat(2, 1))
            torch.testing.assert_close(found, torch.cat(whole), rtol=0.03, atol=0.03)
