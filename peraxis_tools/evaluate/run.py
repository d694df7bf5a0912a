"""The verb eval: turn texts into samples, then compare each candidate with the fine-tuned model.

Memory: two models (the fine-tuned one, and one candidate at a time) and the logits of one batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import peraxis_format as pxd
from peraxis_tools.arguments import check_choice, check_least, check_paths, check_texts_by_domain, refuse_idle, sequence
from peraxis_tools.checkpoints.checkpoint import open_checkpoint, refuse_swapped
from peraxis_tools.checkpoints.positions import DEFAULT_LENGTH
from peraxis_tools.deltas.predecessor import predecessor_named
from peraxis_tools.display.notes import note
from peraxis_tools.display.progress import Staged, StagedProgress, watched_stages
from peraxis_tools.errors import ToolError
from peraxis_tools.evaluate.origin import other_fine_tune
from peraxis_tools.evaluate.tasks import run_tasks
from peraxis_tools.evaluate.types import (
    CANDIDATES,
    DomainResult,
    EvaluateResult,
    Fidelity,
    TaskResult,
    recovered_fraction,
)
from peraxis_tools.process.optional import require
from peraxis_tools.process.threads import limit_torch
from peraxis_tools.texts.samples import Samples, check_texts, load_samples

if TYPE_CHECKING:
    import torch

__all__ = ["EvaluationDType", "evaluate", "worst_kl"]

EvaluationDType: TypeAlias = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    """The options of `evaluate`. lenient: leave out, with a note, a candidate that transformers cannot hold."""

    sequence_length: int
    samples: int
    batch_size: int
    seed: int
    compute_dtype: str
    candidates: Sequence[str]
    lenient: bool
    tasks: Sequence[str]
    task_limit: int | None
    task_path: Path | None
    text_column: str | None


def evaluate(
    base: str | Path,
    fine_tuned: str | Path,
    delta: str | Path,
    texts: Mapping[str, str | Path],
    *,
    sequence_length: int = DEFAULT_LENGTH,
    samples: int = 50,
    batch_size: int = 8,
    seed: int = 0,
    device: str = "auto",
    compute_dtype: EvaluationDType = "float32",
    candidates: Sequence[str] | None = None,
    tasks: Sequence[str] = (),
    task_limit: int | None = None,
    task_path: str | Path | None = None,
    text_column: str | None = None,
    base_revision: str | None = None,
    fine_tuned_revision: str | None = None,
    progress: StagedProgress = None,
) -> EvaluateResult:
    """Compare base + delta with the fine-tuned checkpoint.

    texts: from the name of a domain to c4, a datasets id, or a file (json, jsonl, parquet, txt, csv; also .gz). A text
    is cut into at most `samples` samples of `sequence_length` tokens, without overlap or padding. candidates: some of
    base, merged and on-the-fly; the last one always computes in float32, the others in compute_dtype. None means all;
    on-the-fly is then left out, with a note, where transformers renames the weights. tasks: names of lm-eval, with
    task_limit questions each. task_path: a folder with further task definitions. batch_size: samples in one forward
    pass. seed: of the order of documents. progress: called with (stage, done, total), or True for bars.
    Raises ToolError, PxdError, CheckpointError.
    """
    check_paths(base=base, fine_tuned=fine_tuned, delta=delta)
    check_paths(task_path=task_path, optional=True)
    options = _Options(
        sequence_length=sequence_length,
        samples=samples,
        batch_size=batch_size,
        seed=seed,
        compute_dtype=compute_dtype,
        candidates=sequence(CANDIDATES if candidates is None else candidates),
        lenient=candidates is None,
        tasks=sequence(tasks),
        task_limit=task_limit,
        task_path=None if task_path is None else Path(task_path),
        text_column=text_column,
    )
    _check_arguments(texts, options)
    refuse_swapped(fine_tuned, delta)
    refuse_swapped(base, delta)
    require("an evaluation", "torch", "transformers", "datasets", extra="compress")
    if options.tasks:
        require("--tasks", "lm_eval")
    from peraxis_tools.checkpoints.environment import resolve_device
    from peraxis_tools.process.products import fast_products
    from peraxis_tools.process.quiet import quiet_transformers

    limit_torch()
    with (
        pxd.open(delta) as file,
        predecessor_named(file, several=False),
        quiet_transformers(),
        watched_stages(progress) as step,
    ):
        models = _Models(
            base=base,
            fine_tuned=fine_tuned,
            delta=delta,
            device=resolve_device(device),
            compute_dtype=compute_dtype,
            base_revision=base_revision,
            fine_tuned_revision=fine_tuned_revision,
        )
        tokenizer, sampled = _sampled_texts(texts, fine_tuned, options, revision=fine_tuned_revision)
        with open_checkpoint(fine_tuned, revision=fine_tuned_revision) as checkpoint:
            other = other_fine_tune(file.manifest, checkpoint)
        with fast_products():
            found = _compare_all(models, tokenizer, sampled, options, step)
        results = _run_tasks(models, tokenizer, options) if options.tasks else ()
        calibration = file.manifest.calibration
        return EvaluateResult(
            base=str(base),
            fine_tuned=str(fine_tuned),
            delta=str(delta),
            content_id=file.content_id,
            bytes=file.size,
            other_fine_tune=other,
            domains=tuple(_domain(name, text, found[name], calibration) for name, text in sampled.items()),
            tasks=results,
        )


def _check_arguments(texts: Mapping[str, str | Path], options: _Options) -> None:
    """Raise ToolError for arguments that are wrong, or that do nothing."""
    check_texts_by_domain(texts)
    for candidate in options.candidates:
        check_choice("candidates", candidate, CANDIDATES)
    check_texts(texts.values())
    if not texts and not options.tasks:
        raise ToolError("nothing to evaluate on; give texts (--text domain=file) or tasks (--tasks)")
    if not options.tasks:
        refuse_idle("without tasks", task_limit=options.task_limit, task_path=options.task_path)
    if not texts:
        refuse_idle("without texts", text_column=options.text_column)
    check_choice("compute_dtype", options.compute_dtype, get_args(EvaluationDType))
    check_least("sequence_length", options.sequence_length, 2)
    counts = {"samples": options.samples, "batch_size": options.batch_size, "task_limit": options.task_limit}
    for name, value in counts.items():
        check_least(name, value, 1)
    check_least("seed", options.seed, 0)


def _sampled_texts(
    texts: Mapping[str, str | Path], fine_tuned: str | Path, options: _Options, *, revision: str | None
) -> tuple[Any, dict[str, Samples]]:
    """The fine-tuned tokenizer, and the samples of each text. Raises ToolError if the model cannot take them."""
    from peraxis_tools.evaluate.models import check_model, check_tokens, load_tokenizer

    length = check_model(fine_tuned, length=options.sequence_length, revision=revision)
    tokenizer = load_tokenizer(fine_tuned, revision=revision)
    sampled = {
        domain: load_samples(
            str(source),
            tokenizer,
            samples=options.samples,
            length=length,
            seed=options.seed,
            text_column=options.text_column,
        )
        for domain, source in texts.items()
    }
    check_tokens(fine_tuned, (text.ids for text in sampled.values()), revision=revision)
    return tokenizer, sampled


def _run_tasks(models: _Models, tokenizer: Any, options: _Options) -> tuple[TaskResult, ...]:
    return run_tasks(
        models.load,
        tokenizer,
        options.tasks,
        limit=options.task_limit,
        path=options.task_path,
        batch_size=options.batch_size,
    )


def worst_kl(
    base: str | Path, fine_tuned: str | Path, delta: str | Path, texts: Mapping[str, str | Path], **options: Any
) -> tuple[str, float]:
    """The domain with the largest KL of the merged model, and this KL in nats per token, for a bound (--max-kl).

    options: those of `evaluate`, except candidates and tasks.
    """
    found = evaluate(base, fine_tuned, delta, texts, candidates=("merged",), **options).worst
    if found is None:
        raise ToolError("a bound on KL needs a text to measure it on")
    return found.domain, found.candidates["merged"].kl


class _Models:
    """Loads the models of one evaluation by name."""

    def __init__(
        self,
        *,
        base: str | Path,
        fine_tuned: str | Path,
        delta: str | Path,
        device: torch.device,
        compute_dtype: str,
        base_revision: str | None,
        fine_tuned_revision: str | None,
    ) -> None:
        import torch

        self._base, self._fine_tuned, self._delta = base, fine_tuned, delta
        self._base_revision, self._fine_tuned_revision = base_revision, fine_tuned_revision
        self.device = device
        self._dtype: torch.dtype = getattr(torch, compute_dtype)

    def load(self, name: str) -> Any:
        """`fine-tuned` or one of CANDIDATES."""
        from peraxis_tools.evaluate import models

        kind: dict[str, Any] = {"dtype": self._dtype, "device": self.device}
        if name == "fine-tuned":
            return models.load_checkpoint_model(self._fine_tuned, revision=self._fine_tuned_revision, **kind)
        if name == "base":
            return models.load_checkpoint_model(self._base, revision=self._base_revision, **kind)
        if name == "merged":
            return models.load_merged(self._base, self._delta, revision=self._base_revision, **kind)
        return models.load_on_the_fly(self._base, self._delta, revision=self._base_revision, device=self.device)


def _compare_all(
    models: _Models,
    tokenizer: Any,
    sampled: Mapping[str, Samples],
    options: _Options,
    progress: Staged,
) -> dict[str, dict[str, Fidelity]]:
    """domain -> candidate -> Fidelity."""
    import torch

    from peraxis_tools.evaluate.fidelity import compare
    from peraxis_tools.evaluate.models import RenamedWeightError
    from peraxis_tools.evaluate.readable import readable, special_ids

    found: dict[str, dict[str, Fidelity]] = {domain: {} for domain in sampled}
    if not sampled:
        return found
    reference = models.load("fine-tuned")
    total, done = len(options.candidates) * len(sampled), 0
    for candidate in options.candidates:
        try:
            model = models.load(candidate)
        except RenamedWeightError as error:
            if not options.lenient:
                raise
            note(f"the candidate {candidate} is left out: {error.reason}")
            done += len(sampled)
            progress("evaluate", done, total)
            continue
        for domain, its in sampled.items():
            # A base with another vocabulary size has other logits, which cannot be compared.
            if model.config.get_text_config().vocab_size == reference.config.get_text_config().vocab_size:
                batches = torch.from_numpy(its.ids).split(options.batch_size)
                fidelity = compare(reference, model, batches, special=special_ids(tokenizer))
                found[domain][candidate] = readable(fidelity, tokenizer)
            done += 1
            progress("evaluate", done, total)
        del model
    return found


def _seen(samples: Samples, calibration: pxd.Calibration | None) -> bool:
    """Whether the fit used these tokens, or a text of this name (additions follow the name after `; `)."""
    if calibration is None:
        return False
    return calibration.digest == samples.digest or samples.source in calibration.source.split("; ")


def _domain(
    name: str, samples: Samples, found: Mapping[str, Fidelity], calibration: pxd.Calibration | None
) -> DomainResult:
    any_one = next(iter(found.values()))
    base = found.get("base")
    recovered = {
        candidate: recovered_fraction(base=base.loss, candidate=its.loss, fine_tuned=its.loss_fine_tuned)
        for candidate, its in found.items()
        if base is not None
    }
    return DomainResult(
        domain=name,
        source=samples.source,
        digest=samples.digest,
        samples=len(samples.ids),
        sequence_length=samples.ids.shape[1],
        tokens=any_one.tokens,
        perplexity_fine_tuned=any_one.perplexity_fine_tuned,
        candidates=dict(found),
        perplexity={candidate: its.perplexity for candidate, its in found.items()},
        recovered=recovered,
        seen=_seen(samples, calibration),
    )
