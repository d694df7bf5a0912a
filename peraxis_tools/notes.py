"""What a run has to say beside its result: through `logging`, under the name `peraxis`.

The command line shows each as a line on standard error; a program sets the logger up as it likes.
"""

from __future__ import annotations

import logging
from typing import Final

__all__ = ["LOGGER", "note"]

LOGGER: Final = logging.getLogger("peraxis")


def note(message: str) -> None:
    """Say one sentence that the user should read, though nothing failed."""
    LOGGER.warning("%s", message)
