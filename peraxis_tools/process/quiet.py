"""Silence transformers, datasets and the hub library: their bars and log lines do not help our users."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from peraxis_tools.display.notes import note

__all__ = ["hush_hub", "quiet_datasets", "quiet_transformers"]

_HUB_LOGGER: Final = "huggingface_hub.utils._http"


def hush_hub() -> None:
    """From now on the hub library's lines about failed attempts are one note. The last failure is an error anyway."""
    logging.getLogger(_HUB_LOGGER).addFilter(_is_no_attempt)


def _is_no_attempt(record: logging.LogRecord) -> bool:
    """A filter of log records: drops those of a failed attempt, and notes that others follow."""
    message = record.getMessage()
    if message.startswith("Retrying in"):
        note("the hub does not answer; trying again for half a minute (HF_HUB_OFFLINE=1 uses the cache alone)")
        return False
    return "thrown while requesting" not in message


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Within the block, the library `datasets` logs nothing: its errors are raised too, and become one line of ours."""
    import datasets  # it sets the level of its logger when it is imported

    logger = logging.getLogger(datasets.__name__)
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within the block, transformers shows no bars and logs only errors."""
    from transformers.utils import logging as its

    level, bars = its.get_verbosity(), its.is_progress_bar_enabled()
    its.set_verbosity_error()
    its.disable_progress_bar()
    try:
        yield
    finally:
        its.set_verbosity(level)
        if bars:
            its.enable_progress_bar()
