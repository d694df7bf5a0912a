"""The only layer that prints: rich text or versioned JSON of a result, progress, errors."""

from peraxis_tools.report.console import (
    emit,
    hub_progress,
    json_text,
    plain_text,
    print_error,
    print_note,
    print_notes,
    print_progress,
    show,
    size,
    text,
    to_json,
    write,
)

__all__ = [
    "emit",
    "hub_progress",
    "json_text",
    "plain_text",
    "print_error",
    "print_note",
    "print_notes",
    "print_progress",
    "show",
    "size",
    "text",
    "to_json",
    "write",
]
