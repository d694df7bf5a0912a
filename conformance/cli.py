"""The command `peraxis-conformance`: run, list, copy."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from . import report
from .cases import Case, Corpus, CorpusError
from .process import AdapterError
from .run import Adapter, Summary, laid_out, run_cases

__all__ = ["main"]

FAILED, USAGE, INTERRUPTED = 1, 2, 130


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="peraxis-conformance", description="Test a loader or writer of PXD files against SPEC.md."
    )
    made.add_argument("--version", action="version", version=f"%(prog)s of peraxis {installed_version()}")
    verbs = made.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser(
        "run",
        help="run an adapter over the cases",
        description="Run an adapter over the cases. Exit status: 0 all passed, 1 a case failed, 2 usage or input.",
    )
    run.add_argument(
        "--adapter", required=True, action="append", help='the command, for example "node adapter.js"; may be repeated'
    )
    run.add_argument(
        "--jobs", "-j", type=positive, default=os.cpu_count() or 1, help="processes at a time (default: one per core)"
    )
    run.add_argument("--no-serve", action="store_true", help="one process per case even if the adapter offers serve")
    run.add_argument("--stop", action="store_true", help="stop at the first failure")
    run.add_argument(
        "--address-space",
        type=positive,
        metavar="MIB",
        help="RLIMIT_AS of each process; not for run-times that reserve much address space",
    )
    run.add_argument("--json", type=report_path, metavar="FILE", help="write a JSON report")
    run.add_argument("--junit", type=report_path, metavar="FILE", help="write a JUnit XML report")
    run.add_argument("--verbose", "-v", action="store_true", help="name every case")
    run.add_argument(
        "--verbose-codes", action="store_true", help="name rejections with another code than the recommended one"
    )
    show = verbs.add_parser("list", help="name the cases")
    show.add_argument("--json", action="store_true", help="one JSON object per line")
    for verb in (run, show):
        verb.add_argument(
            "--case", action="append", default=[], metavar="GLOB", help="only cases whose id matches; may be repeated"
        )
        verb.add_argument(
            "--skip",
            action="append",
            default=[],
            metavar="GLOB",
            help="leave out cases whose id matches; may be repeated",
        )
    copy = verbs.add_parser("copy", help="write the corpus into a folder, every file of every case")
    copy.add_argument("directory", type=Path)
    for verb in (run, show, copy):
        verb.add_argument(
            "--corpus",
            type=Path,
            metavar="DIR",
            help="the folder of the cases (default: that of this package in a clone)",
        )
    return made


def installed_version() -> str:
    """The version of the package that the kit is a part of; the kit imports none of it."""
    try:
        return metadata.version("peraxis")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def report_path(text: str) -> Path:
    """A report's path, checked before any case runs."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder; name a file")
    if is_written_into(path):
        return path
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path}: the folder {path.parent} cannot be written to")
    return path


def is_written_into(path: Path) -> bool:
    """Whether a path stays and is written into: a pipe, a device or a link, such as /dev/stdout."""
    return path.is_symlink() or (path.exists() and not path.is_file())


def run(given: argparse.Namespace) -> int:
    with laid_out(given.corpus) as corpus:
        cases = corpus.select(given.case, given.skip)
        if not cases:
            raise CorpusError("no case matches --case and --skip; `peraxis-conformance list` names them all")
        summaries = [run_adapter(given, command, corpus, cases) for command in given.adapter]
    if given.json:
        write(given.json, json.dumps(report.as_dict(summaries), indent=1) + "\n")
    if given.junit:
        write(given.junit, report.as_junit(summaries))
    return 0 if all(summary.passed for summary in summaries) else FAILED


def run_adapter(given: argparse.Namespace, command: str, corpus: Corpus, cases: Sequence[Case]) -> Summary:
    adapter = Adapter(shlex.split(command), serve=not given.no_serve, address_space_mib=given.address_space)
    summary = run_cases(
        adapter,
        corpus,
        cases,
        jobs=given.jobs,
        stop_at_first=given.stop,
        progress=lambda outcome: report.show_case(outcome, verbose=given.verbose),
    )
    if given.verbose_codes:
        report.show_codes(summary.outcomes)
    report.show_summary(summary)
    return summary


def write(path: Path, text: str) -> None:
    """Write a report, whole or not at all; into a pipe, device or link as it comes. Raises OSError that names it."""
    if is_written_into(path):
        if is_stdout(path):  # opened again, it would be written from its beginning, over the lines on it
            report.show(text.removesuffix("\n"))
        else:
            path.write_text(text, encoding="utf-8")
        return
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


def is_stdout(path: Path) -> bool:
    """Whether a path is the standard output of this process."""
    try:
        return os.path.samestat(path.stat(), os.fstat(sys.stdout.fileno()))
    except OSError:  # no such file, or an output without a descriptor
        return False


def corpus_of(given: argparse.Namespace) -> Corpus:
    return Corpus(given.corpus) if given.corpus else Corpus()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    given = parser().parse_args(arguments)
    try:
        if given.verb == "run":
            return run(given)
        if given.verb == "list":
            report.show_list(corpus_of(given).select(given.case, given.skip), as_json=given.json)
        else:
            report.show(f"{corpus_of(given).copy(given.directory)} cases in {given.directory}")
    except BrokenPipeError:  # the reader of the report closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (AdapterError, CorpusError, OSError, ValueError) as error:
        sys.stderr.write(f"peraxis-conformance: {report.escaped(str(error))}\n")
        return USAGE
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
