"""Content IDs as people write them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from peraxis_tools.errors import ToolError

__all__ = ["parse_content_ids"]

_PREFIX: Final = "sha256:"


def parse_content_ids(texts: Sequence[str]) -> tuple[str, ...]:
    """Each as `sha256:` and 64 lower-case hex digits (SPEC 3.13). The prefix may be missing, digits may be upper case.

    Raises ToolError for anything else, because no file could have such an ID.
    """
    return tuple(map(_parsed, texts))


def _parsed(text: str) -> str:
    digits = text.lower().removeprefix(_PREFIX)
    if not re.fullmatch(r"[0-9a-f]{64}", digits):
        raise ToolError(f"{text!r}: not a content ID; pass {_PREFIX} and 64 hex digits, as `inspect` prints them")
    return _PREFIX + digits
