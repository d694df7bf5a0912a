"""The names of a model's tensors in its checkpoint: without the words that wrappers add to them.

A model may have a submodule whose name is such a word, and its tensors keep it. So a trainer goes by the modules, whose
classes say what is a wrapper. A server also tries the words alone: it may have wrappers of other classes, and a name
too many does no harm, because the digests show whether a tensor is the right one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from torch import nn

__all__ = ["checkpoint_names", "names_by_words"]

# Words that wrappers add to the names of parameters: anywhere, and at the beginning.
_WITHIN: Final = re.compile(r"(?<![^.])(?:_orig_mod|_checkpoint_wrapped_module|base_layer)\.(?=.)")
_LEADING: Final = re.compile(r"^(?:module|base_model\.model)\.(?=.)")

_ALWAYS: Final = ("_orig_mod", "_checkpoint_wrapped_module")  # no model has such names of its own
# The name of a wrapped module -> the classes of its wrapper, by their names: their packages may not be installed.
_WRAPPERS: Final[Mapping[str, frozenset[str]]] = {
    "module": frozenset({"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"}),
    "base_model": frozenset({"PeftModel", "PeftMixedModel"}),
    "model": frozenset({"BaseTuner", "AdaptionPromptModel"}),
    "base_layer": frozenset({"BaseTunerLayer"}),
}


def checkpoint_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """These names of a model's tensors -> their names in its checkpoint, without those of wrapped modules.

    Wrappers are the classes of torch.compile, DistributedDataParallel, DeepSpeed, activation checkpointing and PEFT;
    and around the whole model, any that has a submodule `module` and nothing else, or such a wrapper as its `module`.
    No two names are equal.
    """
    own = {name: name for name in names}
    found = {name: _through_wrappers(model, name) for name in own}
    if len(set(found.values())) == len(found):
        return found
    return _unless_equal(own, found.__getitem__)


def _through_wrappers(model: nn.Module, name: str) -> str:
    kept: list[str] = []
    owner: nn.Module | None = model
    outermost = True
    words = name.split(".")
    for word in words[:-1]:
        owner = _holder(owner, word)
        through = word in _ALWAYS or (owner is not None and _wraps(owner, word, outermost=outermost))
        outermost = outermost and through
        if not through:
            kept.append(word)
        owner = None if owner is None else owner._modules.get(word)
    return ".".join([*kept, words[-1]])


def _holder(owner: nn.Module | None, word: str) -> nn.Module | None:
    """The module that has a submodule of this name, also inside activation checkpointing: a state dict omits that."""
    while owner is not None and word not in owner._modules:
        owner = next((owner._modules[always] for always in _ALWAYS if always in owner._modules), None)
    return owner


def _wraps(owner: nn.Module, word: str, *, outermost: bool) -> bool:
    """Whether a submodule of this name is what a wrapper wraps."""
    if _is_any(owner, _WRAPPERS.get(word, frozenset())):
        return True
    if not outermost or word != "module":
        return False
    alone = [*owner._modules, *owner._parameters, *owner._buffers] == ["module"]
    return alone or _is_any(owner._modules.get("module"), _WRAPPERS["module"])


def _is_any(module: nn.Module | None, classes: frozenset[str]) -> bool:
    return any(kind.__name__ in classes for kind in type(module).__mro__)


def names_by_words(names: Iterable[str]) -> dict[str, str]:
    """All names of a model's tensors -> names without the words that wrappers add, whatever has these words.

    No two are equal.
    """
    names = _unless_equal({own: own for own in names}, lambda name: _WITHIN.sub("", name))
    while names and all(map(_LEADING.match, names.values())):
        names = {own: _LEADING.sub("", name) for own, name in names.items()}
    return _unless_equal(names, _without_leading)


def _without_leading(name: str) -> str:
    shorter = _LEADING.sub("", name)
    return name if shorter == name else _without_leading(shorter)


def _unless_equal(names: dict[str, str], shortened: Callable[[str], str]) -> dict[str, str]:
    """The shortened names, except those that several names have in common."""
    short = {own: shortened(name) for own, name in names.items()}
    count = Counter([*short.values(), *(name for own, name in names.items() if name != short[own])])
    return {own: short[own] if count[short[own]] == 1 else name for own, name in names.items()}
