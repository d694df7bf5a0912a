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
    import baselines.delta_come
    import baselines.distill
    import baselines.lora
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


@pytest.fixture(scope="module")
def decaying() -> tuple[torch.Tensor, torch.Tensor]:
    """A delta [300, 200] whose singular values decay, and inputs [200, 2000] of unequal sizes."""
    draw = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(300, 200, generator=draw))
    v, _ = torch.linalg.qr(torch.randn(200, 200, generator=draw))
    sizes = torch.logspace(1, -1, 200)[:, None]
    inputs = sizes * torch.randn(200, 2000, generator=draw)
    return 0.01 * (u * torch.arange(1, 201) ** -0.7) @ v.T, inputs


def output_error(delta: torch.Tensor, approximation: torch.Tensor, inputs: torch.Tensor) -> float:
    return float(((approximation - delta) @ inputs).norm() / (delta @ inputs).norm())


def test_more_bytes_of_delta_come_mean_less_error(baselines: Any, decaying: Any) -> None:
    delta, inputs = decaying
    errors = []
    for budget in (0, 1000, 2000, 4000, 7500, 12_000):
        found = baselines.delta_come.mixed_precision(delta, inputs @ inputs.T, budget)
        assert budget - 150 < found.bytes <= budget or budget == 0 == found.bytes  # a pair of 2 bits takes 135 bytes
        errors.append(output_error(delta, found.left @ found.right, inputs))
    assert errors[0] == 1.0
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.4


def test_the_bytes_of_delta_come_hold_its_codes_and_steps(baselines: Any, decaying: Any) -> None:
    delta, inputs = decaying
    found = baselines.delta_come.mixed_precision(delta, inputs @ inputs.T, delta.numel() // 8)
    widths = baselines.delta_come.bit_widths(tuple(delta.shape), delta.numel() // 8)
    assert widths[:3] == [8, 8, 3]
    assert widths[34:] == [2] * (len(widths) - 34)
    assert len(widths) > 34
    bits = 0
    for vectors in (found.left.T, found.right):
        for width, vector in zip(widths, vectors, strict=True):
            for group in vector.split(128):
                levels = group.unique()
                # Levels lie a multiple of one step apart, and there are no more than the bits can name.
                codes = (levels - levels[0]) / levels.diff().min()
                torch.testing.assert_close(codes, codes.round(), rtol=0, atol=0.02)
                assert codes[-1] < 2**width
                bits += width * len(group) + 16
    assert found.bytes == -(-bits // 8)


def test_delta_come_is_nearer_than_singular_vectors_of_equal_bytes(baselines: Any, decaying: Any) -> None:
    delta, inputs = decaying
    for budget in (4000, delta.numel() // 8):
        found = baselines.delta_come.mixed_precision(delta, inputs @ inputs.T, budget)
        rank = baselines.lora.equal_rank([tuple(delta.shape)], budget)
        left, right = baselines.lora.truncated(delta, rank)
        plain = output_error(delta, left @ right, inputs)
        assert output_error(delta, found.left @ found.right, inputs) < 0.9 * plain


def test_gptq_loses_less_of_the_outputs_than_the_nearest_levels(baselines: Any, decaying: Any) -> None:
    delta, inputs = decaying
    inputs = 0.1 * inputs + inputs[:, :20] @ inputs[:20]  # most of it in 20 directions, as activations are
    bits = torch.full((len(delta), 1), 2)
    errors = {}
    for name, hessian in (("gptq", inputs @ inputs.T), ("nearest", torch.eye(len(inputs)))):
        errors[name] = output_error(delta, baselines.delta_come.gptq(delta, bits, hessian, tall=1), inputs)
    assert errors["gptq"] < 0.8 * errors["nearest"]


def test_delta_comes_file_has_the_merged_weights_and_its_bytes_are_the_factors(
    baselines: Any, pair: Any, folder: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    import fidelity_methods

    text = folder / "train.jsonl"
    base, fine_tuned = folder / "base", folder / "tuned"
    settings = {"length": 24, "work": tmp_path, "fit": 8, "distill": 8}
    inputs = fidelity_methods.Inputs(base=base, fine_tuned=fine_tuned, calibration=text, tuning=text, **settings)
    written = fidelity_methods.METHODS["delta-come"][1](inputs, tmp_path / "out.pxd")
    modules = baselines.delta_come.delta_come(pair, ids[:8])
    model = load_model(base, tmp_path / "out.pxd", dtype=torch.float32)
    for name, _, student in pair.linears():
        merged = student.weight + modules[name].left @ modules[name].right
        assert torch.equal(model.get_submodule(name).weight, merged.to(torch.bfloat16).float())
    theirs = dict(pair.teacher.named_parameters())
    exact = sum(2 * tensor.numel() for name, tensor in theirs.items() if name.removesuffix(".weight") not in modules)
    assert written.payload == exact + sum(module.bytes for module in modules.values())


def test_the_hessians_are_those_of_the_fine_tunes_inputs(baselines: Any, pair: Any, ids: torch.Tensor) -> None:
    name, teacher, _ = list(pair.linears())[-1]
    inputs = torch.cat(baselines.paper._gather(pair.teacher, teacher, ids[:4], 2, output=False))
    found = baselines.delta_come._hessians(pair, ids[:4])[name]
    torch.testing.assert_close(found, inputs.T @ inputs)
