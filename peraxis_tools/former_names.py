"""Former names of options. Files and their digests still have them; users read the present names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

__all__ = ["present"]

_PRESENT: Final[Mapping[str, str]] = {"bits": "masks"}


def present(name: str, value: Any) -> tuple[str, Any]:
    """An option under its present name, with the value that it has there: the `bits: 1` of files is `masks: auto`."""
    return _PRESENT.get(name, name), "auto" if name == "bits" and type(value) is int and value == 1 else value
