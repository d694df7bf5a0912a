"""Decode the token ids of an evaluation for the report."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from peraxis_tools.evaluate.types import Fidelity

__all__ = ["readable", "special_ids"]


def special_ids(tokenizer: Any) -> frozenset[int]:
    """The tokenizer's special tokens, and its added tokens (the markers of chat templates)."""
    return frozenset(map(int, (*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {}))))


def readable(fidelity: Fidelity, tokenizer: Any) -> Fidelity:
    """The fidelity with the text of its worst and special tokens."""
    tail = fidelity.tail
    worst = tuple(replace(token, text=_text(tokenizer, token.context)) for token in tail.worst)
    special = tuple(replace(token, text=_text(tokenizer, (token.token,))) for token in tail.special)
    return replace(fidelity, tail=replace(tail, worst=worst, special=special))


def _text(tokenizer: Any, ids: tuple[int, ...]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
