"""Say when numba compiles, because a first use may then take half a minute without a sign of progress.

numba keeps compiled kernels in a folder, and reports only those that it compiles, not those that it loads.
"""

from __future__ import annotations

import contextlib
import logging
from functools import cache
from importlib import import_module
from typing import Any, Final

__all__ = ["PROGRESS", "tell_compiling"]

PROGRESS: Final = logging.getLogger("peraxis.progress")
_LINE: Final = "compiling the kernels for this machine, which takes up to 30 s; the next run finds them compiled"


@cache
def tell_compiling() -> None:
    """Log one line at level INFO when numba compiles for the first time in this process. Imports numba."""
    with contextlib.suppress(ImportError, AttributeError):  # numba calls this interface unstable
        events: Any = import_module("numba.core.event")

        class Compiling(events.Listener):  # type: ignore[misc, unused-ignore]
            told = False

            def on_start(self, event: Any) -> None:
                if not self.told:
                    self.told = True
                    PROGRESS.info(_LINE)

            def on_end(self, event: Any) -> None:
                pass

        events.register("numba:compile", Compiling())
