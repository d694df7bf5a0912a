"""`peraxis-tools completion`."""

from __future__ import annotations

from typing import Final

import click
from click.shell_completion import get_completion_class

from peraxis_tools.report.console import write

__all__ = ["command"]

_PROGRAM = "peraxis-tools"
_VARIABLE = "_PERAXIS_TOOLS_COMPLETE"
# Where we have no completion, as after the `=` of FORMAT=PATH, bash completes file names.
_BASH_ASKS: Final = "complete -o nosort -F"
_BASH_FALLS_BACK: Final = "complete -o bashdefault -o default -o nosort -F"


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print the script that completes verbs, options and file names in SHELL.

    \b
    Example: peraxis-tools completion bash > ~/.local/share/bash-completion/completions/peraxis-tools
             peraxis-tools completion zsh > ~/.zfunc/_peraxis-tools
             peraxis-tools completion fish > ~/.config/fish/completions/peraxis-tools.fish
    """
    from peraxis_tools.cli import cli

    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"no completion for {shell}")
    complete = kind(cli, {}, _PROGRAM, _VARIABLE)
    # Use the template itself, because `source()` would start the shell to ask for its version.
    template = complete.source_template.replace(_BASH_ASKS, _BASH_FALLS_BACK)
    write(template % complete.source_vars())
