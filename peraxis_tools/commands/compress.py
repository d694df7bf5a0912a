"""`peraxis-tools compress`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from peraxis_tools.commands.options import json_option, masks_option, overwrite_option, quiet_option
from peraxis_tools.compress import CompressOptions, compress
from peraxis_tools.compress.options import AXES, EMBEDDINGS, FITS, RECIPES, parse_size, read_yaml
from peraxis_tools.report import Progress, emit, progress
from peraxis_tools.report.compress import plan_lines, render_compress

__all__ = ["command"]


class _Bars:
    """One bar after the other: a step of the run each, opened when it is first heard of."""

    def __init__(self, stack: ExitStack, *, quiet: bool) -> None:
        self._stack, self._quiet = stack, quiet
        self._step = ""
        self._done = 0
        self._advance: Progress | None = None

    def __call__(self, step: str, done: int, total: int) -> None:
        if step != self._step:
            self._stack.close()
            unit = "bytes" if step == "write" else "steps"
            self._advance = self._stack.enter_context(progress(step, total, unit=unit, quiet=self._quiet))
            self._step, self._done = step, 0
        if self._advance is not None:
            self._advance(done - self._done)
        self._done = done


def size(value: str) -> int:
    """Bytes as 800MB, 1.2GB, 1GiB; click shows the type under this function's name."""
    return parse_size(value)


@click.command("compress")
@click.argument("base", metavar="BASE")
@click.argument("fine_tuned", metavar="FINE_TUNED")
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="The .pxd to write.")
@click.option(
    "--calibration", metavar="TEXT[:WEIGHT]", multiple=True,
    help="c4, a datasets id, or json, jsonl(.gz), parquet, txt. Repeatable.",
)  # fmt: skip
@click.option("--recipe", type=click.Choice(tuple(RECIPES)), help="Options under one name; others given win over it.")
@click.option("--fit", type=click.Choice(FITS), help="Default: refined with a calibration text, else none.")
@click.option("--axis", type=click.Choice(AXES), help="Along what scales run; auto: the best of each module.")
@masks_option(click.INT, help="Masks a module, 1 to 8.  [default: 1]")
@click.option("--target-size", type=size, help="Size of the file, like 1.2GB: spent where it lowers the error most.")
@click.option("--target-ratio", type=float, help="The same, as a fraction of the checkpoint: 12 is a twelfth.")
@click.option("--embeddings", type=click.Choice(EMBEDDINGS), help="embed_tokens and lm_head.  [default: auto]")
@click.option("--calibration-samples", type=int, help="[default: 50]")
@click.option("--sequence-length", type=int, help="Tokens a sample.  [default: 512]")
@click.option("--text-column", help="Column of the text.  [default: text, else all text columns]")
@click.option("--held-out", type=float, help="Share of the samples for validation.  [default: 0.2]")
@click.option("--batch-size", type=int, help="Samples in one forward pass.  [default: 8]")
@click.option(
    "--generated-samples",
    type=int,
    help="Samples that the fine-tuned model writes itself.  [default: 16 where it fits into memory]",
)
@click.option("--distill-samples", type=int, help="Samples of end-to-end distillation; 0: none.  [default: 0]")
@click.option("--distill-epochs", type=int, help="[default: 5]")
@click.option("--distill-batch-size", type=int, help="[default: 2]")
@click.option("--distill-lr", type=float, help="Of scales, relative to their size.  [default: 0.01]")
@click.option("--distill-sign-lr", type=float, help="Of signs; needs 12 bytes a weight.  [default: 0, signs stay]")
@click.option(
    "--distill-full-lr", type=float, help="Of tensors stored full, relative to their size.  [default: 0, exact]"
)
@click.option("--distill-loss", type=click.Choice(("kl", "mse")), help="On the logits.  [default: kl]")
@click.option("--seed", type=int, help="[default: 0]")
@click.option("--device", help="cpu, cuda, cuda:1, ...  [default: cuda where there is one]")
@click.option("--compute-dtype", type=click.Choice(("auto", "float32", "bfloat16", "float16")))
@click.option("--hidden-limit", type=size, help="Hidden states beyond this go to disk.  [default: 4GiB]")
@click.option("--logits-limit", type=size, help="Teacher logits on disk; beyond this, recomputed.  [default: 4GiB]")
@click.option("--resume/--no-resume", default=None, help="Go on where a killed run stopped.  [default: resume]")
@click.option("--config", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="YAML of these options.")
@click.option("--base-revision", help="Of a hub id.")
@click.option("--fine-tuned-revision", help="Of a hub id.")
@overwrite_option
@json_option
@quiet_option
def command(
    base: str,
    fine_tuned: str,
    output: Path,
    config: Path | None,
    base_revision: str | None,
    fine_tuned_revision: str | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Write FINE_TUNED as a difference to BASE. Both are folders or hub ids (org/name, org/name@revision).

    Options on the command line win over those of --config, these over those of --recipe: quick (mean |delta|, no text),
    fit (signs and scales from the text), distilled (scales end to end, too; the whole model in memory), best (signs and
    full tensors end to end; 12 bytes a weight). What a run used is stored in the file
    (inspect --json, metadata peraxis.config) and can be passed back through --config.

    Example: peraxis-tools compress meta-llama/Llama-3.1-8B my/fine-tune -o delta.pxd --calibration c4
    """
    values = read_yaml(config) if config is not None else {}
    values.update({name: value for name, value in given.items() if value not in (None, ())})
    options = CompressOptions.from_mapping(values)
    with ExitStack() as stack:
        result = compress(
            base,
            fine_tuned,
            output,
            options=options,
            base_revision=base_revision,
            fine_tuned_revision=fine_tuned_revision,
            overwrite=overwrite,
            progress=_Bars(stack, quiet=quiet),
            show_plan=None if quiet else plan_lines,
        )
    emit(result, render_compress, schema="peraxis.compress/1", as_json=as_json)
