"""The speed of a fit does not change what it computes: products, sums of squares, gradients, drawn tokens, threads."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from threadpoolctl import ThreadpoolController

from peraxis_format import Axis
from peraxis_tools.compress import compress
from peraxis_tools.compress.calibration.generate import draw_tokens
from peraxis_tools.compress.calibration.partition import pieces_of
from peraxis_tools.compress.fit.gram import add_gram
from peraxis_tools.compress.fit.moments.collector import TextBatches, TokenBatch
from peraxis_tools.compress.fit.scales import fit_scales, start_component
from peraxis_tools.compress.fit.signs import inverse_factor
from peraxis_tools.process import products
from peraxis_tools.process.products import fast_products
from peraxis_tools.process.threads import one_blas_thread, pool_size, use_threads
from tests.tools.compress_pairs import FEW, llama_pair


def blas_threads() -> set[int]:
    """The numbers of threads of the copies of OpenBLAS, which numpy's wheels have."""
    return {library["num_threads"] for library in ThreadpoolController().select(internal_api="openblas").info()}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def positive(width: int) -> torch.Tensor:
    x = drawn(4 * width, width, seed=1)
    return x.t() @ x + torch.eye(width)


def test_fast_products_are_those_of_float32_and_leave_the_setting() -> None:
    a, b = drawn(300, 280, seed=2), drawn(280, 260, seed=3)
    setting = products._setting()
    before = None if setting is None else setting.fp32_precision
    exact = a.double() @ b.double()
    with fast_products():
        found = a @ b
    assert float((found - exact).norm() / exact.norm()) < 1e-6  # bfloat16 is wrong by 2e-3
    assert setting is None or setting.fp32_precision == before


def test_products_that_are_rounded_further_are_not_permitted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Setting:
        fp32_precision = "none"

    setting = Setting()
    monkeypatch.setattr(products, "_setting", lambda: setting)
    monkeypatch.setattr(products, "_is_amd", lambda: True)
    for exact, inside in ((False, "none"), (True, "bf16")):
        monkeypatch.setattr(products, "_keeps_float32", lambda exact=exact: exact)
        with fast_products():
            assert setting.fp32_precision == inside
        assert setting.fp32_precision == "none"


def test_runs_that_overlap_leave_the_settings_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    class Setting:
        fp32_precision = "none"

    setting = Setting()
    monkeypatch.setattr(products, "_setting", lambda: setting)
    monkeypatch.setattr(products, "_is_amd", lambda: True)
    monkeypatch.setattr(products, "_keeps_float32", lambda: True)
    with use_threads(2):
        first, second = ExitStack(), ExitStack()
        for run in (first, second):
            run.enter_context(fast_products())
            run.enter_context(one_blas_thread())
        first.close()
        assert (setting.fp32_precision, blas_threads()) == ("bf16", {1})
        second.close()
        assert (setting.fp32_precision, blas_threads()) == ("none", {2})


@pytest.mark.parametrize(("rows", "width"), [(5, 1), (7, 3), (40, 33)])
def test_a_gram_in_blocks_is_the_whole_product(rows: int, width: int) -> None:
    x, total = drawn(rows, width), torch.ones(width, width)
    add_gram(total, x)
    torch.testing.assert_close(total, x.t() @ x + 1.0)


@pytest.mark.parametrize("axis", [Axis.ROW, Axis.ROW_COL])
def test_the_image_of_a_fitted_component_is_its_product_with_the_hessian(axis: Axis) -> None:
    target, hessian = drawn(50, 24), positive(24)
    turned = start_component(-target, axis)  # every scale becomes negative, so that all signs are flipped
    for start in (start_component(target, axis), turned):
        found = fit_scales(start, target, hessian)
        assert found.image is not None
        torch.testing.assert_close(found.image * found.row[:, None], found.dense() @ hessian, rtol=1e-4, atol=1e-3)


def test_a_factor_solves_as_the_hessian_does() -> None:
    hessian, rows = positive(24), drawn(7, 24)
    found = inverse_factor(hessian.double()).solved(rows)
    torch.testing.assert_close(found, torch.linalg.solve(hessian.double(), rows.double().t()).t().float())


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    logits = torch.tensor([0.0, -torch.inf, 1.0, 2.0]).expand(20000, 4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        counts = torch.bincount(draw_tokens(logits)[:, 0], minlength=4) / len(logits)
    torch.testing.assert_close(counts, torch.softmax(logits[0], 0), atol=0.02, rtol=0.0)
    assert counts[1] == 0


@pytest.mark.parametrize("length", [2, 64, 128, 200, 256, 511, 512, 2048])
def test_pieces_fill_a_sample(length: int) -> None:
    count, tokens = pieces_of(length)
    assert count * tokens >= length > (count - 1) * tokens
    assert tokens <= 256


def test_a_long_start_has_a_longer_piece() -> None:
    assert pieces_of(512, start=64) == pieces_of(512) == (4, 128)
    assert pieces_of(512, start=100) == (2, 256)
    assert pieces_of(512, start=600) == (1, 512)


def test_a_part_of_a_text_is_of_all_kinds_and_large_enough() -> None:
    batches = [TokenBatch(torch.zeros(4, 16, dtype=torch.int64), i >= 6) for i in range(10)]
    text = TextBatches(every=batches, places=range(10))
    part = text.enough_for(80)  # 320 of 640 tokens
    assert [batch.validation for batch in part.batches] == [False] * 3 + [True] * 2
    assert text.enough_for(1000).batches == batches
    assert [batch.validation for batch in text.enough_for(1).batches] == [False, True]


@pytest.mark.parametrize("width", [1, 40, 1000])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_processes_read_the_part_of_a_text_that_one_would(width: int, count: int) -> None:
    batches = [TokenBatch(torch.zeros(4, 16, dtype=torch.int64), i >= 6) for i in range(10)]
    whole = TextBatches(every=batches, places=range(10)).enough_for(width)
    parts = [TextBatches(every=batches, places=range(rank, 10, count)).enough_for(width) for rank in range(count)]
    assert sorted(i for part in parts if not part.idle for i in part.places) == list(whole.places)
    assert all(part.places for part in parts)


def test_threads_are_set_for_libraries_pools_and_children_and_given_back() -> None:
    before = os.environ.get("OMP_NUM_THREADS"), torch.get_num_threads(), pool_size()
    with use_threads(3):
        assert (os.environ["OMP_NUM_THREADS"], torch.get_num_threads(), pool_size()) == ("3", 3, 3)
        with one_blas_thread():
            found = ThreadpoolController().select(internal_api="openblas").info()
            assert all(library["num_threads"] == 1 for library in found)
    assert (os.environ.get("OMP_NUM_THREADS"), torch.get_num_threads(), pool_size()) == before
    with use_threads(None):
        assert pool_size() == before[2]


def test_a_file_without_a_text_is_the_same_with_any_number_of_threads(tmp_path: Path) -> None:
    base, tuned, _ = llama_pair(tmp_path)
    files = []
    for count in (1, 3):
        with use_threads(count):
            files.append(compress(base, tuned, tmp_path / f"{count}.pxd", fit="none", force=True).path.read_bytes())
    assert files[0] == files[1]


def test_a_fitted_file_is_the_same_again_with_the_same_number_of_threads(tmp_path: Path) -> None:
    base, tuned, text = llama_pair(tmp_path)
    ids = []
    for name in ("one", "two"):
        with use_threads(2):
            ids.append(compress(base, tuned, tmp_path / f"{name}.pxd", calibration=text, **FEW).content_id)
    assert ids[0] == ids[1]
