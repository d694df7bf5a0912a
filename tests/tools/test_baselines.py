"""The baselines of the benchmarks follow their papers, because a weak baseline would make peraxis look better."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import linear, mse_loss

import peraxis_format as pxd
from peraxis_format import Axis
from peraxis_tools.evaluate.fidelity import compare
from peraxis_tools.load import load_model
from tests.tools.compress_pairs import llama_config, write_pair, write_text

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def baselines() -> ModuleType:
    """Put benchmarks/ on the path, because its modules import each other as scripts do."""
    sys.path.insert(0, str(BENCHMARKS))
    import baselines
    import baselines.bitdelta
    import baselines.distill
    import baselines.pair
    import baselines.paper
    import baselines.tuned

    return baselines


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("baselines")
    write_pair(folder, llama_config(num_hidden_layers=2), dtype=torch.bfloat16, step=0.05)
    write_text(folder / "train.jsonl", seed=2)
    return folder


@pytest.fixture
def pair(baselines: Any, folder: Path) -> Any:
    """A new pair for each test, because a fit changes its student."""
    return baselines.pair.load_pair(folder / "base", folder / "tuned")


@pytest.fixture(scope="module")
def ids(baselines: Any, folder: Path) -> torch.Tensor:
    samples = baselines.pair.read_samples(folder / "tuned", folder / "train.jsonl", samples=16, length=24)
    return torch.from_numpy(samples.ids)


def test_only_the_linears_of_blocks_are_compressed(baselines: Any, pair: Any) -> None:
    names = list(baselines.bitdelta.bitdelta(pair, None))
    assert len(names) == 2 * 7
    assert all(".layers." in name for name in names)


def test_the_student_has_the_bases_linears_and_all_else_of_the_fine_tune(pair: Any) -> None:
    linears = {f"{name}.weight" for name, _, _ in pair.linears()}
    theirs = dict(pair.teacher.named_parameters())
    for name, parameter in pair.student.named_parameters():
        assert torch.equal(parameter, theirs[name]) == (name not in linears)


def test_bitdelta_starts_from_the_mean_magnitude(baselines: Any, pair: Any) -> None:
    modules = baselines.bitdelta.bitdelta(pair, None)
    for name, teacher, student in pair.linears():
        delta = teacher.weight - student.weight
        assert float(modules[name].scale) == pytest.approx(float(delta.abs().mean()))
        assert torch.equal(modules[name].signs > 0, delta >= 0)


def logit_error(pair: Any, modules: Any, ids: torch.Tensor) -> float:
    weights = {f"{name}.weight": module.weight() for name, module in modules.items()}
    with torch.no_grad():
        ours = torch.func.functional_call(pair.student, weights, kwargs={"input_ids": ids}).logits
        return float(mse_loss(ours, pair.teacher(input_ids=ids).logits))


def test_distillation_lowers_the_error_of_the_logits(baselines: Any, pair: Any, ids: torch.Tensor) -> None:
    before = logit_error(pair, baselines.bitdelta.bitdelta(pair, None), ids)
    after = logit_error(pair, baselines.bitdelta.bitdelta(pair, ids, lr=1e-3), ids)
    assert after < 0.95 * before


def test_the_papers_fit_takes_the_axis_of_less_validation_error(baselines: Any, pair: Any, ids: torch.Tensor) -> None:
    paper = baselines.paper
    settings = paper.PaperSettings(row_lr=1e-3, col_lr=1e-3)
    name, teacher, student = next(pair.linears())
    base = student.weight.detach().clone()
    inputs = paper._gather(pair.student, student, ids, 4, output=False)
    targets = paper._gather(pair.teacher, teacher, ids, 4, output=True)
    errors = {}
    for axis in (Axis.ROW, Axis.COL):
        module = baselines.pair.SignedLinear.of(name, base, teacher.weight, axis)
        start = sum(float(mse_loss(linear(x, module.weight()), y)) for x, y in zip(inputs, targets, strict=True))
        paper._train(module, None, inputs[:12], targets[:12], lr=1e-3, epochs=5)
        end = sum(float(mse_loss(linear(x, module.weight()), y)) for x, y in zip(inputs, targets, strict=True))
        assert end < start
        held = zip(inputs[12:], targets[12:], strict=True)
        errors[axis] = sum(float(mse_loss(linear(x, module.weight()), y)) for x, y in held)
    chosen = paper.fit_modules(pair, ids[:12], ids[12:], settings)[name]
    assert chosen.axis is min(errors, key=lambda axis: errors[axis])


def test_the_student_of_the_papers_fit_holds_what_is_fitted_so_far(
    baselines: Any, pair: Any, ids: torch.Tensor
) -> None:
    seen: list[str] = []

    def progress(name: str) -> None:
        seen.append(name)
        for done, teacher, student in pair.linears():
            delta = teacher.weight - student.weight
            assert (done in seen) == (not torch.equal(student.weight, start[done])), (done, float(delta.abs().mean()))

    start = {name: student.weight.detach().clone() for name, _, student in pair.linears()}
    modules = baselines.paper.fit_modules(pair, ids[:8], ids[8:10], baselines.paper.PaperSettings(), progress=progress)
    assert seen == list(modules)


def test_the_procedure_brings_the_student_nearer_to_the_fine_tune(baselines: Any, pair: Any, ids: torch.Tensor) -> None:
    before = compare(pair.teacher, pair.student, [ids]).kl
    modules = baselines.paper.paper(pair, ids[:8], ids[8:10], ids)
    for name, module in modules.items():
        with torch.no_grad():
            pair.student.get_submodule(name).weight.copy_(module.weight())
    assert compare(pair.teacher, pair.student, [ids]).kl < 0.75 * before


def test_what_is_written_is_what_was_fitted(baselines: Any, pair: Any, folder: Path, tmp_path: Path) -> None:
    modules = baselines.bitdelta.bitdelta(pair, None)
    for i, module in enumerate(modules.values()):
        if i % 3:
            axis = Axis.ROW if i % 3 == 1 else Axis.COL
            size = (len(module.signs), 1) if axis is Axis.ROW else (1, module.signs.shape[1])
            module.axis = axis
            module.scale = torch.linspace(-0.02, 0.05, max(size)).reshape(size)  # some are negative, which flips signs
    baselines.pair.write_pxd(tmp_path / "out.pxd", pair, modules)
    with pxd.open(tmp_path / "out.pxd") as delta:
        delta.verify()
        encodings = {entry.name: entry.encoding for entry in delta.manifest.modules}
    assert {name for name, e in encodings.items() if e is pxd.Encoding.SIGN} == {f"{name}.weight" for name in modules}
    model = load_model(folder / "base", tmp_path / "out.pxd", dtype=torch.float32)
    for name, module in modules.items():
        expected = module.weight().to(torch.bfloat16).float()
        np.testing.assert_allclose(model.get_submodule(name).weight.detach(), expected, rtol=2**-7, atol=1e-4)


def test_tuning_never_ends_worse_than_the_papers_own_rate(baselines: Any) -> None:
    errors = {1e-4: 3.0, 3e-4: 2.0, 1e-3: 2.5, 3e-3: 1.0, 1e-2: 4.0, 3e-2: 5.0}
    tried: list[float] = []

    def attempt(lr: float) -> float:
        tried.append(lr)
        return next(error for rate, error in errors.items() if rate == pytest.approx(lr))

    best, _ = baselines.tuned._climb(attempt, baselines.tuned._rates(1e-4), lambda error: error)
    assert best == pytest.approx(3e-3)  # the search passes one bad rate and stops after two
    assert len(tried) == 6
