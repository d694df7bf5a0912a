"""What a byte budget is spent by: the price of each number of masks, and one mask for all before a second for any."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import peraxis_format as pxd
from peraxis_format import Encoding, Safetensors
from peraxis_tools.checkpoints.checkpoint import open_checkpoint
from peraxis_tools.compress.options import CompressOptions
from peraxis_tools.compress.plan import price
from peraxis_tools.compress.plan.budget import spend
from peraxis_tools.compress.plan.pair_plan import plan_pair
from peraxis_tools.compress.plan.plan import Plan, PlannedModule, plan
from peraxis_tools.compress.plan.price import MASKS_MAX, extended, prices, shares_left
from peraxis_tools.compress.plan.sensitivity import fitted_errors
from peraxis_tools.compress.plan.size import predicted_size
from tests.tools.compress_pairs import llama_pair

HALF = torch.bfloat16


def opened(folder: Path, pair: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> tuple[Safetensors, Safetensors, Plan]:
    for side in (0, 1):
        save_file({name: both[side].contiguous() for name, both in pair.items()}, folder / f"{side}.safetensors")
    base, tuned = (Safetensors.open(folder / f"{side}.safetensors") for side in (0, 1))
    planned = plan(
        fine_tuned={info.name: info for info in tuned.infos()},
        base={info.name: info for info in base.infos()},
        options=CompressOptions(),
    )
    return base, tuned, planned


def drawn(rows: int, width: int, seed: int, size: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, width, generator=g)
    return base.to(HALF), (base + size * torch.randn(rows, width, generator=g)).to(HALF)


def module(planned: Plan, name: str) -> PlannedModule:
    return next(m for m in planned.modules if m.name == name)


def test_each_mask_leaves_less_and_an_unchanged_module_costs_nothing(tmp_path: Path) -> None:
    same = drawn(64, 64, 1)[0]
    names = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")
    base, tuned, planned = opened(
        tmp_path, {names[0]: drawn(96, 64, 2), names[1]: drawn(64, 64, 3), names[2]: (same,) * 2}
    )
    found = prices(planned.modules, base, tuned)
    for name in names[:2]:
        assert all(a > b > 0 for a, b in zip(found[name], found[name][1:], strict=False))
        assert len(found[name]) == MASKS_MAX + 1
    assert found[names[2]] == [0.0] * (MASKS_MAX + 1)
    assert found[names[0]][0] == pytest.approx(4 * 96 * 64)


def test_a_mask_that_rounding_removes_is_worth_nothing(tmp_path: Path) -> None:
    base = torch.ones(64, 64, dtype=HALF)
    tuned = base.clone()
    tuned[:, ::8] += 2.0**-7  # one unit in an eighth of the weights: mean |delta| is an eighth of a unit
    name = "model.embed_tokens.weight"
    left, right, planned = opened(tmp_path, {name: (base, tuned)})
    one = replace(module(planned, name), axis=pxd.Axis.TENSOR)
    assert shares_left(one, left, right)[:2] == [1.0, 1.0]
    # By columns, the scale is that of the columns that changed.
    assert shares_left(replace(one, axis=pxd.Axis.COL), left, right)[1] == 0.0


def test_a_sample_of_the_rows_stands_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    base, tuned, planned = opened(tmp_path, {name: drawn(1024, 96, 5)})
    some = shares_left(module(planned, name), base, tuned)
    monkeypatch.setattr(price, "PRICED_ROWS", 1024)
    assert some[1:4] == pytest.approx(shares_left(module(planned, name), base, tuned)[1:4], rel=0.1)


def test_errors_are_extended_by_their_last_share_and_never_rise() -> None:
    assert extended([8.0, 4.0, 2.0]) == [8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125]
    assert extended([1.0, 2.0]) == [1.0] * 9
    assert extended([0.0]) == [0.0] * 9


def test_the_cost_in_kl_is_that_of_scales_that_a_fit_will_choose() -> None:
    g = np.random.Generator(np.random.PCG64(0))
    whole = g.standard_normal(16)
    # A third of the delta along each gradient is restored, so that a scale of three restores all.
    products = np.stack([whole, whole * 2 / 3, whole / 3 + 0.1 * g.standard_normal(16)], axis=1)
    found = fitted_errors(products)
    assert found[0] == pytest.approx(np.square(whole).mean())
    assert found[1] == pytest.approx(0.0, abs=1e-12)
    assert all(error <= np.square(left).mean() for error, left in zip(found, products.T, strict=True))


@contextmanager
def one_mask_each(folder: Path) -> Iterator[tuple[Plan, CompressOptions]]:
    """The plan of a small pair with one mask a module, tables included; its fine-tune, and the options."""
    left, right, _ = llama_pair(folder)
    options = CompressOptions(embeddings="sign")
    with open_checkpoint(left) as base, open_checkpoint(right) as tuned:
        yield plan_pair(base, tuned, options), options


def test_all_changed_modules_get_one_mask_before_any_gets_two(tmp_path: Path) -> None:
    with one_mask_each(tmp_path) as (planned, options):
        signed = [m.name for m in planned.modules if m.encoding is Encoding.SIGN]
        # Estimates that know of one module alone.
        errors = {name: extended([1.0, 0.999]) for name in signed} | {signed[0]: extended([1e6, 1e5])}
        one = predicted_size(planned, options)

        def bare(target: int) -> int:
            spent = spend(planned, errors, replace(options, target_size=target))
            assert predicted_size(spent, options) <= target
            first = module(spent, signed[0])
            assert first.encoding is Encoding.FULL or first.components > 1
            return sum(m.encoding is Encoding.SAME for m in spent.modules if m.name in errors)

        assert bare(one + 8000) == 0
        assert bare(one - 2000) > 0


def test_every_target_is_used_up_to_one_step_and_the_padding_of_the_header(tmp_path: Path) -> None:
    with one_mask_each(tmp_path) as (planned, options):
        errors = {
            m.name: extended([1.0 + i, (1.0 + i) / 3])
            for i, m in enumerate(planned.modules)
            if m.encoding is Encoding.SIGN
        }
        one = predicted_size(planned, options)
        step = max(m.payload_bytes for m in planned.modules if m.name in errors)  # a further mask, at most
        whole = planned.full_bytes + one - planned.payload_bytes
        for target in range(one, whole, max(1, (whole - one) // 60)):
            spent = spend(planned, errors, replace(options, target_size=target))
            left_over = target - predicted_size(spent, options)
            exact = all(m.encoding is Encoding.FULL for m in spent.modules)
            assert 0 <= left_over <= step + 4096 or exact, target


def test_masks_that_make_a_weight_infinite_are_never_bought() -> None:
    inf = math.inf
    assert extended([1.0, inf, inf, 0.3]) == [1.0, inf, inf, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3]
    assert extended([1.0, 0.5, inf, inf]) == [1.0, 0.5, *[inf] * 7]
    assert extended([1.0, 0.5, 0.7, 0.25])[:4] == [1.0, 0.5, 0.5, 0.25]
