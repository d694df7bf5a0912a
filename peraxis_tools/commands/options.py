"""Options that several verbs share, so that their names and help texts are written once."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from peraxis_format.ops.compiling import PROGRESS
from peraxis_tools.display.notes import LOGGER
from peraxis_tools.display.sizes import parse_size
from peraxis_tools.errors import ToolError
from peraxis_tools.process.threads import THREADS_MAX, use_threads

__all__ = [
    "MASKS",
    "SIZE",
    "Finite",
    "RenamedOption",
    "base_revision_option",
    "json_option",
    "overwrite_option",
    "prefer_option",
    "quiet_option",
    "refuse_given",
    "texts_by_domain",
    "threads_option",
    "workers_option",
]


def refuse_given(*names: str, why: str) -> None:
    """Raise ToolError if one of these options of the current command was given, because it has no effect here."""
    context = click.get_current_context()
    for parameter in context.command.params:
        name = parameter.name or ""
        if name in names and context.get_parameter_source(name) not in (None, ParameterSource.DEFAULT):
            option = "/".join((parameter.opts[0], *parameter.secondary_opts))
            raise ToolError(f"{option} does nothing {why}; leave it out")


def texts_by_domain(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Parse `domain=source` for each of these; a source alone is a domain of the same name."""
    texts: dict[str, str] = {}
    for value in values:
        domain, _at, source = value.partition("=")
        domain, source = (domain, source) if source else (Path(value).name.split(".")[0], value)
        if not domain or not source:
            raise click.BadParameter(f"{value!r} is not like chat=held-out.jsonl")
        if domain in texts:
            raise click.BadParameter(f"{domain!r} is given twice; name each text: --text name={source}")
        texts[domain] = source
    return texts


class Finite(click.FloatRange):
    """A finite number within bounds, which are inclusive by default."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return found


class Size(click.ParamType[int]):
    """Bytes, like 800MB, 1.2GB or 1GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_size(value)
        except ToolError as error:
            self.fail(str(error), param, ctx)


SIZE = Size()


class Masks(click.ParamType[Any]):
    """A number of masks, or auto."""

    name = "integer|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == "auto" else click.INT.convert(value, param, ctx)


MASKS = Masks()


class RenamedOption(click.Option):
    """An option whose last name is its former one, which still works but is not shown."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        with self._shown():
            return super().get_help_record(ctx)

    def get_error_hint(self, ctx: click.Context | None) -> str:
        with self._shown():
            return super().get_error_hint(ctx)

    @contextlib.contextmanager
    def _shown(self) -> Iterator[None]:
        names = self.opts
        self.opts = names[:-1]
        try:
            yield
        finally:
            self.opts = names


def _hushed(_: click.Context, __: click.Parameter, quiet: bool) -> bool:
    LOGGER.setLevel(logging.ERROR if quiet else logging.NOTSET)
    PROGRESS.disabled = quiet
    return quiet


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON with the version of its schema.")
quiet_option = click.option("--quiet", "-q", is_flag=True, callback=_hushed, help="Print no progress and no notes.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace an existing output.")
base_revision_option = click.option("--base-revision", help="The revision of a base on the hub.")
prefer_option = click.option(
    "--prefer",
    type=click.Choice(["size", "speed"]),
    default="size",
    show_default=True,
    help="Whether to write exact tensors with the fewest bytes, or for the fastest application.",
)


def workers_option(default: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """`--workers`: the threads of one verb's own work, which change no result. default: their number, in words."""
    return click.option(
        "--workers",
        type=click.IntRange(min=1),
        default=None,
        help=f"The number of threads that read, hash and rebuild.  [default: {default}]",
    )


def threads_option(last: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """`--threads`: the command runs with this many threads, and is not passed the number.

    last: what another number may change.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(*args: Any, threads: int | None, **given: Any) -> None:
            with use_threads(threads):
                command(*args, **given)

        return click.option(
            "--threads",
            type=click.IntRange(1, THREADS_MAX),
            help="The number of threads of all libraries and child processes; another number may change "
            f"{last}.  [default: that of each library, about one for each processor]",
        )(run)

    return decorate
