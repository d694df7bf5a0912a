"""The one test of the pytest plugin (see plugin.py)."""

from __future__ import annotations

from collections.abc import Callable

from .cases import Case

__all__ = ["test_adapter_conforms"]


def test_adapter_conforms(pxd_case: Case, pxd_run: Callable[[Case], None]) -> None:
    """The adapter handles this case as SPEC.md requires."""
    pxd_run(pxd_case)
