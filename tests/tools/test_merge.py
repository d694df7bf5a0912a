"""`merge`: parts join to the same bytes; sums are what dense arithmetic gives, within the bounds that are stated."""

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
from peraxis_tools.apply import apply
from peraxis_tools.commands.merge import command
from peraxis_tools.errors import CheckFailedError, ToolError
from peraxis_tools.factors import module_sum
from peraxis_tools.fold import fold
from peraxis_tools.merge import Mixture, merge, merge_parts
from peraxis_tools.merge.fit import fit_masks
from peraxis_tools.merge.methods import Magnitudes, make_mixer, threshold
from peraxis_tools.split import split
from tests.factories import base_ref, random_storage, sign_module, write_checkpoint, write_delta

AXES = st.lists(st.sampled_from(list(pxd.Axis)), min_size=1, max_size=3).map(tuple)
SHAPES = st.sampled_from([(3, 5), (8, 64), (17, 72), (2, 4, 9), (1, 8)])
WEIGHTS = st.floats(-4, 4, allow_nan=False).filter(lambda w: abs(w) > 1e-3)
BF16 = pxd.DType.BF16


def dense(module: pxd.ModuleDelta) -> np.ndarray:
    """The delta in binary64, from the formula of SPEC 5.3 alone."""
    total = np.zeros(module.covered)
    for c in module.components:
        signs = np.where(pxd.unpack_signs(c.mask, module.shape[-1]), 1.0, -1.0)
        row = 1.0 if c.row is None else c.row.astype(np.float64)[..., :, None]
        col = 1.0 if c.col is None else c.col.astype(np.float64)[..., None, :]
        scalar = 1.0 if c.scalar is None else float(c.scalar[0])
        total += signs * row * col * scalar * 2.0**c.exponent
    return total


def fold_bound(module: pxd.ModuleDelta, weight: float) -> np.ndarray:
    """What folding this weight may change, by the formula of merge/fold.py."""
    total = np.zeros(module.covered)
    for c in module.components:
        one = dense(replace(module, components=(c,)))
        vector = next(iter(c.scales().values())).astype(np.float64)
        col = 1.0 if c.axis is not pxd.Axis.ROW_COL else c.col.astype(np.float64)[..., None, :]
        largest = vector.max() * 2.0**c.exponent * col
        total += 2.0**-11 * abs(weight) * (np.abs(one) + 2.0**-28 * largest)
    return total


def exact(name: str, base: pxd.Array | None, value: pxd.Array) -> pxd.ModuleDelta:
    ref = None if base is None else base_ref(base, BF16)
    return pxd.ModuleDelta(name=name, shape=value.shape, dtype=BF16, encoding=pxd.Encoding.FULL, base=ref, full=value)


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


def pair_of_deltas(seed: int, shape, axes_a, axes_b):
    rng = np.random.default_rng(seed)
    base = random_storage(rng, shape)
    return base, sign_module(rng, "m.weight", base, axes=axes_a), sign_module(rng, "m.weight", base, axes=axes_b)


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
    # One binary32 rounding for each term, then half a unit of BF16 (8 bits): the bound of the README.
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


def whole(folder: Path, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    shapes = {"embed.weight": (40, 16), "a.weight": (24, 16), "b.weight": (8, 24), "norm.weight": (16,)}
    base = {name: random_storage(rng, shape) for name, shape in shapes.items()}
    modules = [
        sign_module(rng, "embed.weight", base["embed.weight"], rows=43),
        sign_module(rng, "a.weight", base["a.weight"], axes=(pxd.Axis.ROW_COL, pxd.Axis.TENSOR)),
        exact("norm.weight", base["norm.weight"], random_storage(rng, (16,))),
        sign_module(rng, "b.weight", base["b.weight"], axes=(pxd.Axis.COL,)),
        exact("new.weight", None, random_storage(rng, (5, 3))),
    ]
    return write_delta(
        folder / "whole.pxd",
        modules,
        tied=[("embed.weight", "lm_head.weight")],
        dropped=["old.bias"],
        assets={"config.json": b"{}", "tokenizer.json": b"{1}"},
    )


@given(st.integers(2, 5), st.randoms(use_true_random=False))
@settings(max_examples=15)
def test_parts_in_any_order_join_to_the_bytes_of_the_whole(tmp_path_factory, count, random) -> None:
    folder = tmp_path_factory.mktemp("parts")
    path = whole(folder)
    parts = [part.path for part in split(path, folder / "parts", parts=count).parts]
    assert len(parts) == count
    ids = [part.content_id for part in merge_parts(parts, folder / "ordered.pxd").inputs]
    random.shuffle(parts)
    result = merge_parts(parts, folder / "joined.pxd")
    assert [part.content_id for part in result.inputs] == ids
    assert (folder / "joined.pxd").read_bytes() == path.read_bytes()


def test_every_part_is_a_valid_file_that_apply_refuses(tmp_path: Path) -> None:
    path = whole(tmp_path)
    base = write_checkpoint(tmp_path / "base", {"x": (np.zeros(3, np.uint16), BF16)})
    for part in split(path, tmp_path / "parts", parts=3).parts:
        with pxd.open(part.path) as file:
            file.verify()
        with pytest.raises(ToolError, match="is a part with"):
            apply(base, part.path, tmp_path / "out")


def test_a_missing_part_a_doubled_one_and_a_stranger_are_named(tmp_path: Path) -> None:
    parts = [part.path for part in split(whole(tmp_path), tmp_path / "parts", parts=3).parts]
    with pytest.raises(ToolError, match="of 5 modules are in none of the parts"):
        merge_parts(parts[:2], tmp_path / "x.pxd")
    with pytest.raises(ToolError, match="pass each part once"):
        merge_parts([*parts, parts[0]], tmp_path / "x.pxd")
    (tmp_path / "other").mkdir()
    with pxd.open(whole(tmp_path / "other", seed=1)) as other:
        stranger = other.path
    with pytest.raises(ToolError, match="parts"):
        merge_parts([parts[0], stranger], tmp_path / "x.pxd")


@given(st.integers(0, 2**32), st.integers(1, 4))
@settings(max_examples=15)
def test_the_reported_error_of_a_fit_is_its_error(seed, bits) -> None:
    rng = np.random.default_rng(seed)
    wanted = (rng.standard_normal((30, 20)) * rng.random((30, 1)) * rng.random(20)).astype(np.float32)
    fit = fit_masks(lambda index: lambda rows: wanted[rows].copy(), wanted.shape, bits)
    base = random_storage(rng, wanted.shape)
    like = sign_module(rng, "m", base)
    got = dense(replace(like, components=fit.components))
    assert fit.square_error == pytest.approx(np.sum((wanted - got) ** 2), rel=1e-4)
    assert fit.square_norm == pytest.approx(np.sum(wanted.astype(np.float64) ** 2))
    # A mask more than halves nothing by law, but each leaves less than the mean magnitude a row would.
    rows = np.abs(wanted).mean(axis=1, keepdims=True)
    assert fit.square_error <= np.sum((wanted - np.sign(wanted) * rows) ** 2) * 1.01


def test_more_masks_leave_less(tmp_path: Path) -> None:
    _, a, b = pair_of_deltas(5, (64, 48), (pxd.Axis.ROW,), (pxd.Axis.COL,))
    paths = [write_delta(tmp_path / "a.pxd", [a]), write_delta(tmp_path / "b.pxd", [b])]
    errors = [merge(paths, tmp_path / f"{k}.pxd", weights=[0.7, 0.3], masks=k).error for k in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    with pxd.open(tmp_path / "2.pxd") as file:
        assert len(file.entry("m.weight").components) == 2
        got, wanted = dense(file.load("m.weight")), 0.7 * dense(a) + 0.3 * dense(b)
    assert errors[1] == pytest.approx(np.linalg.norm(got - wanted) / np.linalg.norm(wanted), rel=1e-3)


def test_experts_are_fitted_each_on_its_own(tmp_path: Path) -> None:
    _, a, b = pair_of_deltas(5, (3, 10, 12), (pxd.Axis.ROW,), (pxd.Axis.COL,))
    paths = [write_delta(tmp_path / "a.pxd", [a]), write_delta(tmp_path / "b.pxd", [b])]
    result = merge(paths, tmp_path / "out.pxd", weights=[1, 1], masks=2)
    with pxd.open(result.path) as file:
        got, wanted = dense(file.load("m.weight")), dense(a) + dense(b)
    assert result.error == pytest.approx(np.linalg.norm(got - wanted) / np.linalg.norm(wanted), rel=2e-3)


def ties(deltas: list[np.ndarray], weights: list[float], density: float) -> np.ndarray:
    """TIES as its paper says it, on whole arrays: trim, elect, disjoint merge."""
    trimmed = []
    for delta in deltas:
        threshold = np.sort(np.abs(delta).reshape(-1))[-int(density * delta.size)]
        trimmed.append(np.where(np.abs(delta) >= threshold, delta, 0))
    elected = np.sign(sum(w * d for w, d in zip(weights, trimmed, strict=True)))
    agree = [np.sign(w * d) == elected for w, d in zip(weights, trimmed, strict=True)]
    total = sum(w * d * a for w, d, a in zip(weights, trimmed, agree, strict=True))
    divisor = sum(w * (a & (d != 0)) for w, d, a in zip(weights, trimmed, agree, strict=True))
    return total / np.where(np.abs(divisor) > 1e-8, divisor, 1)


@given(st.integers(0, 2**32), st.sampled_from([0.2, 0.5, 0.9, 1.0]))
@settings(max_examples=20)
def test_ties_is_ties(seed, density) -> None:
    rng = np.random.default_rng(seed)
    deltas = [rng.standard_normal((40, 30)).astype(np.float32) for _ in range(3)]
    weights = [0.5, 0.3, 0.9]
    sizes = [Magnitudes(count=d.size, blocks=lambda d=d: iter((d[:7], d[7:]))) for d in deltas]
    mixer = make_mixer(Mixture(method="ties", density=density), weights, ["a", "b", "c"], sizes)
    np.testing.assert_allclose(mixer.mix(deltas, (0,)), ties(deltas, weights, density), rtol=1e-4, atol=1e-6)


@given(st.integers(0, 2**32), SHAPES, st.sampled_from(list(pxd.Axis)), st.floats(0, 1))
@settings(max_examples=60)
def test_a_threshold_from_scales_alone_is_that_of_the_dense_delta(seed, shape, axis, density) -> None:
    rng = np.random.default_rng(seed)
    module = sign_module(rng, "m", random_storage(rng, shape), axes=(axis,))
    sizes = np.sort(np.abs(dense(module)).reshape(-1))
    wanted = int(density * sizes.size)
    products = []
    for index in np.ndindex(shape[:-2]):
        (factors,) = module_sum(module, index).components
        products.append((factors.row.astype(np.float64), factors.col.astype(np.float64)))
    block = dense(module).astype(np.float32)
    found = {
        threshold(Magnitudes(count=sizes.size, blocks=lambda: iter([block]), products=each), density)
        for each in (None, products)
    }
    assert found == {sizes[-wanted] if wanted else np.inf}


@pytest.mark.parametrize("shape", [(70, 40), (9, 21), (3, 5, 8)])
@pytest.mark.parametrize("mixture", [Mixture(), *(Mixture(method=m, density=0.4) for m in ("linear", "ties", "dare"))])
def test_a_fit_is_the_same_bytes_without_numba(tmp_path: Path, monkeypatch, mixture, shape) -> None:
    _, a, b = pair_of_deltas(3, shape, (pxd.Axis.ROW_COL, pxd.Axis.ROW), (pxd.Axis.COL,))
    paths = [write_delta(tmp_path / "a.pxd", [a]), write_delta(tmp_path / "b.pxd", [b])]
    pytest.importorskip("numba")
    monkeypatch.setenv("PERAXIS_BACKEND", "numba")
    compiled = merge(paths, tmp_path / "1.pxd", weights=[0.7, -0.4], mixture=mixture, masks=2)
    monkeypatch.setenv("PERAXIS_BACKEND", "numpy")
    plain = merge(paths, tmp_path / "2.pxd", weights=[0.7, -0.4], mixture=mixture, masks=2)
    assert compiled.content_id == plain.content_id
    assert compiled.error == plain.error


def test_dare_keeps_the_mean_and_drops_its_share() -> None:
    delta = np.ones((200, 500), np.float32)
    mixture = Mixture(method="dare", density=0.3, seed=1)
    mixed = make_mixer(mixture, [1.0], ["a"], [Magnitudes(count=delta.size, blocks=lambda: iter([delta]))]).mix(
        [delta], (0,)
    )
    assert set(np.unique(mixed)) == {np.float32(0.0), np.float32(1.0) / np.float32(0.3)}
    assert np.mean(mixed != 0) == pytest.approx(0.3, abs=0.01)
    assert mixed.mean() == pytest.approx(1.0, abs=0.03)


def test_exact_tensors_merge_with_the_base_and_not_without(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base, x, y = (random_storage(rng, (33,)) for _ in range(3))
    checkpoint = write_checkpoint(tmp_path / "base", {"norm.weight": (base, BF16)})
    paths = [
        write_delta(tmp_path / name, [exact("norm.weight", base, value)])
        for name, value in (("a.pxd", x), ("b.pxd", y))
    ]
    with pytest.raises(ToolError, match="pass --base"):
        merge(paths, tmp_path / "out.pxd", weights=[0.7, 0.6])
    merge(paths, tmp_path / "out.pxd", weights=[0.7, 0.6], base=checkpoint)
    with pxd.open(tmp_path / "out.pxd") as file:
        got = pxd.to_float32(file.load("norm.weight").full, BF16)
    fx, fy, fb = (pxd.to_float32(v, BF16).astype(np.float64) for v in (x, y, base))
    wanted = fb + 0.7 * (fx - fb) + 0.6 * (fy - fb)
    assert np.all(np.abs(got - wanted) <= 2.0**-8 * np.abs(wanted) + 1e-6)
    # The same tensor in both, weights that sum to one: no base is needed, and not a bit changes.
    merge([paths[0], paths[0]], tmp_path / "same.pxd", weights=[0.25, 0.75])
    with pxd.open(tmp_path / "same.pxd") as file:
        assert np.array_equal(file.load("norm.weight").full, x)


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
    data[begin] ^= 1  # had the first module been read, this would have been said
    paths[0].write_bytes(data)
    with pytest.raises(ToolError, match=r"norm\.weight.*pass --base"):
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


def test_the_command_merges_and_says_so(tmp_path: Path) -> None:
    _, a, b = pair_of_deltas(1, (16, 24), (pxd.Axis.ROW,), (pxd.Axis.COL,))
    paths = [str(write_delta(tmp_path / name, [m])) for name, m in (("a.pxd", a), ("b.pxd", b))]
    out = str(tmp_path / "out.pxd")
    shown = CliRunner().invoke(command, [*paths, "--weights", "0.7,0.3", "-o", out, "--json"])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["kind"] == "sum"
    fitted = CliRunner().invoke(command, [*paths, "--method", "ties", "--masks", "2", "-o", out, "--overwrite"])
    assert "relative error of the fit" in fitted.stdout


def test_bits_is_an_old_name_of_masks_that_no_help_shows(tmp_path: Path) -> None:
    _, a, b = pair_of_deltas(1, (16, 24), (pxd.Axis.ROW,), (pxd.Axis.COL,))
    paths = [str(write_delta(tmp_path / name, [m])) for name, m in (("a.pxd", a), ("b.pxd", b))]
    made = {}
    for option in ("--masks", "--bits"):
        out = tmp_path / f"{option}.pxd"
        done = CliRunner().invoke(command, [*paths, "--method", "ties", option, "2", "-o", str(out)])
        assert done.exit_code == 0, done.output
        made[option] = out.read_bytes()
    assert made["--masks"] == made["--bits"]
    assert "--bits" not in CliRunner().invoke(command, ["--help"]).output
    both = CliRunner().invoke(command, [*paths, "--method", "ties", "--masks", "2", "--bits", "1", "-o", "x.pxd"])
    assert "--bits is another name of --masks" in str(both.exception)
