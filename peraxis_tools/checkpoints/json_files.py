"""Read the JSON of small files; an error names the file and the remedy."""

from __future__ import annotations

import json
from typing import Any

from peraxis_tools.errors import ToolError

__all__ = ["json_object", "json_value"]


def json_value(data: bytes, label: str, *, remedy: str = "correct it") -> Any:
    """Return the JSON value of a file's content. label: the file, for errors. Raises ToolError if it is not JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ToolError(f"{label}: not JSON ({reason}); {remedy}") from None


def json_object(data: bytes, label: str, *, remedy: str = "correct it") -> dict[str, Any]:
    """Return the JSON object of a file's content, as `json_value`. Raises ToolError for any other value too."""
    found = json_value(data, label, remedy=remedy)
    if not isinstance(found, dict):
        raise ToolError(f"{label}: not a JSON object; {remedy}")
    return found
