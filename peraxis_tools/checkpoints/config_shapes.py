"""Refuse a configuration whose model does not fit a checkpoint's weights, before memory is taken for the model.

transformers allocates each weight that the checkpoint has in another shape, or not at all, and only then says so. A
vocabulary of 2^40 tokens in a config.json would fill the memory. On the meta device a model takes none.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from peraxis_tools.errors import CheckFailedError
from peraxis_tools.process.quiet import quiet_transformers

__all__ = ["check_config_shapes", "other_shape"]

_HARMLESS: Final = 1 << 28  # weights that take no more memory than any machine has
_PACKED: Final = 16  # weights in one element of a quantised checkpoint, at most


def check_config_shapes(
    build: Callable[[Any], Any], config: Any, shapes: Mapping[str, tuple[int, ...]], label: str
) -> None:
    """Raise CheckFailedError if the model of a configuration has weights that a checkpoint cannot fill.

    Those are a weight with another number of elements than under its name in the checkpoint, and one with more than
    the whole checkpoint: transformers may join weights under a new name. build: makes the model of a configuration.
    shapes: of the checkpoint's tensors; those of a quantised one have fewer elements than weights. A model that cannot
    be built is no error here; building it says more.
    """
    import torch

    try:
        with quiet_transformers(), warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            wanted = {name: tuple(value.shape) for name, value in build(copy.deepcopy(config)).named_parameters()}
    except Exception:  # an untrusted configuration can fail in any way
        return
    packed = getattr(config, "quantization_config", None) is not None
    most = sum(map(math.prod, shapes.values())) * (_PACKED if packed else 1)
    for name, shape in sorted(wanted.items()):
        if not packed and name in shapes and math.prod(shapes[name]) != math.prod(shape):
            raise other_shape(label, name, shapes[name], shape)
        # A table that is computed, like one of positions, is a parameter too, and no file has it.
        if math.prod(shape) > max(most, _HARMLESS):
            raise CheckFailedError(
                f"{label}: the model of its config.json has a weight {name} of {list(shape)}, which is more than all "
                "of its tensors; the configuration is another model's"
            )


def other_shape(label: str, name: str, own: Sequence[int], wanted: Sequence[int]) -> CheckFailedError:
    """The error of a weight that the model of the config.json has in another shape than the checkpoint."""
    return CheckFailedError(
        f"{label}: {name} is {list(own)}, and the model of its config.json has {list(wanted)} there; the "
        "configuration is another model's"
    )
