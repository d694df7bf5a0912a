"""Encode a text with a tokenizer of a stranger, whose errors name the tokenizer's folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peraxis_tools.errors import ToolError, library_reason

__all__ = ["token_ids", "tokenizer_errors"]


def token_ids(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """The token ids of a text. special: with the tokens that the tokenizer adds to each text. Raises ToolError."""
    name = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
    with tokenizer_errors(f"{name}: its tokenizer cannot encode a text"):
        return list(tokenizer(text, verbose=False, add_special_tokens=special)["input_ids"])


@contextmanager
def tokenizer_errors(what: str, *, folder: str = "", shown: str = "") -> Iterator[None]:
    """Turn the errors of tokenizers into a ToolError: it raises many types, and panics, which are no Exception.

    folder, shown: as in `library_reason`.
    """
    try:
        yield
    except (ToolError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ToolError(f"{what}: {library_reason(error, folder=folder, shown=shown)}") from None
