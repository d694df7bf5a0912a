"""Notes of a run, beside its result, through `logging` under the name `peraxis`.

The command line prints each as a line on standard error; a program can configure the logger.
"""

from __future__ import annotations

import logging
from typing import Final

from peraxis_tools.display.shown import visible

__all__ = ["LOGGER", "note"]

LOGGER: Final = logging.getLogger("peraxis")


def note(message: str) -> None:
    """Log one sentence that the user should read although nothing failed, with names of files in one line of text."""
    LOGGER.warning("%s", visible(message))
