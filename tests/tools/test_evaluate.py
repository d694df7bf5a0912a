"""The figures of `eval` equal their formulas in F64, and its candidates are the models of their names."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import peraxis_format as pxd
from peraxis_tools.checkpoints.checkpoint import open_checkpoint
from peraxis_tools.cli import cli
from peraxis_tools.compress import compress
from peraxis_tools.errors import ToolError
from peraxis_tools.evaluate import EvaluateResult, Fidelity, evaluate, recovered_fraction, worst_kl
from peraxis_tools.evaluate.fidelity import compare
from peraxis_tools.evaluate.models import load_merged, load_on_the_fly
from peraxis_tools.evaluate.origin import other_fine_tune
from tests.tools.compress_pairs import llama_config, write_pair, write_text

VOCABULARY = 11


class Bigram:
    """A model whose logits are the table row of the last token, so that all its figures can be computed by hand."""

    device = torch.device("cpu")

    def __init__(self, seed: int, *, vocabulary: int = VOCABULARY) -> None:
        self.table = torch.randn(VOCABULARY, vocabulary, generator=torch.Generator().manual_seed(seed))

    def __call__(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


def tokens(samples: int = 6, length: int = 9) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(5))


def test_equal_models_have_no_worst_token() -> None:
    same, other = (compare(Bigram(1), Bigram(seed), [tokens()]) for seed in (1, 2))
    assert (same.kl, same.tail.worst) == (0.0, ())
    assert [worst.kl > 0 for worst in other.tail.worst] == [True] * len(other.tail.worst) != []


def by_hand(reference: Bigram, candidate: Bigram, ids: torch.Tensor) -> tuple[float, float, float]:
    """Return KL, top-1 agreement and the candidate's loss, computed in F64 by a loop over positions."""
    kl, same, loss, count = 0.0, 0, 0.0, 0
    for sample in ids.tolist():
        for token, following in pairwise(sample):
            p, q = (np.exp(model.table[token].numpy().astype(np.float64)) for model in (reference, candidate))
            p, q = p / p.sum(), q / q.sum()
            kl += float(np.sum(p * np.log(p / q)))
            same += int(p.argmax() == q.argmax())
            loss -= math.log(q[following])
            count += 1
    return kl / count, same / count, loss / count


def test_every_figure_is_its_formula() -> None:
    reference, candidate, ids = Bigram(1), Bigram(2), tokens()
    found = compare(reference, candidate, ids.split(4))
    kl, same, loss = by_hand(reference, candidate, ids)
    assert found.tokens == 6 * 8  # the last token of a sample predicts nothing
    assert found.kl == pytest.approx(kl, rel=1e-6)
    assert found.top1 == pytest.approx(same)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-6)
    assert found.loss_fine_tuned == pytest.approx(by_hand(candidate, reference, ids)[2], rel=1e-6)


def test_kl_is_from_the_fine_tuned_model_to_the_candidate_and_not_the_other_way() -> None:
    a, b, ids = Bigram(1), Bigram(2), tokens()
    assert compare(a, b, [ids]).kl != pytest.approx(compare(b, a, [ids]).kl, rel=0.01)


def test_a_model_beside_itself_has_no_divergence() -> None:
    found = compare(Bigram(1), Bigram(1), [tokens()])
    assert found.kl == 0.0
    assert found.top1 == 1.0
    assert found.loss == found.loss_fine_tuned


def test_batches_do_not_change_the_figures() -> None:
    a, b, ids = Bigram(1), Bigram(2), tokens()
    one, many = compare(a, b, [ids]), compare(a, b, ids.split(1))
    assert one == many


def test_the_standard_error_is_that_of_the_samples_means() -> None:
    a, b, ids = Bigram(1), Bigram(2), tokens()
    means = [by_hand(a, b, ids[i : i + 1])[0] for i in range(len(ids))]
    assert compare(a, b, [ids]).kl_error == pytest.approx(
        float(np.std(means, ddof=1)) / math.sqrt(len(means)), rel=1e-5
    )
    assert compare(a, b, [ids[:1]]).kl_error is None


def test_models_of_two_vocabularies_are_not_compared() -> None:
    with pytest.raises(ValueError, match="vocabularies of 11 and 13"):
        compare(Bigram(1), Bigram(2, vocabulary=13), [tokens()])


def test_no_token_to_predict_is_an_error_and_no_figure() -> None:
    with pytest.raises(ValueError, match="no token to predict"):
        compare(Bigram(1), Bigram(2), [])


def test_the_recovered_fraction_is_0_for_the_base_and_1_for_the_fine_tune() -> None:
    assert recovered_fraction(base=3.0, candidate=3.0, fine_tuned=2.0) == 0.0
    assert recovered_fraction(base=3.0, candidate=2.0, fine_tuned=2.0) == 1.0
    assert recovered_fraction(base=3.0, candidate=2.25, fine_tuned=2.0) == 0.75


def test_where_the_fine_tune_gained_nothing_there_is_nothing_to_recover() -> None:
    assert recovered_fraction(base=2.0, candidate=2.5, fine_tuned=2.0) is None
    assert recovered_fraction(base=2.0, candidate=2.5, fine_tuned=3.0) is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, tuned/, held-out.jsonl, train.jsonl, one.pxd (a scalar per tensor), fitted.pxd (fitted on train.jsonl)."""
    folder = tmp_path_factory.mktemp("evaluate")
    base, tuned = write_pair(folder, llama_config(), dtype=torch.bfloat16)
    write_text(folder / "held-out.jsonl", seed=1)
    train = write_text(folder / "train.jsonl", seed=2)
    compress(base, tuned, folder / "one.pxd", fit="none", axis="tensor", embeddings="full", force=True)
    compress(
        base, tuned, folder / "fitted.pxd", calibration=str(train), fit="closed-form",
        calibration_samples=8, sequence_length=32, force=True,
    )  # fmt: skip
    return folder


def run(folder: Path, delta: str = "one.pxd", **options: Any) -> EvaluateResult:
    texts = options.pop("texts", {"held": folder / "held-out.jsonl"})
    settings = {"samples": 8, "sequence_length": 32, "device": "cpu", **options}
    return evaluate(folder / "base", folder / "tuned", folder / delta, texts, **settings)


def test_an_exact_delta_is_the_fine_tune(folder: Path, tmp_path: Path) -> None:
    with pxd.Safetensors.open(folder / "base") as base, pxd.Safetensors.open(folder / "tuned") as tuned:
        exact = tmp_path / "exact.pxd"
        with pxd.DeltaWriter(exact, base=pxd.Identity(id="b"), fine_tuned=pxd.Identity(id="t")) as writer:
            for info in tuned.infos():
                ref = pxd.BaseRef(dtype=base[info.name].dtype, shape=info.shape, sha256=base.sha256(info.name))
                writer.add(
                    pxd.ModuleDelta(
                        name=info.name,
                        shape=info.shape,
                        dtype=info.dtype,
                        encoding=pxd.Encoding.FULL,
                        base=ref,
                        full=tuned.read(info.name),
                    )
                )
            writer.finish()
    (domain,) = evaluate(
        folder / "base", folder / "tuned", exact, {"held": folder / "held-out.jsonl"}, samples=4, sequence_length=32
    ).domains
    for name in ("merged", "on-the-fly"):
        assert domain.candidates[name].kl == 0.0
        assert domain.candidates[name].top1 == 1.0
    assert domain.candidates["base"].kl > 1e-3
    assert domain.recovered.get("merged") in (None, 1.0)


def test_windows_do_not_overlap_and_hold_no_padding(folder: Path) -> None:
    (domain,) = run(folder).domains
    assert (domain.samples, domain.sequence_length) == (8, 32)
    assert domain.tokens == 8 * 31


def test_the_base_is_worse_than_its_delta(folder: Path) -> None:
    (domain,) = run(folder).domains
    assert domain.candidates["merged"].kl < domain.candidates["base"].kl


def test_what_is_merged_is_rounded_and_what_is_on_the_fly_is_not(folder: Path) -> None:
    options: dict[str, Any] = {"device": torch.device("cpu")}
    merged = load_merged(folder / "base", folder / "one.pxd", dtype=torch.float32, **options)
    flying = load_on_the_fly(folder / "base", folder / "one.pxd", **options)
    name = "model.layers.1.mlp.down_proj.weight"
    with pxd.open(folder / "one.pxd") as delta, pxd.Safetensors.open(folder / "base") as base:
        unrounded = pxd.to_float32(base.read(name), pxd.DType.BF16) + pxd.dense_delta(delta.load(name))
    weight = torch.from_numpy(unrounded)
    assert torch.equal(flying.get_parameter(name), weight)
    assert torch.equal(merged.get_parameter(name), weight.to(torch.bfloat16).float())
    assert not torch.equal(merged.get_parameter(name), weight)


def test_another_fine_tune_than_that_of_the_delta_is_said_in_the_report_and_in_json(folder: Path) -> None:
    assert run(folder).other_fine_tune is None
    words = ["eval", *(str(folder / name) for name in ("base", "base", "one.pxd"))]
    words += [
        "--text",
        f"held={folder / 'held-out.jsonl'}",
        "--samples",
        "2",
        "--sequence-length",
        "32",
        "--no-on-the-fly",
    ]
    said = CliRunner().invoke(cli, words)
    line = f"{folder / 'base'} is not the checkpoint that this delta was made from: "
    assert line in " ".join(said.stdout.split())
    found = json.loads(CliRunner().invoke(cli, [*words, "--json"]).stdout)["other_fine_tune"]
    assert found.startswith("is not the checkpoint that this delta was made from: ")
    assert found.endswith(" differs")


def test_the_name_of_a_fine_tune_counts_where_no_exact_tensor_has_changed(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "tuned", tmp_path / "copied")
    with (
        pxd.open(folder / "one.pxd") as delta,
        open_checkpoint(folder / "tuned") as tuned,
        open_checkpoint(tmp_path / "copied") as copied,
    ):
        signs = tuple(module for module in delta.manifest.modules if module.encoding is pxd.Encoding.SIGN)
        assert len(signs) < len(delta.manifest.modules)
        only_signs = dataclasses.replace(delta.manifest, modules=signs)
        assert other_fine_tune(delta.manifest, copied) is None
        assert other_fine_tune(only_signs, tuned) is None
        assert other_fine_tune(only_signs, copied) == (
            "may not be the checkpoint that this delta was made from, which was named tuned"
        )
        of_hub = dataclasses.replace(only_signs, fine_tuned=pxd.Identity(id="org/copied"))
        assert other_fine_tune(of_hub, copied) is None


def test_a_tensor_that_is_left_as_in_the_base_is_no_sign_of_another_fine_tune(folder: Path) -> None:
    """A small target leaves changed tensors at the base. In an update, `same` says that nothing has changed."""
    with pxd.open(folder / "one.pxd") as delta, open_checkpoint(folder / "tuned") as tuned:
        left = tuple(
            dataclasses.replace(module, encoding=pxd.Encoding.SAME, components=(), sha256=None)
            if module.encoding is pxd.Encoding.SIGN
            else module
            for module in delta.manifest.modules
        )
        assert left != delta.manifest.modules
        small = dataclasses.replace(delta.manifest, modules=left)
        assert other_fine_tune(small, tuned) is None
        told = other_fine_tune(dataclasses.replace(small, result="0" * 64), tuned)
        assert told is not None
        assert told.endswith(" differs")


def test_a_text_that_the_fit_saw_is_called_so(folder: Path) -> None:
    texts = {"train": folder / "train.jsonl", "held": folder / "held-out.jsonl"}
    seen = {domain.domain: domain.seen for domain in run(folder, "fitted.pxd", texts=texts).domains}
    assert seen == {"train": True, "held": False}
    # Other samples of the same text come from the same documents.
    (other,) = run(folder, "fitted.pxd", texts={"train": folder / "train.jsonl"}, samples=4, seed=3).domains
    assert other.seen


def test_the_bound_on_kl_is_the_worst_text_merged(folder: Path) -> None:
    texts = {"train": folder / "train.jsonl", "held": folder / "held-out.jsonl"}
    found = run(folder, texts=texts)
    bound = worst_kl(
        folder / "base", folder / "tuned", folder / "one.pxd", texts, samples=8, sequence_length=32, device="cpu"
    )
    kl = {domain.domain: domain.candidates["merged"].kl for domain in found.domains}
    assert bound == max(kl.items(), key=lambda item: item[1])


def test_a_kl_that_is_no_number_is_the_worst(folder: Path) -> None:
    found = run(folder, texts={"train": folder / "train.jsonl", "held": folder / "held-out.jsonl"})
    for odd in found.domains:
        fidelity = dataclasses.replace(odd.candidates["merged"], kl=math.nan)
        lost = dataclasses.replace(odd, candidates={**odd.candidates, "merged": fidelity})
        domains = tuple(lost if domain is odd else domain for domain in found.domains)
        assert dataclasses.replace(found, domains=domains).worst is lost


def test_a_base_of_another_vocabulary_is_left_out(folder: Path, tmp_path: Path) -> None:
    base, tuned = folder / "base", tmp_path / "resized"
    write_pair(tmp_path / "other", llama_config(vocab_size=40), dtype=torch.bfloat16)
    (tmp_path / "other" / "tuned").rename(tuned)
    compress(base, tuned, tmp_path / "resized.pxd", fit="none", force=True)
    (domain,) = evaluate(
        base, tuned, tmp_path / "resized.pxd", {"held": folder / "held-out.jsonl"}, samples=4, sequence_length=32
    ).domains
    assert set(domain.candidates) == {"merged", "on-the-fly"}
    assert domain.recovered == {}


def test_nothing_to_evaluate_on_is_an_error(folder: Path) -> None:
    with pytest.raises(ToolError, match="nothing to evaluate on"):
        run(folder, texts={})


def invoke(folder: Path, *options: str) -> Any:
    paths = [str(folder / name) for name in ("base", "tuned", "one.pxd")]
    return CliRunner().invoke(cli, ["eval", *paths, "--samples", "4", "--sequence-length", "32", *options])


def test_the_command_reports_as_json(folder: Path) -> None:
    done = invoke(folder, "--text", f"held={folder / 'held-out.jsonl'}", "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["schema"] == "peraxis.eval/1"
    (domain,) = document["domains"]
    assert domain["domain"] == "held"
    assert set(domain["candidates"]) == {"base", "merged", "on-the-fly"}
    assert domain["candidates"]["merged"].keys() == {f.name for f in Fidelity.__dataclass_fields__.values()}


def test_the_command_reports_to_a_person(folder: Path) -> None:
    done = invoke(folder, "--text", str(folder / "held-out.jsonl"), "--no-on-the-fly")
    assert done.exit_code == 0, done.output
    assert "merged" in done.stdout
    assert "on the fly" not in done.stdout


def test_a_domain_given_twice_is_refused(folder: Path) -> None:
    text = f"held={folder / 'held-out.jsonl'}"
    done = invoke(folder, "--text", text, "--text", text)
    assert done.exit_code == 2
    assert "given twice" in done.output


@pytest.fixture
def without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)


@pytest.mark.usefixtures("without_lm_eval")
def test_tasks_without_lm_eval_name_the_command_that_installs_it(folder: Path) -> None:
    with pytest.raises(ToolError, match=r"pip install 'peraxis\[tasks\]'"):
        run(folder, texts={}, tasks=("arc_easy",))
