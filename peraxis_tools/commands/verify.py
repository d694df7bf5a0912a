"""`peraxis-tools verify`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import click
from click.core import ParameterSource

from peraxis_format import atomic_file
from peraxis_format.arguments import did_you_mean
from peraxis_tools.commands.options import (
    Finite,
    base_revision_option,
    json_option,
    overwrite_option,
    quiet_option,
    refuse_given,
    texts_by_domain,
    workers_option,
)
from peraxis_tools.display.progress import staged
from peraxis_tools.errors import ToolError
from peraxis_tools.outputs.rules import claim_files
from peraxis_tools.outputs.standard_streams import report_stream
from peraxis_tools.report.ci import github, junit, sarif
from peraxis_tools.report.console import json_text, plain_text, show, to_json, write
from peraxis_tools.report.verify import render_verify
from peraxis_tools.verify import VerifyResult, delta_files, verify

__all__ = ["command"]

_FORMATS = ("text", "json", "junit", "sarif", "github")


def _reports(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> Sequence[tuple[str, Path]]:
    pairs = [value.partition("=") for value in values]
    for kind, _at, path in pairs:
        if kind not in _FORMATS or not path:
            hint = "" if kind in _FORMATS else did_you_mean(kind, _FORMATS)
            raise click.BadParameter(f"must be FORMAT=PATH, with {', '.join(_FORMATS)} for FORMAT{hint}")
    return [(kind, Path(path)) for kind, _, path in pairs]


@click.command("verify")
@click.argument("deltas", metavar="DELTA...", nargs=-1, required=True)
@click.option("--base", metavar="FOLDER|ID", help="Also check that DELTA was made for this base.")
@base_revision_option
@click.option(
    "--expect-content-id",
    multiple=True,
    metavar="ID",
    help="A content ID that DELTA may have. Repeatable.",
)
@click.option("--fine-tuned", metavar="FOLDER|ID", help="The checkpoint that base + DELTA approximates.")
@click.option(
    "--max-error",
    type=Finite(min=0),
    help="The largest relative error of the weights; new rows, and what is no float, must be equal. A fit on text "
    "lowers the error of the outputs instead: see --max-kl.",
)
@click.option("--max-kl", type=Finite(min=0), help="The largest KL to the fine-tune, in nats per token.")
@click.option(
    "--text", "texts", multiple=True, callback=texts_by_domain, metavar="[DOMAIN=]TEXT",
    help="A text for --max-kl, as in eval. Repeatable.",
)  # fmt: skip
@click.option("--signature", is_flag=True, help="Check the signature in DELTA.sig.")
@click.option("--bundle", type=click.Path(path_type=Path), help="Read the signature from this file.")
@click.option("--public-key", type=click.Path(path_type=Path), help="The public key of the signer.")
@click.option(
    "--certificate-chain", multiple=True, type=click.Path(path_type=Path), help="A certificate to trust. Repeatable."
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(_FORMATS),
    default="text",
    show_default=True,
    help="The format of the report.",
)
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Write the report of --format to this file.")
@click.option(
    "--report",
    "reports",
    multiple=True,
    callback=_reports,
    metavar="FORMAT=PATH",
    help="Write a further report of the same run. Repeatable.",
)
@overwrite_option
@workers_option("one for each processor")
@json_option
@quiet_option
@click.pass_context
def command(
    ctx: click.Context,
    deltas: tuple[str, ...],
    base: str | None,
    base_revision: str | None,
    expect_content_id: tuple[str, ...],
    fine_tuned: str | None,
    max_error: float | None,
    max_kl: float | None,
    texts: Mapping[str, str],
    signature: bool,
    bundle: Path | None,
    public_key: Path | None,
    certificate_chain: tuple[Path, ...],
    kind: str,
    output: Path | None,
    reports: Sequence[tuple[str, Path]],
    overwrite: bool,
    workers: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Check the structure and the payload of each DELTA, and everything that the options ask for.

    DELTA may be a glob, a URL, or a folder, which means every .pxd in it and in the folders below. With --base, an
    update that follows others of these files is checked on the state after them. The updates of a chain in a folder
    must have one order, without a fork or a gap, as for log and apply.

    All files are checked and the report is written before the command ends. The exit code is the worst outcome: 1
    failed (damaged, another base, above a bound), else 2 (input or I/O), else 3 (not verifiable here: an unknown
    version, a missing base, key or package), else 0 (all verified). A wrong usage is 2, before any work. With --quiet
    only files that are not verified are reported.

    \b
    Example: peraxis-tools verify delta.pxd --base meta-llama/Llama-3.1-8B
             peraxis-tools verify 'releases/*.pxd' --format github --report sarif=report.sarif
    """
    if as_json and ctx.get_parameter_source("kind") is not ParameterSource.DEFAULT and kind != "json":
        raise ToolError(f"--json and --format {kind} exclude each other; give one of them, --report adds others")
    if max_kl is None:
        refuse_given("texts", why="without --max-kl")
    kind = "json" if as_json else kind
    outputs = [*reports, *([(kind, output)] if output is not None else [])]
    if overwrite and not outputs:
        refuse_given("overwrite", why="without --output or --report")
    files = delta_files(deltas)
    inputs = (*files, base, fine_tuned, *texts.values(), bundle, public_key, *certificate_chain)
    with claim_files([path for _, path in outputs], overwrite=overwrite, inputs=inputs):
        report = verify(
            deltas,
            base=base,
            base_revision=base_revision,
            expect_content_id=expect_content_id,
            signature=signature,
            bundle=bundle,
            public_key=public_key,
            certificate_chain=certificate_chain,
            fine_tuned=fine_tuned,
            max_error=max_error,
            max_kl=max_kl,
            texts=texts,
            keep_going=True,
            workers=workers,
            progress=staged(quiet=quiet),
        )
        for its_kind, path in outputs:
            _write(report, its_kind, path, overwrite=overwrite)
    if output is None:
        _show(report, kind, quiet=quiet)
    if report.status.exit_status:
        ctx.exit(report.status.exit_status)


def _show(report: VerifyResult, kind: str, *, quiet: bool) -> None:
    if kind == "text":
        show(report, partial(render_verify, quiet=quiet))
    else:
        write(_rendered(report, kind, report_stream().encoding))


def _write(report: VerifyResult, kind: str, path: Path, *, overwrite: bool) -> None:
    with atomic_file(path, overwrite=overwrite) as file:
        file.write(_rendered(report, kind).encode())


def _rendered(report: VerifyResult, kind: str, encoding: str = "utf-8") -> str:
    if kind == "json":
        return json_text({"schema": "peraxis.verify/1", **to_json(report)}, encoding=encoding)
    if kind == "text":
        return plain_text(report, render_verify)
    return {"junit": junit, "sarif": sarif, "github": github}[kind](report)
