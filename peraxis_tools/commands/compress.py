"""`peraxis-tools compress`."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

from peraxis_tools.checkpoints.checkpoint import is_delta
from peraxis_tools.commands.options import (
    MASKS,
    SIZE,
    base_revision_option,
    json_option,
    overwrite_option,
    quiet_option,
    refuse_given,
    threads_option,
)
from peraxis_tools.compress import compress
from peraxis_tools.compress.options import AXES, EMBEDDINGS, EVERYTHING, FITS, PREFER, RECIPES
from peraxis_tools.compress.options_file import options_of
from peraxis_tools.compress.run.dry_run import estimate_run
from peraxis_tools.display.bars import Stages
from peraxis_tools.outputs.rules import check_delta
from peraxis_tools.process.heap import tune_process
from peraxis_tools.report.compress import plan_lines, render_compress, render_dry_run
from peraxis_tools.report.console import emit
from peraxis_tools.texts.samples import check_calibration

__all__ = ["command"]


class _Compress(click.Command):
    """The command, whose --exact may have no value."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.MissingParameter as error:
            taken = next((after for name, after in pairwise(given) if name == "--exact"), "-")
            if taken.startswith("-"):
                raise
            raise click.UsageError(
                f"{error.format_message().rstrip('.')}; --exact took {taken!r} as its value: "
                f"write --exact={EVERYTHING} for all tensors, or --exact at the end",
                ctx,
            ) from None


@click.command("compress", cls=_Compress)
@click.argument("base", metavar="BASE")
@click.argument("fine_tuned", metavar="FINE_TUNED")
@click.option(
    "--output", "-o", type=click.Path(path_type=Path), help="The .pxd to write.  [required, but not for --dry-run]"
)
@click.option(
    "--exact",
    is_flag=False,
    flag_value=EVERYTHING,
    metavar="[REGEX|auto]",
    help="The tensors to store bit for bit, by name. Without a value: all. auto: those that are smaller that way.",
)
@click.option(
    "--prefer",
    type=click.Choice(PREFER),
    help="Write exact tensors with the fewest bytes, or for the fastest application.  [default: size]",
)
@click.option(
    "--calibration", metavar="TEXT[:WEIGHT]", multiple=True,
    help="A text: c4, a datasets id (org/name), or a json, jsonl, txt, csv (each also .gz) or parquet file. Repeat it "
    "for more texts; a weight like :0.5 is the share of the samples that a text gives.  [default weight: 1]",
)  # fmt: skip
@click.option("--recipe", type=click.Choice(tuple(RECIPES)), help="A set of options. Single options override it.")
@click.option(
    "--fit",
    type=click.Choice(FITS),
    help="The method that chooses signs and scales.  [default: refined with a calibration text, else none]",
)
@click.option("--refine-rounds", type=int, help="The rounds of fit refined, signs and scales in turn.  [default: 3]")
@click.option(
    "--axis", type=click.Choice(AXES), help="The axis of the scales; auto takes the best one for each module."
)
@click.option(
    "--masks",
    type=MASKS,
    help="Masks for each module, 1 to 8. auto: the file has the bytes of one mask for each, and modules that need them "
    "get more, others fewer.  [default: auto]",
)
@click.option("--target-size", type=SIZE, help="The size of the file, like 1.2GB. Masks go where they help most.")
@click.option("--target-ratio", type=float, help="The checkpoint's size over that of the file: 12 means a twelfth.")
@click.option(
    "--embeddings", type=click.Choice(EMBEDDINGS), help="How embed_tokens and lm_head are stored.  [default: auto]"
)
@click.option(
    "--calibration-samples", type=int, help="The number of samples of the text.  [default: by the model, 50 at most]"
)
@click.option("--sequence-length", type=int, help="The number of tokens in a sample.  [default: 512]")
@click.option("--text-column", help="The column of the text.  [default: text, else all text columns]")
@click.option(
    "--held-out",
    type=float,
    help="The share of the samples that is kept for validation; several texts validate each other.  [default: 0.2]",
)
@click.option("--batch-size", type=int, help="The number of samples in one forward pass.  [default: 8]")
@click.option(
    "--generated-samples",
    type=int,
    help="Samples that the fine-tuned model generates.  [default: as many as of the text if memory allows; 16 at most "
    "without distillation]",
)
@click.option("--distill-samples", type=int, help="Samples for end-to-end distillation.  [default: 0, none]")
@click.option("--distill-epochs", type=int, help="Epochs of the distillation.  [default: 5]")
@click.option("--distill-batch-size", type=int, help="Samples in one step of it.  [default: 2]")
@click.option("--distill-lr", type=float, help="The learning rate of scales, relative to their size.  [default: 0.01]")
@click.option(
    "--distill-sign-lr", type=float, help="That of signs; takes 4 bytes of memory a sign.  [default: 0, fixed]"
)
@click.option(
    "--distill-full-lr", type=float, help="That of tensors stored full, relative to them.  [default: 0, exact]"
)
@click.option("--distill-loss", type=click.Choice(("kl", "mse")), help="The loss on the logits.  [default: kl]")
@click.option("--seed", type=int, help="The seed of all random choices.  [default: 0]")
@click.option("--device", help="The device, like cpu, cuda or cuda:1.  [default: cuda if there is one]")
@click.option(
    "--compute-dtype",
    type=click.Choice(("auto", "float32", "bfloat16", "float16")),
    help="The dtype of forward passes; bfloat16 takes half the memory, and fits worse.  [default: auto: float32]",
)
@click.option("--hidden-limit", type=SIZE, help="Hidden states above this size go to disk.  [default: 4GiB]")
@click.option(
    "--logits-limit",
    type=SIZE,
    help="Teacher states, which give its logits, above this size are recomputed.  [default: 4GiB]",
)
@click.option(
    "--resume/--no-resume",
    default=None,
    help="Continue an interrupted run from OUTPUT.peraxis-work.  [default: resume]",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A YAML file with options from --exact to --resume, or a .pxd, for those it was written with.",
)
@base_revision_option
@click.option("--fine-tuned-revision", help="The revision of a fine-tune on the hub.")
@click.option("--base-id", metavar="ORG/NAME[@REVISION]", help="The hub id of a base that is given as a folder.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Only say what it would take: bytes, memory and processor seconds. With a text it measures this "
    "machine for some seconds, up to ten.",
)
@click.option("--force", is_flag=True, help="Write the delta even if it saves little.")
@overwrite_option
@json_option
@quiet_option
@threads_option("a last bit of a fit on text")
def command(
    base: str,
    fine_tuned: str,
    output: Path | None,
    config: Path | None,
    base_revision: str | None,
    fine_tuned_revision: str | None,
    base_id: str | None,
    dry_run: bool,
    force: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Write FINE_TUNED as a difference to BASE. Both are folders or hub ids (org/name, org/name@revision).

    The recipes are: quick (signs of the delta and mean magnitudes, no text), fit (signs and scales fitted on the text),
    distilled (then all scales end to end, with the whole model in memory), best (also signs and full tensors end to
    end, with 4 bytes more a sign). Options on the command line override --config, and --config overrides --recipe. The
    options of a run are recorded in its .pxd; --config delta.pxd repeats them. A file of text is recorded without its
    folder: repeat the run in that folder, or pass --calibration too.

    \b
    Example: peraxis-tools compress meta-llama/Llama-3.1-8B my/fine-tune -o delta.pxd --calibration c4
    """
    if config is not None and given["recipe"] is not None and is_delta(config):
        refuse_given("recipe", why=f"beside --config {config}, which has every option")
    options = options_of(config, {name: value for name, value in given.items() if value not in (None, ())})
    tune_process()
    if dry_run:
        texts = check_calibration(options.calibration)
        if output is not None:
            check_delta(output, overwrite=overwrite, inputs=(base, fine_tuned, *texts))
        found = estimate_run(
            base,
            fine_tuned,
            options=options,
            base_revision=base_revision,
            fine_tuned_revision=fine_tuned_revision,
            base_id=base_id,
            force=force,
        )
        emit(found, render_dry_run, schema="peraxis.compress-dry-run/1", as_json=as_json)
        return
    if output is None:
        raise click.MissingParameter(
            param_type="option", param_hint="'--output' / '-o'", ctx=click.get_current_context()
        )
    with Stages(quiet=quiet) as stages:
        result = compress(
            base,
            fine_tuned,
            output,
            options=options,
            base_revision=base_revision,
            fine_tuned_revision=fine_tuned_revision,
            overwrite=overwrite,
            force=force,
            base_id=base_id,
            progress=stages,
            show_plan=None if quiet else partial(plan_lines, compared=options.has_target or options.spends_freely),
        )
    emit(result, partial(render_compress, quiet=quiet), schema="peraxis.compress/1", as_json=as_json, written=output)
