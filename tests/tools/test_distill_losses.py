"""The losses of distillation: logits in parts, and a teacher that is freed once its states are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from peraxis_tools.compress.distill.losses import Losses, TeacherStates
from peraxis_tools.compress.distill.parametrization import BuiltWeights
from peraxis_tools.compress.model import layerwise_model as module
from peraxis_tools.compress.model.layerwise_model import LayerwiseModel
from peraxis_tools.compress.run.work_folder import WorkFolder

VOCABULARY, WIDTH, LENGTH = 32, 16, 12


def model(seed: int, *, tied: bool = False) -> LayerwiseModel:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    made = LayerwiseModel(config, dtype=torch.float32, device=torch.device("cpu"))
    draw = torch.Generator().manual_seed(seed)
    for name, value in list(made.model.named_parameters()):
        made.set(name, torch.randn(value.shape, generator=draw) * 0.2)
    made.retie()
    return made


def ids(count: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(7))


def losses(
    tmp_path: Path, *, kind: str, limit: int = 1 << 30, tied: bool = False
) -> tuple[Losses, LayerwiseModel, LayerwiseModel]:
    teacher, student = model(1, tied=tied), model(2, tied=tied)
    splits = {"fit": ids(3), "held-out": ids(2)}
    tmp_path.mkdir(exist_ok=True)
    targets = TeacherStates(teacher, WorkFolder(tmp_path / "delta.pxd", "digest", resume=False), limit)
    targets.keep(splits, lambda done, total: None)
    return Losses(student=student, built=BuiltWeights(), targets=targets, splits=splits, kind=kind), teacher, student


def reference(student: LayerwiseModel, samples: Tensor, kind: str) -> Tensor:
    """The mean loss in one piece."""
    target = model(1).model(input_ids=samples).logits.double()
    logits = student.model(input_ids=samples).logits.double()
    if kind == "mse":
        return (logits - target).square().mean()
    log_p, log_q = torch.log_softmax(target, -1), torch.log_softmax(logits, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


@pytest.mark.parametrize("kind", ["kl", "mse"])
@pytest.mark.parametrize("tokens", [1, 5, LENGTH])
def test_logits_in_parts_give_the_loss_and_the_gradients_of_all_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, tokens: int
) -> None:
    monkeypatch.setattr(module, "LOGITS_BYTES", 4 * VOCABULARY * tokens)
    found, _, student = losses(tmp_path, kind=kind)
    parameters = [p.requires_grad_(True) for p in student.model.parameters()]
    found.backward("fit", [2, 0])
    gradients = [p.grad for p in parameters]
    expected = torch.autograd.grad(reference(student, ids(3)[[2, 0]], kind), parameters)
    for a, b in zip(gradients, expected, strict=True):
        assert a is not None
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert found.mean("held-out") == pytest.approx(reference(student, ids(2), kind).item(), rel=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_all_but_the_head_of_a_teacher_is_freed_once_its_states_are_kept(tmp_path: Path, tied: bool) -> None:
    _, freed, _ = losses(tmp_path, kind="kl", tied=tied)
    held = {name for name, parameter in freed.model.named_parameters() if not parameter.is_meta}
    assert held == {"model.norm.weight", "model.embed_tokens.weight" if tied else "lm_head.weight"}


@pytest.mark.parametrize("tied", [False, True])
def test_a_teacher_stays_beyond_the_limit_and_gives_the_same_losses(tmp_path: Path, tied: bool) -> None:
    kept, _, _ = losses(tmp_path / "all", kind="kl", tied=tied)
    one = 4 * WIDTH * LENGTH
    computed, stays, _ = losses(tmp_path / "none", kind="kl", limit=one, tied=tied)
    assert not any(parameter.is_meta for parameter in stays.model.parameters())
    assert kept.mean("held-out") == computed.mean("held-out")


def test_a_head_is_trained_alone(tmp_path: Path) -> None:
    found, _, student = losses(tmp_path, kind="kl")
    for parameter in student.model.parameters():
        parameter.requires_grad_(False)
    head = student.model.get_output_embeddings().weight.requires_grad_(True)
    found.backward("fit", [0, 1])
    (expected,) = torch.autograd.grad(reference(student, ids(3)[[0, 1]], "kl"), [head])
    assert head.grad is not None
    torch.testing.assert_close(head.grad, expected, rtol=1e-4, atol=1e-6)


def test_the_head_does_not_read_the_table_of_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    student = model(2)
    states = student.states(ids(2))
    expected = student.model(input_ids=ids(2)).logits
    table = student.model.get_input_embeddings()

    def build(_: object) -> Tensor:
        raise AssertionError("the table is built")

    monkeypatch.setattr(type(table), "forward", build)  # a class's forward, as a parametrized table has
    monkeypatch.setattr(torch.nn.functional, "embedding", build)
    assert torch.equal(student.head(ids(2), states), expected)
    monkeypatch.undo()
    torch.testing.assert_close(student.model(input_ids=ids(2)).logits, expected)
