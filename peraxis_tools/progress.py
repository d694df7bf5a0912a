"""How work of several stages says how far it is, without knowing who listens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TypeAlias

__all__ = ["ProgressOf", "silent"]

# progress(description, total) opens a stage and gives what is called with each number of units done in it; a total of
# None is that of a stage whose end cannot be seen.
ProgressOf: TypeAlias = Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]


@contextlib.contextmanager
def silent(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A stage that nobody watches."""
    yield lambda _: None
