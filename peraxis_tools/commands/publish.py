"""`peraxis-tools publish`."""

from __future__ import annotations

import contextlib
from pathlib import Path

import click

from peraxis_tools.commands.options import json_option, overwrite_option, quiet_option, refuse_given
from peraxis_tools.commands.sources import refuse_urls
from peraxis_tools.display.progress import staged
from peraxis_tools.publish import Relation, publish
from peraxis_tools.report.console import emit, hub_progress
from peraxis_tools.report.publish import render_publish

__all__ = ["command"]


@click.command("publish")
@click.argument("repository", metavar="REPO")
@click.argument("deltas", metavar="DELTA...", nargs=-1, required=True)
@click.option(
    "--evaluation",
    "evaluations",
    multiple=True,
    type=click.Path(path_type=Path),
    help="The JSON of `eval --json` for the card, one for each delta. Repeatable.",
)
@click.option("--base-id", metavar="ORG/NAME[@REVISION]", help="The hub id of the base, for the card.")
@click.option("--card-from", metavar="FOLDER|ID", help="The fine-tune: its card gives the language and the license.")
@click.option("--license", help="The identifier of the license on the hub, like apache-2.0.")
@click.option(
    "--relation",
    type=click.Choice(["finetune", "adapter", "quantized", "merge"]),
    default="finetune",
    show_default=True,
    help="The hub's name of the relation to the base.",
)
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--revision", help="The branch to commit to.")
@click.option(
    "--dry-run", type=click.Path(path_type=Path), help="Write the repository to this folder and upload nothing."
)
@overwrite_option
@json_option
@quiet_option
def command(
    repository: str,
    deltas: tuple[str, ...],
    evaluations: tuple[Path, ...],
    base_id: str | None,
    card_from: str | None,
    license: str | None,
    relation: Relation,
    private: bool,
    revision: str | None,
    dry_run: Path | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Verify each DELTA, write a model card from the manifests, and upload all (and each DELTA.sig) to REPO on the hub.

    If REPO already has a card, the card is extended.

    \b
    Example: peraxis-tools eval BASE FINE_TUNED delta.pxd --json > eval.json
             peraxis-tools publish me/my-delta delta.pxd --evaluation eval.json --dry-run repo
    """
    if dry_run is not None:
        refuse_given("private", "revision", why="with --dry-run")
    else:
        refuse_given("overwrite", why="without --dry-run")
    paths = refuse_urls(deltas)
    with hub_progress("an upload", quiet=quiet) if dry_run is None else contextlib.nullcontext():
        result = publish(
            repository,
            paths,
            evaluation=evaluations,
            base_id=base_id,
            card_from=card_from,
            license=license,
            relation=relation,
            dry_run=dry_run,
            overwrite=overwrite,
            private=private,
            revision=revision,
            progress=staged(quiet=quiet),
        )
    emit(result, render_publish, schema="peraxis.publish/1", as_json=as_json)
