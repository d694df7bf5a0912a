"""`peraxis-tools help`."""

from __future__ import annotations

import click

from peraxis_tools.report.console import write

__all__ = ["command"]


@click.command("help")
@click.argument("verb", required=False)
def command(verb: str | None) -> None:
    """Show the help of VERB, or of the program.

    \b
    Example: peraxis-tools help compress
    """
    from peraxis_tools.cli import cli

    parent = click.get_current_context().parent or click.Context(cli, info_name="peraxis-tools")
    if verb is None:
        write(f"{cli.get_help(parent)}\n")
        return
    name, found, _ = cli.resolve_command(parent, [verb])
    if found is not None:
        with click.Context(found, info_name=name, parent=parent) as context:
            write(f"{found.get_help(context)}\n")
