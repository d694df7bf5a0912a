"""`peraxis-tools verify`."""

from __future__ import annotations

import contextlib
import glob
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import click

from peraxis_format import atomic_file
from peraxis_tools.commands.options import json_option, quiet_option, workers_option
from peraxis_tools.commands.sources import fetched
from peraxis_tools.errors import ToolError
from peraxis_tools.remote import is_remote
from peraxis_tools.report import show, staged, to_json, write
from peraxis_tools.report.ci import github, junit, sarif
from peraxis_tools.report.verify import render_report
from peraxis_tools.verify_files import Signature, VerifyReport, Wanted, verify_files

__all__ = ["command"]

_FORMATS = ["text", "json", "junit", "sarif", "github"]


def _texts(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> Mapping[str, str]:
    pairs = [value.partition("=") for value in values]
    if not all(name and at and source for name, at, source in pairs):
        raise click.BadParameter("want DOMAIN=SOURCE, like chat=held-out.jsonl")
    return {name: source for name, _, source in pairs}


@click.command("verify")
@click.argument("deltas", metavar="DELTA...", nargs=-1, required=True)
@click.option("--base", metavar="FOLDER|ID", help="Check the binding to this base too.")
@click.option("--expect-content-id", "content_ids", multiple=True, metavar="ID", help="One of these it must be.")
@click.option("--fine-tuned", metavar="FOLDER|ID", help="The checkpoint that base + DELTA stands for.")
@click.option("--max-error", type=click.FloatRange(min=0), help="Bound on the relative error of the weights.")
@click.option("--max-kl", type=click.FloatRange(min=0), help="Bound on the KL to the fine-tune, nats a token.")
@click.option(
    "--text", "texts", multiple=True, callback=_texts, metavar="DOMAIN=SOURCE", help="For --max-kl, as in eval."
)
@click.option("--signature", is_flag=True, help="Check the signature beside it, DELTA.sig.")
@click.option("--bundle", type=click.Path(path_type=Path), help="Another place of the signature.")
@click.option("--public-key", type=click.Path(path_type=Path), help="The key that must have signed.")
@click.option("--certificate-chain", multiple=True, type=click.Path(path_type=Path), help="Certificates to trust.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["text", "json", "junit", "sarif", "github"]),
    default="text",
    show_default=True,
)
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Write the report to this file.")
@workers_option
@json_option
@quiet_option
@click.pass_context
def command(
    ctx: click.Context,
    deltas: tuple[str, ...],
    base: str | None,
    content_ids: tuple[str, ...],
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
    workers: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Check each DELTA: structure and payload, and what the options ask for beyond. DELTA may be a glob or a URL.

    The report is written before the exit code says the gravest outcome: 0 verified, 1 failed (damaged, another base,
    beyond a bound), 2 usage, input or I/O, 3 not verifiable here (unknown version, missing base or key).

    \b
    Example: peraxis-tools verify delta.pxd --base meta-llama/Llama-3.1-8B
             peraxis-tools verify 'releases/*.pxd' --format junit -o report.xml
    """
    wants_signature = signature or bundle is not None or public_key is not None or bool(certificate_chain)
    wanted = Wanted(
        base=base,
        content_ids=content_ids,
        signature=Signature(public_key=public_key, certificate_chain=certificate_chain, bundle=bundle)
        if wants_signature
        else None,
        fine_tuned=fine_tuned,
        max_error=max_error,
        max_kl=max_kl,
        texts=texts,
    )

    @contextlib.contextmanager
    def open_file(file: str) -> Iterator[Path]:
        with fetched([file], quiet=quiet) as (path,):
            yield path

    report = verify_files(
        _expanded(deltas),
        wanted,
        open_file=open_file,
        progress=staged(quiet=quiet),
        workers=workers,
    )
    _emit(report, "json" if as_json else kind, output)
    if report.status.exit_status:
        ctx.exit(report.status.exit_status)


def _expanded(patterns: tuple[str, ...]) -> list[str]:
    """Globs become the files that they match, sorted; a name that exists is no glob."""
    files: list[str] = []
    for pattern in patterns:
        if is_remote(pattern) or Path(pattern).exists() or not glob.has_magic(pattern):
            files.append(pattern)
            continue
        found = sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise ToolError(f"{pattern}: matches no file")
        files.extend(found)
    return files


def _emit(report: VerifyReport, kind: str, output: Path | None) -> None:
    if kind == "text" and output is None:
        show(report, render_report)
        return
    if kind == "text":
        raise ToolError("--output needs a --format other than text")
    formats = {"junit": junit, "sarif": sarif, "github": github, "json": _json}
    rendered = formats[kind](report)
    if output is None:
        write(rendered)
    else:
        with atomic_file(output) as file:
            file.write(rendered.encode())


def _json(report: VerifyReport) -> str:
    return json.dumps({"schema": "peraxis.verify/1", **to_json(report)}, ensure_ascii=False, indent=2) + "\n"
