"""The `peraxis-tools` command: a click group whose verbs are imported when they are called.

`inspect` of a large file is to be instant, so nothing here imports torch or transformers. Errors become one
line and the exit code of their class.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Final

import click

from peraxis_format import BackendError, CheckpointError, PxdError, ShapeError, __version__
from peraxis_tools.errors import ToolError
from peraxis_tools.report import print_error

__all__ = ["cli", "main"]

INTERRUPTED: Final = 130
# Verb -> module in peraxis_tools.commands, whose `command` is the click command; in the order of a person's day.
VERBS: Final = {
    "compress": "One fine-tune and its base in, one .pxd out.",
    "inspect": "What a .pxd is, for which base, and where its bytes go.",
    "verify": "Prove that a .pxd is whole, and made for this base.",
    "sign": "Sign a .pxd with a key or certificate, offline.",
    "apply": "Base + .pxd -> a complete Hugging Face folder.",
    "diff": "What two deltas, or a delta and a fine-tune, do differently.",
    "merge": "Several deltas on one base into one, or parts into a whole.",
    "split": "One delta into parts.",
    "convert": "From BitDelta's and the paper's .pt files; to LoRA or a checkpoint.",
    "eval": "How close base + .pxd comes to the fine-tune.",
    "publish": "A .pxd and its model card to the Hugging Face hub.",
    "demo": "Train a small pair and show the whole way, offline.",
    "completion": "The completion script of a shell.",
}


class LazyGroup(click.Group):
    """A group that imports a verb's module when the verb is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"peraxis_tools.commands.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # From the table above, so that `--help` imports no verb.
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="peraxis-tools")
def cli() -> None:
    """Full fine-tunes as 1-bit differences to a shared base.

    Exit codes: 0 done, 1 a check failed (damaged, invalid, wrong base, different), 2 usage, input or I/O,
    3 not verifiable here, 130 interrupted.
    """


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def main() -> None:
    """Run the command line and exit with the code of what happened."""
    try:
        sys.exit(cli.main(standalone_mode=False) or 0)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        print_error("interrupted; nothing was written under the final name")
        sys.exit(INTERRUPTED)
    except (BackendError, PxdError, CheckpointError, ToolError) as error:
        print_error(_one_line(error))
        sys.exit(error.exit_status)
    except BrokenPipeError:
        # The reader of our output went away (`| head`): not an error, but nothing more can be flushed either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (OSError, ShapeError) as error:
        print_error(_one_line(error))
        sys.exit(ToolError.exit_status)
