"""A continued run has the threads of the interrupted one: another number may change a last bit of what is left."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from peraxis_tools.compress.run.work_folder import WorkFolder
from peraxis_tools.display.notes import note
from peraxis_tools.display.shown import counted
from peraxis_tools.errors import ToolError
from peraxis_tools.process.threads import threads_asked_for, use_threads

__all__ = ["continued"]


def continued(work: WorkFolder, *, notes: bool) -> AbstractContextManager[None]:
    """Use the threads of the run that began the folder, in this context. notes: say that this run continues it.

    Raises ToolError if the user asked for another number.
    """
    now = torch.get_num_threads()
    before = work.threads or now
    if before != now and threads_asked_for() is not None:
        raise ToolError(
            f"{work.path}: was left by a run with {counted(before, 'thread')}, and another number may change a last "
            f"bit; continue it with --threads {before}, or begin anew with --no-resume"
        )
    if notes and (finished := work.finished()) is not None:
        note(f"{work.path}: an interrupted run is continued after {finished}; resume=False (--no-resume) begins anew")
    if before == now:
        return nullcontext()
    if notes:
        note(f"{work.path}: the interrupted run had {counted(before, 'thread')}, so this one has as many")
    return use_threads(before)
