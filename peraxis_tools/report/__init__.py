"""The one layer that prints: rich text or versioned JSON from a result, progress, errors."""

from peraxis_tools.report.console import (
    Progress,
    Stages,
    emit,
    hub_progress,
    json_text,
    print_error,
    print_note,
    print_notes,
    progress,
    show,
    size,
    staged,
    text,
    to_json,
    write,
)

__all__ = [
    "Progress",
    "Stages",
    "emit",
    "hub_progress",
    "json_text",
    "print_error",
    "print_note",
    "print_notes",
    "progress",
    "show",
    "size",
    "staged",
    "text",
    "to_json",
    "write",
]
