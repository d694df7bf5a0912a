"""On the CPU a swap of a payload in memory neither copies nor plans: registration does both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from peraxis_format.torch import VariantSwitch
from peraxis_format.torch.swap.engine import HostEngine
from tests.loader.support import bytes_of, expected_bytes, write_delta


def base() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"up.weight": (300, 72), "norm.weight": (24,), "experts.weight": (3, 40, 24)}
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


def test_a_swap_of_a_payload_in_memory_only_runs_what_was_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = write_delta(tmp_path / "one.pxd", base(), components=2)
    two = write_delta(tmp_path / "two.pxd", base(), seed=5)
    live = base()
    with VariantSwitch(live, workers=2) as switch:
        for name, path in (("one", one), ("two", two)):
            switch.add(name, path, "pinned")

        def planned(*_: Any) -> None:
            raise AssertionError("a swap plans its work")

        monkeypatch.setattr(HostEngine, "_jobs", planned)
        assert switch._registry.ring is not None
        for slot in switch._registry.ring.slots:
            slot.fill_(255)
        for name, path in (("one", one), ("two", two), ("one", one)):
            switch.use(name)
            assert bytes_of(live) == expected_bytes(path, base())
            assert all(bool((slot == 255).all()) for slot in switch._registry.ring.slots)
        switch.use(None)
        assert bytes_of(live) == bytes_of(base())


def test_a_payload_that_is_read_at_each_swap_is_planned_at_each(tmp_path: Path) -> None:
    one = write_delta(tmp_path / "one.pxd", base(), components=2)
    live = base()
    with VariantSwitch(live, workers=2) as switch:
        switch.add("one", one, "file")
        for _ in range(2):
            switch.use("one")
            assert bytes_of(live) == expected_bytes(one, base())
            switch.use(None)


@pytest.mark.parametrize("residency", ["pinned", "file"])
def test_what_a_swap_runs_is_compiled_when_the_variant_is_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, residency: Any
) -> None:
    pytest.importorskip("numba")
    from peraxis_format.ops.rebuild.numba import _rebuild_rows

    monkeypatch.setenv("PERAXIS_BACKEND", "numba")
    components = {"pinned": 6, "file": 7}[residency]  # no other test has as many

    def compiled() -> list[Any]:
        return [signature for signature in _rebuild_rows.signatures if len(signature[2]) == components]

    path = write_delta(tmp_path / "many.pxd", base(), components=components)
    live = base()
    with VariantSwitch(live, workers=1) as switch:
        switch.add("many", path, residency)
        (before,) = compiled()
        switch.use("many")
        assert bytes_of(live) == expected_bytes(path, base())
        assert compiled() == [before]
