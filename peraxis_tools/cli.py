"""The `peraxis-tools` command: a click group that imports a verb when it is called.

Nothing here imports torch or transformers, so that `inspect` of a large file is instant. Errors become one line and the
exit code of their class.
"""

from __future__ import annotations

from peraxis_tools.process.interrupts import INTERRUPTED, interrupts_end

with interrupts_end():
    import gc
    import importlib
    import os
    import re
    import sys
    import traceback
    from typing import Final

    # The libraries read these once, when they are imported. The tools distribute tensors over threads themselves, so
    # numpy's own threads would only compete. A thread of torch that waits for another one sleeps: by default it spins,
    # and beside a busy program most of the time goes there.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

    import click

    from peraxis_format import BackendError, CheckpointError, PxdError, ShapeError, __version__
    from peraxis_format.arguments import did_you_mean
    from peraxis_format.ops.compiling import PROGRESS
    from peraxis_tools.completing import completing_files
    from peraxis_tools.display.notes import LOGGER
    from peraxis_tools.display.option_names import on_the_command_line
    from peraxis_tools.errors import OptionError, ToolError, error_line
    from peraxis_tools.given_once import refusing_repeated
    from peraxis_tools.process.command_line import (
        Terminated,
        drop_output,
        drop_signals,
        interrupt_behind,
        prepared_process,
    )
    from peraxis_tools.process.memory_errors import out_of_memory
    from peraxis_tools.process.optional import MissingPackageError, missing
    from peraxis_tools.process.quiet import hush_hub
    from peraxis_tools.report.console import print_error, print_notes, print_progress

__all__ = ["VERBS", "cli", "main"]

_TYPED: Final = re.compile("'([^']*)' is not one of")
_TRACEBACK: Final = "PERAXIS_TRACEBACK"
_COMPLETE: Final = "_PERAXIS_TOOLS_COMPLETE"
# Verb -> its help line, in the usual order of use. The module of this name in peraxis_tools.commands has `command`.
VERBS: Final = {
    "compress": "Write a fine-tune as a difference to its base.",
    "inspect": "Show the content of a .pxd and the use of its bytes.",
    "verify": "Check that a .pxd is intact and made for this base.",
    "sign": "Sign a .pxd with a key or a certificate, offline.",
    "apply": "Write base + .pxd as a complete Hugging Face folder.",
    "update": "Write the changes from one checkpoint to the next, bit for bit.",
    "compact": "Fold a chain of updates into one.",
    "log": "Show the updates of a folder as a chain.",
    "diff": "Compare two deltas, or a delta and a fine-tune.",
    "merge": "Add up deltas on one base, or join the parts of one.",
    "split": "Split a delta into parts.",
    "convert": "Convert from a .pt delta, or to LoRA or a checkpoint.",
    "eval": "Measure how close base + .pxd is to the fine-tune.",
    "publish": "Upload a .pxd with a model card to the Hugging Face hub.",
    "pull": "Fetch a .pxd from the hub or a URL and verify it.",
    "extract": "Write the configuration and tokenizer of a .pxd.",
    "demo": "Train a small pair and show all steps, offline.",
    "completion": "Print the completion script of a shell.",
    "help": "Show the help of a verb.",
}


class _LazyGroup(click.Group):
    """A group that imports a verb's module when the verb is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        with interrupts_end():
            module = importlib.import_module(f"peraxis_tools.commands.{cmd_name}")
        command: click.Command = module.command
        return refusing_repeated(completing_files(command))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            ctx.fail(f"no command {args[0]!r}{did_you_mean(args[0], VERBS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # This uses the table above, so that `--help` imports no verb.
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="peraxis-tools")
def cli() -> None:
    """Full fine-tunes as lossy 1-bit differences to a shared base.

    Exit codes: 0 done, 1 a check failed (damaged, invalid, wrong base, different), 2 usage, input or I/O,
    3 not verifiable here, 130 interrupted (143 and 129: SIGTERM and SIGHUP). Of several files, 1 counts before 2 and
    2 before 3.
    """


def _usage(error: click.ClickException) -> str:
    """One line for an error of usage, with the command that shows the help."""
    said = " ".join(error.format_message().split()).rstrip(".")
    kind = error.param.type if isinstance(error, click.BadParameter) and error.param is not None else None
    if isinstance(kind, click.Choice) and (typed := _TYPED.search(said)):
        said += did_you_mean(typed[1], map(str, kind.choices))
    context = getattr(error, "ctx", None)
    return said if context is None else f"{said} (see `{context.command_path} --help`)"


def _said(error: BaseException) -> str:
    """One line for an error of a verb, with options as the user types them."""
    return on_the_command_line(error_line(error), _options() if isinstance(error, OptionError) else ())


def _options() -> list[str]:
    """The options of the verb that runs, like `--masks`."""
    command = cli.get_command(click.Context(cli), sys.argv[1]) if len(sys.argv) > 1 else None
    return [] if command is None else [name for parameter in command.params for name in parameter.opts]


def _with_notes(line: str, error: BaseException) -> str:
    """A line with the notes of an error: what is left of an interrupted run."""
    return "; ".join([line, *getattr(error, "__notes__", ())])


def _unexpected(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{os.path.basename(place.filename)}:{place.lineno}"
    return (
        f"internal error: {type(error).__name__}: {error_line(error)} ({where}); "
        f"please report it with the output that {_TRACEBACK}=1 adds"
    )


def _show_traceback() -> None:
    """Print the traceback of the current exception on standard error, if the user asked for it."""
    if os.environ.get(_TRACEBACK):
        traceback.print_exc()


def _run() -> None:
    """Run the verb. An error that an interrupt led to is raised as the interrupt."""
    try:
        _run_verb()
    except Exception as error:
        if (interrupt := interrupt_behind(error)) is None:
            raise
        raise interrupt from None


def _run_verb() -> None:
    if _COMPLETE in os.environ:
        cli.main(prog_name="peraxis-tools")
    with cli.make_context("peraxis-tools", sys.argv[1:]) as context:
        cli.invoke(context)
    sys.stdout.flush()


def main() -> None:
    """Run the command line and exit with its code."""
    print_notes(LOGGER)
    print_progress(PROGRESS)
    hush_hub()
    with prepared_process():
        code = _exit_code()
    exec("")  # else `python -m` dies by SIGINT if one passed a text that was run by `exec`, as dataclasses do
    # The interpreter would search every object of torch for cycles at its end, which takes seconds. Exit handlers run.
    gc.freeze()
    sys.exit(code)


def _import_failed(error: ImportError) -> int:
    """Print one line for a missing package; a failed import of our own modules is an internal error."""
    try:
        print_error(str(missing("this command", error)))
    except ImportError:
        _show_traceback()
        print_error(_unexpected(error))
        return ToolError.exit_status
    return MissingPackageError.exit_status


def _exit_code() -> int:
    """Run the verb, tell its error, and return the exit code."""
    try:
        return _told()
    except (KeyboardInterrupt, Terminated) as again:  # a second signal, before `drop_signals` was done
        drop_signals()
        return _told_signal(interrupt_behind(again) or again)


def _told_signal(error: BaseException) -> int:
    drop_signals()
    if isinstance(error, Terminated):
        print_error(_with_notes(f"ended by {error.name}", error))
        return error.exit_status
    print_error(_with_notes("interrupted", error))
    return INTERRUPTED


def _told() -> int:
    try:
        _run()
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        print_error(_usage(error))
        return error.exit_code
    except (click.Abort, KeyboardInterrupt, Terminated) as error:
        return _told_signal(error)
    except (BackendError, PxdError, CheckpointError, ToolError) as error:
        print_error(_said(error))
        return error.exit_status
    except ImportError as error:
        return _import_failed(error)
    except (OSError, ShapeError) as error:
        drop_output()
        if isinstance(error, BrokenPipeError) and error.filename is None:
            return 0  # the reader of standard output closed it (`| head`), which is not an error
        print_error(_with_notes(error_line(error), error))
        return ToolError.exit_status
    except Exception as error:
        if (line := out_of_memory(error, _options())) is not None:
            print_error(_with_notes(line, error))
            return ToolError.exit_status
        _show_traceback()
        print_error(_unexpected(error))
        return ToolError.exit_status
    return 0


if __name__ == "__main__":
    main()
