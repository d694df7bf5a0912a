"""The number of positions of a model by its config.json: the longest sample that it can compute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from peraxis_tools.errors import OptionError

__all__ = ["DEFAULT_LENGTH", "checked_length", "positions_of"]

DEFAULT_LENGTH: Final = 512
_KEYS: Final = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len")


def positions_of(config: Mapping[str, Any]) -> int | None:
    """The largest number of tokens in a sample; None if the configuration has no limit.

    A configuration that stretches its rotary embedding (rope_scaling) has that factor more than the original ones.
    """
    text = config.get("text_config")
    config = text if isinstance(text, Mapping) else config
    limit: int | None = next(
        (config[key] for key in _KEYS if isinstance(config.get(key), int) and config[key] > 0), None
    )
    if limit is None:
        return None
    for key in ("rope_scaling", "rope_parameters"):
        scaling = config.get(key)
        if isinstance(scaling, Mapping) and isinstance(factor := scaling.get("factor"), int | float):
            original = scaling.get("original_max_position_embeddings", limit)
            limit = max(limit, int(factor * original) if isinstance(original, int) else limit)
    return limit


def checked_length(config: Mapping[str, Any], length: int, label: str) -> int:
    """The number of tokens in a sample: `length`, or all positions of the model if the default is more.

    Raises OptionError if another length is more than the model has positions.
    """
    limit = positions_of(config)
    if limit is None or length <= limit:
        return length
    if length != DEFAULT_LENGTH:
        raise OptionError(f"sequence_length {length}: {label} has {limit} positions; pass at most {limit}")
    return limit
