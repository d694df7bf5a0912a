"""Laws of the parts of the plug-in that do not need vLLM: patches, sums by signs, rows of a step, files, sources."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Iterator
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
import torch

import peraxis_format as pf
from peraxis_format.engines.vllm.assets import asset_folders, refuse_other_assets
from peraxis_format.engines.vllm.batch import StepRows
from peraxis_format.engines.vllm.bridge import Scratch
from peraxis_format.engines.vllm.patches import add_components, embedded, merged_parameter, merged_rows, patch_of
from peraxis_format.engines.vllm.source import open_delta
from peraxis_format.errors import CheckpointError, LiveModelError, PxdError
from peraxis_format.ops.tensors import storage_array
from tests.loader.support import random_module

AXES = tuple(pf.Axis)


def module_of(
    weight: torch.Tensor, axes: tuple[pf.Axis, ...], encoding: pf.Encoding = pf.Encoding.SIGN
) -> pf.ModuleDelta:
    return random_module("w", weight, np.random.default_rng(5), axes, encoding)


def merged(module: pf.ModuleDelta, weight: torch.Tensor) -> torch.Tensor:
    """Return the reference weights (SPEC 6)."""
    array = pf.reconstruct(module, storage_array(weight), backend="numpy")
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


@pytest.fixture
def weight() -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randn(24, 44).to(torch.bfloat16)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("box", [((0, 24), (0, 44)), ((6, 18), (0, 44)), ((0, 24), (11, 29)), ((4, 7), (16, 44))])
def test_a_piece_of_a_patch_rebuilds_that_piece_of_the_merged_weight(
    weight: torch.Tensor, axis: pf.Axis, box: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    module = module_of(weight, (axis, pf.Axis.ROW_COL))
    (top, bottom), (left, right) = box
    piece = weight[top:bottom, left:right].contiguous()
    patch = patch_of(module, box, (0, bottom - top))
    assert torch.equal(merged_rows(piece, [patch], Scratch()), merged(module, weight)[top:bottom, left:right])


@pytest.mark.parametrize("encoding", [pf.Encoding.SIGN, pf.Encoding.FULL])
def test_rows_beside_a_patch_keep_the_bases_weights(weight: torch.Tensor, encoding: pf.Encoding) -> None:
    part = weight[:10].contiguous()
    module = module_of(part, (pf.Axis.ROW,), encoding)
    fused = torch.cat([weight[10:], part])
    patch = patch_of(module, ((0, 10), (0, 44)), (14, 24))
    out = merged_rows(fused, [patch], Scratch())
    assert torch.equal(out[:14], weight[10:])
    assert torch.equal(out[14:], merged(module, part))


@pytest.mark.parametrize("axis", AXES)
def test_sums_by_signs_are_within_the_bound_of_the_exact_product(weight: torch.Tensor, axis: pf.Axis) -> None:
    module = module_of(weight, (axis, pf.Axis.TENSOR))
    patch = patch_of(module, ((0, 24), (0, 44)), (0, 24))
    x = torch.randn(7, 44).to(torch.bfloat16)
    rows = torch.tensor([0, 3, 6])
    y = torch.nn.functional.linear(x, weight)
    before = y.clone()
    add_components(y, x, [(rows, [patch])])
    terms, w, exact_x = torch.from_numpy(pf.dense_delta(module)).double(), weight.double(), x.double()
    exact = exact_x @ (w + terms).t()
    unit = 2.0**-8
    bound = unit * ((exact_x @ w.t()).abs() + 2 * exact.abs())
    bound += (44 + 4) * 2.0**-24 * (exact_x.abs() @ (w.abs() + terms.abs()).t())
    assert bool(((y[rows].double() - exact[rows]).abs() <= bound[rows]).all())
    others = [1, 2, 4, 5]
    assert torch.equal(y[others], before[others])


def test_the_columns_of_ranks_add_up_to_the_whole(weight: torch.Tensor) -> None:
    module = module_of(weight, (pf.Axis.ROW_COL,))
    x = torch.randn(5, 44)
    whole, parts = torch.zeros(5, 24), torch.zeros(5, 24)
    add_components(whole, x, [(slice(0, 5), [patch_of(module, ((0, 24), (0, 44)), (0, 24))])])
    for left, right in ((0, 13), (13, 30), (30, 44)):
        piece = patch_of(module, ((0, 24), (left, right)), (0, 24))
        add_components(parts, x[:, left:right].contiguous(), [(slice(0, 5), [piece])])
    assert torch.allclose(whole, parts, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("encoding", [pf.Encoding.SIGN, pf.Encoding.FULL])
def test_an_embedding_looks_up_rows_of_the_merged_table(weight: torch.Tensor, encoding: pf.Encoding) -> None:
    module = module_of(weight, (pf.Axis.COL,), encoding)
    patch = patch_of(module, ((0, 24), (0, 44)), (0, 24))
    ids = torch.tensor([3, 3, 0, 23])
    assert torch.equal(embedded(ids, weight, [patch]), merged(module, weight)[ids])


def test_a_small_parameter_is_the_variants_own() -> None:
    base = torch.ones(6)
    module = random_module("b", base, np.random.default_rng(0), (), pf.Encoding.FULL)
    found = merged_parameter(base, [patch_of(module, ((2, 5),), (1, 4))])
    assert module.full is not None
    assert found.tolist() == [1.0, *module.full[2:5].tolist(), 1.0, 1.0]
    assert base.tolist() == [1.0] * 6


def test_rows_of_a_step_are_grouped_by_variant_and_zero_is_the_base() -> None:
    rows: StepRows[str] = StepRows(torch.device("cpu"))
    rows.begin([0, 2, 2, 0, 5, 2], [0, 2, 5], {2: "two", 5: "five"})
    members = dict(rows.tokens.members)
    assert torch.equal(torch.as_tensor(members["two"]), torch.tensor([1, 2, 5]))
    assert members["five"] == slice(4, 5)
    assert rows.tokens.only is None
    rows.begin([2, 2], [2], {2: "two"})
    assert (rows.tokens.only, rows.samples.only) == ("two", "two")


def test_logits_of_a_prompt_are_known_by_their_address_and_never_guessed() -> None:
    rows: StepRows[str] = StepRows(torch.device("cpu"))
    rows.begin([0, 2, 2, 5, 5], [0, 2, 5], {2: "two", 5: "five"})
    hidden = torch.zeros(5, 8)
    assert rows.of_logits(torch.zeros(3, 8)) is rows.samples
    with pytest.raises(LiveModelError, match="unknown requests"):
        rows.of_logits(torch.zeros(2, 8))
    rows.hidden = hidden
    assert rows.of_logits(hidden[1:3]).only == "two"
    assert rows.of_logits(hidden[3:5]).only == "five"
    assert not rows.of_logits(hidden[0:1]).members
    with pytest.raises(LiveModelError, match="unknown requests"):
        rows.of_logits(torch.zeros(3, 8))


def delta_with(folder: Path, assets: dict[str, bytes]) -> Path:
    path = folder / "delta.pxd"
    with pf.DeltaWriter(path, base=pf.Identity(id="b"), fine_tuned=pf.Identity(id="f")) as writer:
        writer.add(module_of(torch.ones(8, 8, dtype=torch.bfloat16), (pf.Axis.ROW,)))
        for name, data in sorted(assets.items()):
            writer.add_asset(name, data)
        writer.finish()
    return path


@pytest.mark.parametrize(
    ("name", "own", "other", "refused"),
    [
        ("config.json", {"rope_theta": 1, "transformers_version": "a"}, {"rope_theta": 1}, False),
        ("config.json", {"rope_theta": 1}, {"rope_theta": 2}, True),
        ("generation_config.json", {"eos_token_id": [1, 2]}, {"eos_token_id": 1}, True),
        ("tokenizer.json", {"model": 1}, {"model": 2}, True),
        ("tokenizer_config.json", {"chat_template": "a"}, {"chat_template": "b"}, True),
        ("tokenizer_config.json", {"model_max_length": 1}, {"model_max_length": 2}, False),
        ("chat_template.jinja", {"a": 1}, None, True),
    ],
)
def test_small_files_that_change_what_is_computed_are_refused(
    tmp_path: Path, name: str, own: object, other: object, refused: bool
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    if other is not None:
        (base / name).write_text(json.dumps(other))
    with pf.open(delta_with(tmp_path, {name: json.dumps(own).encode()})) as delta:
        folders = asset_folders(str(base), None, None, "auto")
        if refused:
            with pytest.raises(LiveModelError, match=f"{name}.*peraxis-tools extract"):
                refuse_other_assets(delta, folders)
        else:
            refuse_other_assets(delta, folders)
        extracted = tmp_path / "files"
        extracted.mkdir()
        (extracted / name).write_bytes(delta.asset(name))
        refuse_other_assets(delta, asset_folders(str(base), str(extracted), str(extracted), str(extracted)))


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """An HTTP server of a folder with a delta."""
    delta_with(tmp_path, {})

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            return None

    with HTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_delta_is_opened_by_path_and_by_url(served: str, tmp_path: Path) -> None:
    with open_delta(str(tmp_path / "delta.pxd")) as one, open_delta(f"{served}/delta.pxd") as two:
        assert one.content_id == two.content_id


def test_a_url_is_fetched_each_time_and_nothing_stays_on_the_disk(
    served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    with open_delta(f"{served}/delta.pxd") as one:
        assert list(folder.iterdir()) == []
        delta_with(tmp_path, {"chat_template.jinja": b"another"})
        with open_delta(f"{served}/delta.pxd") as two:
            assert one.content_id != two.content_id
        one.verify()
    (tmp_path / "delta.pxd").write_bytes(b"")
    with pytest.raises(PxdError, match=f"{served}/delta.pxd"):
        open_delta(f"{served}/delta.pxd?token=secret")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("source", ["a\0b.pxd", "a\nb.pxd", "x" * 5000, "http://127.0.0.1:1/\n"])
def test_a_source_that_is_no_name_is_one_short_line(source: str) -> None:
    with pytest.raises(CheckpointError, match="without control characters") as caught:
        open_delta(source)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_a_url_that_is_not_there_is_one_line(served: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be fetched") as caught:
        open_delta(f"{served}/none.pxd?token=secret")
    assert "secret" not in str(caught.value)


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(
    served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "download"
    folder.mkdir()
    (folder / "delta.pxd").symlink_to("/dev/full")
    monkeypatch.setattr("tempfile.mkdtemp", lambda **_: str(folder))
    with pytest.raises(CheckpointError, match=f"No space left on device.*make room in {tmp_path}"):
        open_delta(f"{served}/delta.pxd")
    assert not folder.exists()
