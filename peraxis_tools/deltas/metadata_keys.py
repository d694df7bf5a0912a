"""The metadata that `compress` writes into a file, by key; `inspect` reads it without importing the compressor."""

from __future__ import annotations

from typing import Final

__all__ = ["CONFIG_KEY", "DISTILLATION_KEY", "REPORT_KEY"]

CONFIG_KEY: Final = "peraxis.config"  # the options of the run, as JSON
DISTILLATION_KEY: Final = "peraxis.distillation"  # samples, steps, and the held-out loss before and after
REPORT_KEY: Final = "peraxis.report"  # errors and notes by module, as JSON
