"""Options with one value: given twice, click would silently take the last one."""

from __future__ import annotations

import click

__all__ = ["refusing_repeated"]


def refusing_repeated(command: click.Command) -> click.Command:
    """The same command; it refuses an option that is given twice, unless that is repeatable or takes no value."""
    parse = command.parse_args
    if "parse_args" in vars(command):  # it was passed here before
        return command

    def parse_args(ctx: click.Context, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:  # which a shell's completion does
            _check(command, ctx, list(args))
        return parse(ctx, args)

    command.parse_args = parse_args  # type: ignore[method-assign]
    return command


def _check(command: click.Command, ctx: click.Context, args: list[str]) -> None:
    """Raise click.UsageError for the first option that is given twice. With --help, the help is shown instead."""
    *_, given = command.make_parser(ctx).parse_args(args)
    if any(parameter.is_eager for parameter in given):
        return
    seen: set[str | None] = set()
    for parameter in given:
        if not isinstance(parameter, click.Option) or parameter.multiple or parameter.is_flag or parameter.count:
            continue
        if parameter.name in seen:
            raise click.UsageError(f"{parameter.opts[0]} is given twice; it takes one value", ctx)
        seen.add(parameter.name)
