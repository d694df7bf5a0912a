"""Find the base tensor of each fine-tuned one if the names differ only by a prefix.

Wrappers (torch.compile, DDP, PEFT) put a prefix before every name; vision-language models have their text model under
another path. A delta finds base tensors by their exact names (SPEC 7.1), so the fine-tune takes the base's names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Final

from peraxis_format import TensorInfo

__all__ = ["base_names", "renaming_text"]

_WRAPPERS: Final = ("_orig_mod.", "module.", "base_model.model.")
# Paths of the same place in checkpoints of one model; each pair is tried both ways.
_PATHS: Final = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.", ""),
    ("transformer.", ""),
)


def _unwrapped(name: str) -> str:
    """The name without the prefixes and infixes of wrappers (`_orig_mod.`)."""
    name = name.replace("_orig_mod.", "")
    while wrapper := next((prefix for prefix in _WRAPPERS if name.startswith(prefix)), None):
        name = name.removeprefix(wrapper)
    return name


def base_names(fine_tuned: Mapping[str, TensorInfo], base: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Map old names to new names, for fine-tuned tensors that the base has under another name.

    The shapes are equal except for the first dimension, and no two tensors get the same name.
    """
    by_plain = {_unwrapped(name): name for name in base}
    base_is_wrapped = any(plain != name for plain, name in by_plain.items())
    found: dict[str, str] = {}
    taken = set(fine_tuned)
    for name, info in fine_tuned.items():
        if name in base:
            continue
        matches = (by_plain[plain] for plain in _candidates(name) if plain in by_plain)
        new = next((match for match in matches if base[match].shape[1:] == info.shape[1:]), None)
        if new is None and not base_is_wrapped and _unwrapped(name) != name:
            new = _unwrapped(name)  # not in the base, but with the same prefix as the others
        if new is not None and new not in taken:
            found[name] = new
            taken.add(new)
    return found


def _candidates(name: str) -> Iterator[str]:
    """The unwrapped names that this tensor may have in the base."""
    plain = _unwrapped(name)
    yield plain
    for left, right in _PATHS:
        for old, new in ((left, right), (right, left)):
            if plain.startswith(old):
                yield new + plain.removeprefix(old)


def renaming_text(names: Mapping[str, str]) -> str:
    """A text about the renaming: the most frequent prefix and one example."""
    if not names:
        return ""
    pairs = Counter(_prefixes(old, new) for old, new in names.items())
    (old, new), _ = pairs.most_common(1)[0]
    example = next(iter(names))
    return f"{len(names)} tensors take the base's names: {old or '(none)'} -> {new or '(none)'}, like {names[example]}"


def _prefixes(old: str, new: str) -> tuple[str, str]:
    """The parts of both names before their common ending, in whole words."""
    a, b = old.split("."), new.split(".")
    while a and b and a[-1] == b[-1]:
        a.pop()
        b.pop()
    return ".".join(a), ".".join(b)
