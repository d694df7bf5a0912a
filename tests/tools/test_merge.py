"""Sums of `merge` equal dense arithmetic within the stated bounds, and a missing base is reported before any work."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import peraxis_format as pxd
from peraxis_tools.chain import update
from peraxis_tools.commands.merge import command
from peraxis_tools.deltas.fold import fold
from peraxis_tools.errors import CheckFailedError, ToolError
from peraxis_tools.merge import Mixture, merge
from peraxis_tools.split import split
from tests.factories import random_storage, sign_module, write_checkpoint, write_delta
from tests.tools.merge_pairs import AXES, BF16, SHAPES, dense, exact, pair_of_deltas

WEIGHTS = st.floats(-4, 4, allow_nan=False).filter(lambda w: abs(w) > 1e-3)


def fold_bound(module: pxd.ModuleDelta, weight: float) -> np.ndarray:
    """Return the bound on the change by folding this weight, by the formula of merge/fold.py."""
    total = np.zeros(module.covered)
    for c in module.components:
        one = dense(replace(module, components=(c,)))
        vector = next(iter(c.scales().values())).astype(np.float64)
        col = 1.0 if c.axis is not pxd.Axis.ROW_COL else c.col.astype(np.float64)[..., None, :]
        largest = vector.max() * 2.0**c.exponent * col
        total += 2.0**-11 * abs(weight) * (np.abs(one) + 2.0**-28 * largest)
    return total


@given(st.integers(0, 2**32), SHAPES, st.sampled_from(list(pxd.Axis)), WEIGHTS)
@settings(max_examples=80)
def test_a_folded_component_is_the_weighted_one_within_the_bound(seed, shape, axis, weight) -> None:
    rng = np.random.default_rng(seed)
    module = sign_module(rng, "m", random_storage(rng, shape), axes=(axis,))
    folded = replace(module, components=(fold(module.components[0], weight, shape[-1]),))
    assert np.all(np.abs(dense(folded) - weight * dense(module)) <= fold_bound(module, weight))


@given(st.integers(0, 2**32), st.sampled_from(list(pxd.Axis)), st.integers(-6, 6), st.sampled_from([-1.0, 1.0]))
def test_powers_of_two_fold_without_rounding(seed, axis, power, sign) -> None:
    rng = np.random.default_rng(seed)
    module = sign_module(rng, "m", random_storage(rng, (4, 11)), axes=(axis,))
    weight = sign * 2.0**power
    folded = replace(module, components=(fold(module.components[0], weight, 11),))
    assert np.array_equal(dense(folded), weight * dense(module))


@given(st.integers(0, 2**32), SHAPES, AXES, AXES, WEIGHTS, WEIGHTS)
@settings(max_examples=40)
def test_apply_of_a_merge_is_base_plus_the_weighted_deltas(
    tmp_path_factory, seed, shape, axes_a, axes_b, weight_a, weight_b
) -> None:
    folder = tmp_path_factory.mktemp("sum")
    base, a, b = pair_of_deltas(seed, shape, axes_a, axes_b)
    paths = [write_delta(folder / "a.pxd", [a]), write_delta(folder / "b.pxd", [b])]
    merge(paths, folder / "out.pxd", weights=[weight_a, weight_b])
    with pxd.open(folder / "out.pxd") as merged:
        weights = pxd.to_float32(pxd.reconstruct(merged.load("m.weight"), base), BF16).astype(np.float64)
        count = len(merged.entry("m.weight").components)
    assert count == len(axes_a) + len(axes_b)
    wanted = pxd.to_float32(base, BF16).astype(np.float64) + weight_a * dense(a) + weight_b * dense(b)
    terms = sum(
        abs(w) * np.abs(dense(replace(m, components=(c,))))
        for m, w in ((a, weight_a), (b, weight_b))
        for c in m.components
    )
    folded = fold_bound(a, weight_a) + fold_bound(b, weight_b)
    # The bound of the README: one F32 rounding for each component, then half a unit of BF16 (8 bits).
    added = count * 2.0**-23 * (np.abs(pxd.to_float32(base, BF16)) + terms)
    assert np.all(np.abs(weights - wanted) <= folded + added + 2.0**-8 * np.abs(weights) + 1e-38)


@given(st.integers(0, 2**32), WEIGHTS, WEIGHTS, st.sampled_from(["sum", "linear", "ties", "dare"]))
@settings(max_examples=20)
def test_the_order_of_the_inputs_changes_no_byte(tmp_path_factory, seed, weight_a, weight_b, method) -> None:
    folder = tmp_path_factory.mktemp("order")
    _, a, b = pair_of_deltas(seed, (9, 16), (pxd.Axis.ROW,), (pxd.Axis.COL,))
    paths = [write_delta(folder / "a.pxd", [a]), write_delta(folder / "b.pxd", [b])]
    merge(paths, folder / "1.pxd", weights=[weight_a, weight_b], mixture=Mixture(method=method))
    merge(paths[::-1], folder / "2.pxd", weights=[weight_b, weight_a], mixture=Mixture(method=method))
    assert (folder / "1.pxd").read_bytes() == (folder / "2.pxd").read_bytes()


def test_exact_tensors_merge_with_the_base_and_not_without(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base, x, y = (random_storage(rng, (33,)) for _ in range(3))
    checkpoint = write_checkpoint(tmp_path / "base", {"norm.weight": (base, BF16)})
    paths = [
        write_delta(tmp_path / name, [exact("norm.weight", base, value)])
        for name, value in (("a.pxd", x), ("b.pxd", y))
    ]
    with pytest.raises(ToolError, match=r"pass base \(--base\)"):
        merge(paths, tmp_path / "out.pxd", weights=[0.7, 0.6])
    merge(paths, tmp_path / "out.pxd", weights=[0.7, 0.6], base=checkpoint)
    with pxd.open(tmp_path / "out.pxd") as file:
        got = pxd.to_float32(file.load("norm.weight").full, BF16)
    fx, fy, fb = (pxd.to_float32(v, BF16).astype(np.float64) for v in (x, y, base))
    wanted = fb + 0.7 * (fx - fb) + 0.6 * (fy - fb)
    assert np.all(np.abs(got - wanted) <= 2.0**-8 * np.abs(wanted) + 1e-6)
    # The tensor is the same in both and the weights sum to one, so no base is needed and no bit changes.
    merge([paths[0], paths[0]], tmp_path / "same.pxd", weights=[0.25, 0.75])
    with pxd.open(tmp_path / "same.pxd") as file:
        assert np.array_equal(file.load("norm.weight").full, x)


def test_weighted_deltas_of_exact_tensors_keep_bits_that_binary32_differences_lose(tmp_path: Path) -> None:
    base, x, y = (np.full(8, value, np.float32) for value in (1e8, 1.0, 2.0))
    ref = pxd.BaseRef(dtype=pxd.DType.F32, shape=(8,), sha256=pxd.digest_of(base))
    checkpoint = write_checkpoint(tmp_path / "base", {"norm.weight": (base, pxd.DType.F32)})
    paths = []
    for i, value in enumerate((x, y)):
        module = pxd.ModuleDelta(
            name="norm.weight", shape=(8,), dtype=pxd.DType.F32, encoding=pxd.Encoding.FULL, base=ref, full=value
        )
        paths.append(write_delta(tmp_path / f"{i}.pxd", [module]))
    merge(paths, tmp_path / "out.pxd", weights=[0.5, 0.5], base=checkpoint)
    with pxd.open(tmp_path / "out.pxd") as file:
        assert np.all(pxd.to_float32(file.load("norm.weight").full, pxd.DType.F32) == 1.5)


@pytest.mark.parametrize("method", ["sum", "linear", "dare", "ties"])
def test_equal_infinities_of_base_and_inputs_stay(tmp_path: Path, method) -> None:
    base = np.array([np.inf, -np.inf, 1.0, 2.0], np.float32)
    ref = pxd.BaseRef(dtype=pxd.DType.F32, shape=(4,), sha256=pxd.digest_of(base))
    checkpoint = write_checkpoint(tmp_path / "base", {"norm.weight": (base, pxd.DType.F32)})
    paths = []
    for i in range(2):
        full = base + np.array([0, 0, i, 1], np.float32)
        module = pxd.ModuleDelta(
            name="norm.weight", shape=(4,), dtype=pxd.DType.F32, encoding=pxd.Encoding.FULL, base=ref, full=full
        )
        paths.append(write_delta(tmp_path / f"{i}.pxd", [module]))
    merge(paths, tmp_path / "out.pxd", weights=[0.5, 0.5], base=checkpoint, mixture=Mixture(method=method))
    with pxd.open(tmp_path / "out.pxd") as file:
        merged = pxd.to_float32(file.load("norm.weight").full, pxd.DType.F32)
    assert merged[:2].tolist() == [np.inf, -np.inf]
    assert np.all(np.isfinite(merged[2:]))


@pytest.mark.parametrize("method", ["sum", "ties", "dare"])
def test_a_base_that_is_needed_is_asked_for_before_any_work(tmp_path: Path, method) -> None:
    rng = np.random.default_rng(0)
    base, x, y = (random_storage(rng, (33,)) for _ in range(3))
    _, a, b = pair_of_deltas(1, (16, 24), (pxd.Axis.ROW,), (pxd.Axis.COL,))
    paths = [
        write_delta(tmp_path / f"{i}.pxd", [m, exact("norm.weight", base, value)])
        for i, (m, value) in enumerate(((a, x), (b, y)))
    ]
    with pxd.open(paths[0]) as file:
        begin = file.header_size
    data = bytearray(paths[0].read_bytes())
    data[begin] ^= 1  # reading the first module would report this
    paths[0].write_bytes(data)
    with pytest.raises(ToolError, match=r"norm\.weight.*--base"):
        merge(paths, tmp_path / "out.pxd", weights=[0.5, 0.5], mixture=Mixture(method=method))


def test_provenance_is_in_the_manifest(tmp_path: Path) -> None:
    _, a, b = pair_of_deltas(1, (4, 8), (pxd.Axis.ROW,), (pxd.Axis.ROW,))
    paths = [write_delta(tmp_path / "a.pxd", [a]), write_delta(tmp_path / "b.pxd", [b])]
    result = merge(paths, tmp_path / "out.pxd", weights=[0.7, -0.3])
    with pxd.open(tmp_path / "out.pxd") as file:
        recorded = json.loads(file.manifest.metadata["peraxis.inputs"])
    ids = []
    for path in paths:
        with pxd.open(path) as file:
            ids.append(file.content_id)
    assert {(r["content_id"], r["weight"]) for r in recorded} == {(ids[0], "0.7"), (ids[1], "-0.3")}
    assert {i.content_id for i in result.inputs} == set(ids)


def test_different_bases_too_many_masks_and_odd_weights_are_refused(tmp_path: Path) -> None:
    _, a, b = pair_of_deltas(1, (4, 8), (pxd.Axis.ROW,) * 5, (pxd.Axis.ROW,) * 4)
    _, other, _ = pair_of_deltas(2, (4, 8), (pxd.Axis.ROW,), (pxd.Axis.ROW,))
    paths = [write_delta(tmp_path / f"{i}.pxd", [m]) for i, m in enumerate((a, b, other))]
    with pytest.raises(CheckFailedError, match="different bases"):
        merge([paths[0], paths[2]], tmp_path / "x.pxd", weights=[1, 1])
    with pytest.raises(ToolError, match="9 masks"):
        merge(paths[:2], tmp_path / "x.pxd", weights=[1, 1])
    with pytest.raises(ToolError, match="one for each"):
        merge(paths[:2], tmp_path / "x.pxd", weights=[1])
    with pytest.raises(ToolError, match="must be 0, or"):
        merge(paths[:2], tmp_path / "x.pxd", weights=[1, float("nan")])
    assert not (tmp_path / "x.pxd").exists()


def test_a_merge_that_stores_most_tensors_whole_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The sum of an exact update and a delta of signs is exact, so it takes the bytes of a checkpoint."""
    base, a, b = pair_of_deltas(1, (64, 256), (pxd.Axis.ROW,), (pxd.Axis.COL,))
    checkpoint = write_checkpoint(tmp_path / "base", {"m.weight": (base, BF16)})
    whole = write_delta(tmp_path / "whole.pxd", [exact("m.weight", base, base ^ np.uint16(1))])
    signs = [write_delta(tmp_path / name, [module]) for name, module in (("a.pxd", a), ("b.pxd", b))]
    mixed = merge([whole, signs[0]], tmp_path / "mixed.pxd", weights=[1, 1], base=checkpoint)
    assert mixed.full_bytes == 2 * 64 * 256 < mixed.bytes
    assert f"takes {mixed.bytes} of {mixed.full_bytes} bytes, with 1 tensor stored whole" in caplog.text
    caplog.clear()
    merge(signs, tmp_path / "signs.pxd", weights=[1, 1])
    assert caplog.text == ""


def test_the_command_merges_and_says_so(tmp_path: Path) -> None:
    _, a, b = pair_of_deltas(1, (16, 24), (pxd.Axis.ROW,), (pxd.Axis.COL,))
    paths = [str(write_delta(tmp_path / name, [m])) for name, m in (("a.pxd", a), ("b.pxd", b))]
    out = str(tmp_path / "out.pxd")
    shown = CliRunner().invoke(command, [*paths, "--weights", "0.7,0.3", "-o", out, "--json"])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["kind"] == "sum"
    fitted = CliRunner().invoke(command, [*paths, "--method", "ties", "--masks", "2", "-o", out, "--overwrite"])
    assert "relative error of the fit" in fitted.stdout


def test_a_merge_of_inputs_with_different_small_files_says_whose_it_takes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, a, b = pair_of_deltas(3, (8, 16), (pxd.Axis.ROW,), (pxd.Axis.ROW,))
    same = {"config.json": b"{}"}
    first = write_delta(tmp_path / "a.pxd", [a], assets=same | {"tokenizer.json": b"{1}"})
    second = write_delta(tmp_path / "b.pxd", [b], assets=same | {"tokenizer.json": b"{2}"})
    merge([first, second], tmp_path / "m.pxd", weights=[0.4, 0.6])
    (told,) = (record.message for record in caplog.records if "small files" in record.message)
    assert "differ in tokenizer.json; " in told
    assert str(second) in told
    with pxd.open(tmp_path / "m.pxd") as file:
        assert file.asset("tokenizer.json") == b"{2}"
    caplog.clear()
    merge([first, first], tmp_path / "n.pxd", weights=[0.5, 0.5])
    assert not any("small files" in record.message for record in caplog.records)


def test_what_cannot_be_summed_is_called_what_it_is(tmp_path: Path) -> None:
    base, a, b = pair_of_deltas(3, (8, 16), (pxd.Axis.ROW,), (pxd.Axis.ROW,))
    first, second = write_delta(tmp_path / "a.pxd", [a]), write_delta(tmp_path / "b.pxd", [b])
    for name, value in (("base", base), ("next", base ^ np.uint16(1))):
        write_checkpoint(tmp_path / name, {"m": (value, pxd.DType.BF16)})
    update(tmp_path / "base", tmp_path / "next", tmp_path / "u.pxd")
    two = write_delta(tmp_path / "two.pxd", [a, replace(a, name="other")])
    part = split(two, tmp_path / "parts", parts=2).parts[0].path

    def said(*paths: Path) -> str:
        return str(CliRunner().invoke(command, [*map(str, paths), "-o", str(tmp_path / "m.pxd")]).exception)

    assert "these are whole deltas; pass --weights" in said(first, second)
    assert "updates of a chain; fold them with compact" in said(tmp_path / "u.pxd")
    assert f"{part}: is a part of a delta" in said(part, second)


def test_a_sum_that_the_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    paths = []
    for name, value in (("base", 40000.0), ("a", 60000.0), ("b", 64000.0)):
        write_checkpoint(tmp_path / name, {"m.weight": (np.full((8, 8), value, np.float16), pxd.DType.F16)})
        if name != "base":
            (tmp_path / f"{name}-chain").mkdir()
            paths.append(update(tmp_path / "base", tmp_path / name, tmp_path / f"{name}-chain" / "1.pxd").path)
    with pytest.raises(ToolError, match=r"m\.weight: a number of the sum is 84000, too large for F16"):
        merge(paths, tmp_path / "m.pxd", weights=[1.0, 1.0], base=tmp_path / "base", mixture=Mixture(normalize=False))
    merge(paths, tmp_path / "m.pxd", weights=[0.5, 0.5], base=tmp_path / "base")


def test_a_merge_of_updates_has_the_small_files_that_they_leave_to_the_base(tmp_path: Path) -> None:
    array = random_storage(np.random.default_rng(0), (8, 16))
    paths = []
    for i, name in enumerate(("base", "a", "b")):
        write_checkpoint(tmp_path / name, {"m.weight": (array ^ np.uint16(i), pxd.DType.BF16)})
        (tmp_path / name / "config.json").write_text(f'{{"number": {i}}}')
        (tmp_path / name / "tokenizer.json").write_text("{}")
        if name != "base":
            (tmp_path / f"{name}-chain").mkdir()
            paths.append(update(tmp_path / "base", tmp_path / name, tmp_path / f"{name}-chain" / "1.pxd").path)
    merge(paths, tmp_path / "m.pxd", weights=[0.7, 0.3], base=tmp_path / "base")
    with pxd.open(tmp_path / "m.pxd") as file:
        assert {asset.path: file.asset(asset.path) for asset in file.manifest.assets} == {
            "config.json": b'{"number": 1}',
            "tokenizer.json": b"{}",
        }


def test_rows_that_the_base_lacks_have_no_mean_with_weights_of_both_signs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = random_storage(rng, (4, 11))
    paths = [write_delta(tmp_path / f"{name}.pxd", [sign_module(rng, "m", base, rows=6)]) for name in "ab"]
    merge(paths, tmp_path / "out.pxd", weights=[0.5, 0.25])
    for weights in ([1.0, -0.9], [1.0, -1.0]):
        with pytest.raises(ToolError, match="no mean with the weights"):
            merge(paths, tmp_path / "none.pxd", weights=weights)
