"""Named sets of options of `compress`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

__all__ = ["RECIPES"]

# Named sets of options; a single option wins over its recipe.
RECIPES: Final[Mapping[str, Mapping[str, Any]]] = {
    "quick": {"fit": "none"},
    "fit": {"fit": "refined"},
    "distilled": {"distill_samples": 150, "generated_samples": 300},
    "best": {
        "distill_samples": 550,
        "generated_samples": 400,
        "held_out": 0.1,
        "distill_epochs": 8,
        "distill_batch_size": 4,
        "distill_sign_lr": 0.035,
        "distill_full_lr": 0.003,
    },
}
