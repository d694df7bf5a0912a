"""`peraxis-tools eval`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from peraxis_tools.commands.options import (
    base_revision_option,
    json_option,
    quiet_option,
    refuse_given,
    texts_by_domain,
    threads_option,
)
from peraxis_tools.commands.sources import fetched
from peraxis_tools.display.bars import progress
from peraxis_tools.evaluate import CANDIDATES, EvaluationDType, evaluate
from peraxis_tools.remote.urls import without_secrets
from peraxis_tools.report.console import emit
from peraxis_tools.report.evaluate import render_evaluate

__all__ = ["command"]


def _names(ctx: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in value.split(",") if name.strip())


@click.command("eval")
@click.argument("base", metavar="BASE")
@click.argument("fine_tuned", metavar="FINE_TUNED")
@click.argument("delta", metavar="DELTA")
@click.option(
    "--text", "texts", metavar="[DOMAIN=]TEXT", multiple=True, callback=texts_by_domain,
    help="A held-out text: c4, a datasets id (org/name), or a json, jsonl, txt, csv (each also .gz) or parquet file. "
    "Repeatable.",
)  # fmt: skip
@click.option(
    "--samples", default=50, show_default=True, type=click.IntRange(min=1), help="The number of samples of each text."
)
@click.option(
    "--sequence-length",
    default=512,
    show_default=True,
    type=click.IntRange(min=2),
    help="The number of tokens in a sample.",
)
@click.option(
    "--batch-size",
    default=8,
    show_default=True,
    type=click.IntRange(min=1),
    help="The number of samples in one forward pass.",
)
@click.option("--text-column", help="The column of the text.  [default: text, else all text columns]")
@click.option(
    "--on-the-fly/--no-on-the-fly",
    default=None,
    help="Also measure the sums of base and signs unrounded, as a server computes them for each batch.  "
    "[default: where transformers keeps the weights' names]",
)
@click.option(
    "--tasks", default="", callback=_names, metavar="NAMES",
    help="Tasks of lm-eval, separated by commas, like arc_easy,hellaswag,piqa.",
)  # fmt: skip
@click.option("--task-limit", type=click.IntRange(min=1), help="The number of questions of each task.  [default: all]")
@click.option(
    "--task-path",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A folder with further tasks for lm-eval.",
)
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(min=0), help="The seed of the order of documents."
)
@click.option("--device", default="auto", show_default=True, help="The device, like cpu, cuda or cuda:1.")
@click.option(
    "--compute-dtype",
    default="float32",
    show_default=True,
    type=click.Choice(("float32", "bfloat16", "float16")),
    help="The dtype of forward passes; on the fly is always float32.",
)
@base_revision_option
@click.option("--fine-tuned-revision", help="The revision of a fine-tune on the hub.")
@json_option
@quiet_option
@threads_option("the last digits of a figure")
def command(
    base: str,
    fine_tuned: str,
    delta: str,
    texts: dict[str, str],
    samples: int,
    sequence_length: int,
    batch_size: int,
    text_column: str | None,
    on_the_fly: bool | None,
    tasks: tuple[str, ...],
    task_limit: int | None,
    task_path: Path | None,
    seed: int,
    device: str,
    compute_dtype: EvaluationDType,
    base_revision: str | None,
    fine_tuned_revision: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure how close BASE + DELTA is to FINE_TUNED: KL, top-1 agreement, perplexity, tasks.

    Use text that is not in the calibration, from the fine-tune's own domain and from others.

    \b
    KL          the divergence of the next-token distributions, in nats per token; 0 is the fine-tune
    ±           the standard error of KL over the samples
    99%         KL that 99% of the tokens stay below
    top-1       how often both models have the same most likely token
    recovered   the share of the fine-tune's gain in loss over the base; above 100%: a lower loss than the
                fine-tune's; none where it gains nothing
    merged      weights rounded as `apply` writes them
    on the fly  base and signs summed unrounded in each forward pass, as a server of many variants does
    after, worst  KL after special tokens, and the text before the tokens with the largest KL

    \b
    Example: peraxis-tools eval org/base my/fine-tune delta.pxd --text code=held-out.jsonl --text c4=other.jsonl
    """
    if not tasks:
        refuse_given("task_limit", "task_path", why="without --tasks")
    if not texts:
        refuse_given("samples", "sequence_length", "text_column", "seed", "on_the_fly", why="without --text")
    asked = tuple(name for name in CANDIDATES if on_the_fly or name != "on-the-fly")
    total = max(1, len(asked if on_the_fly is False else CANDIDATES) * len(texts))
    with (
        fetched([delta], quiet=quiet) as (path,),
        progress("evaluate", total, unit="steps", quiet=quiet) as step,
    ):
        result = evaluate(
            base,
            fine_tuned,
            path,
            texts,
            samples=samples,
            sequence_length=sequence_length,
            batch_size=batch_size,
            text_column=text_column,
            candidates=None if on_the_fly is None else asked,
            tasks=tasks,
            task_limit=task_limit,
            task_path=task_path,
            seed=seed,
            device=device,
            compute_dtype=compute_dtype,
            base_revision=base_revision,
            fine_tuned_revision=fine_tuned_revision,
            progress=lambda _step, _done, _total: step(1),
        )
    result = dataclasses.replace(result, delta=without_secrets(delta))
    emit(result, render_evaluate, schema="peraxis.eval/1", as_json=as_json)
