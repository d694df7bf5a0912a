"""The figures that `diff` computes from packed signs equal those of dense arithmetic."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import peraxis_format as pxd
from peraxis_tools.apply import apply
from peraxis_tools.chain import update
from peraxis_tools.checkpoints.kinds import axes_text
from peraxis_tools.commands.diff import command
from peraxis_tools.deltas.rows import delta_rows, restrict, row_blocks
from peraxis_tools.diff import ModuleDiff, diff, diff_checkpoint, packed
from peraxis_tools.diff.packed import PackedComponent, inner_products, pack, square
from peraxis_tools.errors import CheckFailedError
from peraxis_tools.ops.mask_compare import Columns, differing
from tests.factories import base_ref, random_storage, sign_module, write_checkpoint, write_delta
from tests.tools.merge_pairs import pair_of_deltas

AXES = st.lists(st.sampled_from(list(pxd.Axis)), min_size=1, max_size=3).map(tuple)
SHAPES = st.sampled_from([(3, 5), (8, 64), (17, 72), (2, 4, 9), (3, 6, 128), (1, 8)])


def packed_module(module: pxd.ModuleDelta) -> list[PackedComponent]:
    """Return the components of a module in memory, for the sums of diff/packed.py."""

    def rows(mask):
        flat = mask.reshape(-1, mask.shape[-1])
        return lambda begin, end: flat[begin:end]

    return [pack(c.exponent, c.scales(), module.covered, rows(c.mask)) for c in module.components]


@given(st.integers(0, 2**32), SHAPES, AXES, AXES)
@settings(max_examples=60)
def test_packed_inner_products_are_those_of_the_dense_deltas(seed, shape, axes_a, axes_b) -> None:
    _, a, b = pair_of_deltas(seed, shape, axes_a, axes_b)
    dense_a, dense_b = (pxd.dense_delta(m).astype(np.float64) for m in (a, b))
    found = inner_products(packed_module(a), packed_module(b))
    scale = np.linalg.norm(dense_a) * np.linalg.norm(dense_b)
    assert found.square_a == pytest.approx(np.sum(dense_a**2), rel=1e-5)
    assert found.square_b == pytest.approx(np.sum(dense_b**2), rel=1e-5)
    assert found.inner == pytest.approx(np.sum(dense_a * dense_b), abs=1e-5 * scale)
    signs = [pxd.unpack_signs(m.components[0].mask, shape[-1]) for m in (a, b)]
    assert found.agreement == pytest.approx(np.mean(signs[0] == signs[1]))


@pytest.mark.parametrize("backend", ["numba", "numpy"])
@pytest.mark.parametrize("width", [1, 7, 8, 24, 1040])
def test_compiled_and_plain_kernels_agree(backend: str, width: int) -> None:
    pytest.importorskip(backend)
    rng = np.random.default_rng(width)
    a, b = (rng.integers(0, 256, (700, width), np.uint8) for _ in range(2))
    weights = rng.random(width * 8)
    differ = np.unpackbits(a ^ b, axis=1, bitorder="little")
    counts, sums = differing(a, b, Columns(weights), backend=backend)
    assert np.array_equal(counts, differ.sum(axis=1))
    np.testing.assert_allclose(sums, differ @ weights, rtol=1e-5)
    assert np.array_equal(differing(a, b, None, backend=backend)[1], counts)


@pytest.mark.parametrize("width", [1, 7, 15, 16, 17, 40])
def test_numpys_tables_of_a_wide_row_are_small_and_cover_it(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peraxis_tools.ops.mask_compare.TABLE_WIDTH", 16)
    rng = np.random.default_rng(width)
    a, b = (rng.integers(0, 256, (9, width), np.uint8) for _ in range(2))
    columns = Columns(weights := rng.random(width * 8))
    differ = np.unpackbits(a ^ b, axis=1, bitorder="little")
    for _ in range(2):
        np.testing.assert_allclose(differing(a, b, columns, backend="numpy")[1], differ @ weights, rtol=1e-5)
    assert all(table.shape[0] <= 16 for _, table in columns.tables())


def test_one_flipped_bit_is_found_and_weighs_what_it_weighs(tmp_path: Path) -> None:
    _, a, _ = pair_of_deltas(1, (40, 96), (pxd.Axis.ROW_COL,), (pxd.Axis.ROW_COL,))
    mask = a.components[0].mask.copy()
    mask[7, 3] ^= 1 << 2
    b = replace(a, components=(replace(a.components[0], mask=mask),))
    result = diff(write_delta(tmp_path / "a.pxd", [a]), write_delta(tmp_path / "b.pxd", [b]))
    difference = np.linalg.norm((pxd.dense_delta(a) - pxd.dense_delta(b)).astype(np.float64))
    (module,) = result.modules
    assert module.distance == pytest.approx(difference, rel=1e-5)
    assert module.sign_agreement == 1 - 1 / (40 * 96)
    assert not result.equal
    assert result.total.relative == pytest.approx(difference / np.linalg.norm(pxd.dense_delta(a)), rel=1e-5)


@given(st.integers(0, 2**32), AXES, AXES)
@settings(max_examples=15)
def test_files_compare_as_their_modules_do(tmp_path_factory, seed, axes_a, axes_b) -> None:
    folder = tmp_path_factory.mktemp("files")
    _, a, b = pair_of_deltas(seed, (70, 40), axes_a, axes_b)
    (module,) = diff(write_delta(folder / "a.pxd", [a]), write_delta(folder / "b.pxd", [b])).modules
    dense_a, dense_b = (pxd.dense_delta(m).astype(np.float64) for m in (a, b))
    assert module.distance == pytest.approx(np.linalg.norm(dense_a - dense_b), rel=1e-3)
    assert module.norm_b == pytest.approx(np.linalg.norm(dense_b), rel=1e-5)
    assert module.changes == (
        ()
        if axes_a == axes_b
        else (f"axis {axes_text(x.value for x in axes_a)} -> {axes_text(x.value for x in axes_b)}",)
    )


@pytest.mark.parametrize("axes_b", [(pxd.Axis.COL,), (pxd.Axis.ROW_COL, pxd.Axis.TENSOR)])
@pytest.mark.parametrize("shape", [(70, 40), (5, 7, 24)])
def test_small_blocks_come_to_the_same_sums(tmp_path: Path, monkeypatch, axes_b, shape) -> None:
    _, a, b = pair_of_deltas(9, shape, (pxd.Axis.ROW_COL,), axes_b)
    paths = [write_delta(tmp_path / "a.pxd", [a]), write_delta(tmp_path / "b.pxd", [b])]
    (whole,) = diff(*paths).modules
    monkeypatch.setattr(packed, "_BLOCK_BYTES", 17)
    (blocks,) = diff(*paths).modules
    assert blocks.distance == pytest.approx(whole.distance, rel=1e-9)
    assert blocks.sign_agreement == whole.sign_agreement


@given(st.integers(0, 2**32), SHAPES, AXES, st.integers(1, 40))
@settings(max_examples=30)
def test_blocks_of_rows_put_together_are_the_whole(seed, shape, axes, elements) -> None:
    base, module, _ = pair_of_deltas(seed, shape, axes, axes)
    blocks = list(row_blocks(shape, elements=elements))
    dense = np.concatenate([delta_rows(module, rows, None) for rows in blocks])
    assert np.array_equal(dense, pxd.dense_delta(module))
    parts = np.concatenate([pxd.reconstruct(restrict(module, rows), base[rows]) for rows in blocks])
    assert np.array_equal(parts, pxd.reconstruct(module, base))


def exact(name: str, base: pxd.Array, value: pxd.Array) -> pxd.ModuleDelta:
    ref = base_ref(base, pxd.DType.BF16)
    return pxd.ModuleDelta(
        name=name, shape=value.shape, dtype=pxd.DType.BF16, encoding=pxd.Encoding.FULL, base=ref, full=value
    )


def test_exact_tensors_have_a_distance_alone_and_norms_with_the_base(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base, x, y = (random_storage(rng, (9,)) for _ in range(3))
    folder = write_checkpoint(tmp_path / "base", {"norm.weight": (base, pxd.DType.BF16)})
    a = write_delta(tmp_path / "a.pxd", [exact("norm.weight", base, x)])
    b = write_delta(tmp_path / "b.pxd", [exact("norm.weight", base, y)])
    f = {k: pxd.to_float32(v, pxd.DType.BF16).astype(np.float64) for k, v in (("x", x), ("y", y), ("base", base))}
    (alone,) = diff(a, b).modules
    assert alone.distance == pytest.approx(np.linalg.norm(f["x"] - f["y"]))
    assert alone.relative is None
    assert "--base" in (alone.note or "")
    (with_base,) = diff(a, b, base=folder).modules
    assert with_base.relative == pytest.approx(
        np.linalg.norm(f["x"] - f["y"]) / np.linalg.norm(f["x"] - f["base"]), rel=1e-5
    )


@pytest.mark.parametrize("same", [False, True])
def test_equal_weights_that_are_stored_in_two_ways_are_no_difference(tmp_path: Path, same: bool) -> None:
    rng = np.random.default_rng(0)
    base, other, tuned = (random_storage(rng, (6, 8)) for _ in range(3))
    tuned = base if same else tuned
    folder = write_checkpoint(tmp_path / "base", {"a.weight": (base, pxd.DType.BF16)})
    full = exact("a.weight", base, tuned)
    if same:
        b = write_delta(tmp_path / "b.pxd", [replace(full, encoding=pxd.Encoding.SAME, full=None)])
    else:
        write_checkpoint(tmp_path / "tuned", {"a.weight": (tuned, pxd.DType.BF16)})
        b = update(folder, tmp_path / "tuned", tmp_path / "b.pxd").path
    a = write_delta(tmp_path / "a.pxd", [full])
    for pair in ((a, b), (b, a)):
        result = diff(*pair, base=folder)
        (found,) = result.modules
        assert (found.identical, found.distance, result.total.different) == (True, 0.0, 0)
        assert found.changes == () if not same else ("encoding" in found.changes[0])
    changed = write_delta(tmp_path / "c.pxd", [exact("a.weight", base, other)])
    assert [diff(changed, b, base=folder).total.different, diff(b, changed, base=folder).total.different] == [1, 1]


def test_a_module_without_a_delta_does_not_ask_for_the_base_that_was_passed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base, head = random_storage(rng, (16, 24)), random_storage(rng, (16, 24))
    folder = write_checkpoint(tmp_path / "base", {"a.weight": (base, pxd.DType.BF16)})
    signs = sign_module(rng, "a.weight", base)
    new = replace(exact("lm_head.weight", base, head), base=None)
    delta = write_delta(tmp_path / "a.pxd", [signs, new])
    tensors = {"a.weight": (random_storage(rng, (16, 24)), pxd.DType.BF16), "lm_head.weight": (head, pxd.DType.BF16)}
    tuned = write_checkpoint(tmp_path / "tuned", tensors)
    shown = CliRunner().invoke(command, [str(delta), str(tuned), "--base", str(folder)]).stdout
    assert "distances are over 1 of 2 modules: the others have no delta to one base" in shown
    assert "--base" not in shown
    norms = [write_delta(tmp_path / f"{i}.pxd", [exact("n.weight", base[0], head[i])]) for i in (0, 1)]
    assert "exact tensors need --base" in CliRunner().invoke(command, list(map(str, norms))).stdout


def resized(base: pxd.Array, seed: int, rows: int, encoding: pxd.Encoding) -> pxd.ModuleDelta:
    """Return a vocabulary with `rows` more rows than the base: signs or exact, with new rows drawn from `seed`."""
    rng = np.random.default_rng(seed)
    new = random_storage(rng, (rows, base.shape[1]))
    signs = sign_module(np.random.default_rng(7), "embed.weight", base)
    shape = (len(base) + rows, base.shape[1])
    if encoding is pxd.Encoding.SIGN:
        return replace(signs, shape=shape, tail=new)
    full = np.concatenate([pxd.reconstruct(signs, base), new])
    return replace(signs, shape=shape, encoding=pxd.Encoding.FULL, components=(), full=full)


@pytest.mark.parametrize("encoding", [pxd.Encoding.SIGN, pxd.Encoding.FULL])
def test_new_rows_count_in_no_distance_and_no_norm_and_are_told(tmp_path: Path, encoding) -> None:
    base = random_storage(np.random.default_rng(0), (12, 16))
    folder = write_checkpoint(tmp_path / "base", {"embed.weight": (base, pxd.DType.BF16)})
    paths = [write_delta(tmp_path / f"{seed}.pxd", [resized(base, seed, 3, encoding)]) for seed in (1, 2)]
    (found,) = diff(*paths, base=folder).modules
    assert (found.distance, found.relative, found.identical) == (0.0, 0.0, False)
    assert found.changes == ("3 of 3 new rows differ",)
    dense = pxd.dense_delta(sign_module(np.random.default_rng(7), "embed.weight", base))
    assert found.norm_a == pytest.approx(np.linalg.norm(dense), rel=0.1)
    (alone,) = diff(*paths).modules
    assert alone.distance == 0.0


def test_metadata_that_is_json_differs_by_key(tmp_path: Path) -> None:
    _, a, _ = pair_of_deltas(1, (4, 8), (pxd.Axis.ROW,), (pxd.Axis.ROW,))
    paths = []
    for name, config in (
        ("a", {"masks": "auto", "seed": 0, "plan": "x" * 90 + "a"}),
        ("b", {"masks": 2, "plan": "x" * 90}),
    ):
        paths.append(tmp_path / f"{name}.pxd")
        identity = pxd.Identity(id="m")
        metadata = {"peraxis.config": json.dumps(config), "note": name}
        with pxd.DeltaWriter(paths[-1], base=identity, fine_tuned=identity, metadata=metadata) as writer:
            writer.add(a)
            writer.finish()
    found = diff(*paths)
    key = "metadata['peraxis.config']"
    assert {change.field: (change.a, change.b) for change in found.manifest_changes} == {
        "metadata['note']": ("a", "b"),
        f"{key}.masks": ('"auto"', "2"),
        f"{key}.seed": ("0", None),
        f"{key}.plan": ('"' + "x" * 90 + 'a"', '"' + "x" * 90 + '"'),
    }
    shown = CliRunner().invoke(command, list(map(str, paths))).stdout
    assert 'plan: …xxxxxxxxa" -> …xxxxxxxx"' in shown


def test_deltas_of_different_bases_are_refused(tmp_path: Path) -> None:
    _, a, _ = pair_of_deltas(1, (4, 8), (pxd.Axis.ROW,), (pxd.Axis.ROW,))
    _, b, _ = pair_of_deltas(2, (4, 8), (pxd.Axis.ROW,), (pxd.Axis.ROW,))
    with pytest.raises(CheckFailedError, match="different bases"):
        diff(write_delta(tmp_path / "a.pxd", [a]), write_delta(tmp_path / "b.pxd", [b]))


def test_damage_is_found_even_where_the_sums_are_streamed(tmp_path: Path) -> None:
    _, a, b = pair_of_deltas(1, (64, 64), (pxd.Axis.ROW,), (pxd.Axis.ROW,))
    paths = [write_delta(tmp_path / name, [m]) for name, m in (("a.pxd", a), ("b.pxd", b))]
    data = bytearray(paths[1].read_bytes())
    data[-3] ^= 1
    paths[1].write_bytes(data)
    with pytest.raises(pxd.PayloadError, match="E301"):
        diff(*paths)


def test_a_delta_equals_the_checkpoint_that_apply_wrote(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    base = {name: random_storage(rng, shape) for name, shape in (("a.weight", (12, 24)), ("norm.weight", (24,)))}
    folder = write_checkpoint(tmp_path / "base", {name: (array, pxd.DType.BF16) for name, array in base.items()})
    modules = [
        sign_module(rng, "a.weight", base["a.weight"], axes=(pxd.Axis.ROW, pxd.Axis.COL)),
        exact("norm.weight", base["norm.weight"], random_storage(rng, (24,))),
    ]
    delta = write_delta(tmp_path / "a.pxd", modules, assets={"config.json": b'{"model_type": "llama"}'})
    apply(folder, delta, tmp_path / "out")
    result = diff_checkpoint(delta, tmp_path / "out", base=folder)
    assert result.equal
    # The delta and the checkpoint differ only by rounding to BF16.
    assert 0.0 < result.modules[0].relative < 0.5
    assert result.modules[1].distance == 0.0
    other = diff_checkpoint(delta, folder, base=folder)
    assert not other.equal
    assert [m.identical for m in other.modules] == [False, False]


def test_the_command_says_equal_or_different_by_its_exit_code_and_its_json(tmp_path: Path) -> None:
    _, a, b = pair_of_deltas(1, (16, 24), (pxd.Axis.ROW,), (pxd.Axis.COL,))
    paths = [str(write_delta(tmp_path / name, [m])) for name, m in (("a.pxd", a), ("b.pxd", b))]
    same = CliRunner().invoke(command, [paths[0], paths[0], "--json"], standalone_mode=False)
    found = json.loads(same.stdout)
    assert (same.return_value, found["schema"], found["equal"]) == (None, "peraxis.diff/1", True)
    other = CliRunner().invoke(command, [*paths, "--json"])
    assert other.exit_code == 1
    found = json.loads(other.stdout)
    assert found["modules"][0]["changes"] == ["axis row -> col"]
    shown = CliRunner().invoke(command, paths)
    assert "different" in shown.stdout.splitlines()[0]
    assert max(len(line) for line in shown.stdout.splitlines() if str(tmp_path) not in line) <= 80


def test_relative_is_unknown_rather_than_infinite() -> None:
    assert ModuleDiff(name="m", group="m", identical=False, distance=1.0, norm_a=0.0).relative is None
    assert math.isclose(square([]), 0.0)
