"""The reference compressor: plan -> statistics -> fit -> deltas -> file. `run.py` is the whole of it in order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peraxis_tools.compress.run import CompressResult

__all__ = ["compress"]


def compress(
    base: str | Path,
    fine_tuned: str | Path,
    output: str | Path,
    *,
    progress: Callable[..., Any] | None = None,
    **choices: Any,
) -> CompressResult:
    """Write fine_tuned as a delta to base: `compress("org/base", "org/fine-tuned", "delta.pxd", calibration="c4")`.

    choices: the fields of `CompressOptions`, which says what each means. Raises CheckpointError, ToolError,
    OptionError. A thin door to `run.compress`, so that importing the package stays light.
    """
    from peraxis_tools.compress.options import CompressOptions
    from peraxis_tools.compress.run import compress as run

    return run(base, fine_tuned, output, CompressOptions(**choices), progress=progress)
