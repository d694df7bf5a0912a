"""Errors of a live model. What is wrong with a file or its base keeps the codes of SPEC 8 (peraxis_format.errors)."""

from __future__ import annotations

from typing import ClassVar

__all__ = ["DeviceError", "LiveModelError"]


class LiveModelError(Exception):
    """A live model (or state dict) into which a delta cannot go as it is: what, where, what to do."""

    exit_status: ClassVar[int] = 2


class DeviceError(LiveModelError):
    """Something was asked for that needs another device than there is."""
