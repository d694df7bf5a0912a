"""The calibration of a file as people read it: its texts, each with its weight where the weights differ.

The manifest names the texts (SPEC 3.4), and the options in its metadata their weights.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

import peraxis_format as pxd
from peraxis_tools.deltas.metadata_keys import CONFIG_KEY

__all__ = ["calibration_text"]

_WEIGHTED: Final = re.compile(r"(.+):([^:]+)", re.DOTALL)


def calibration_text(manifest: pxd.Manifest) -> str:
    """The source of the calibration, as `a.jsonl (weight 2); b.jsonl (weight 1)`; "" without one.

    Weights that are equal, or that the options do not have, are left out.
    """
    if manifest.calibration is None:
        return ""
    source = manifest.calibration.source
    names, weights = _texts(manifest.metadata.get(CONFIG_KEY, ""), source.split("; "))
    plain = "; ".join(names)
    if len(set(weights)) < 2 or not f"{source}; ".startswith(f"{plain}; "):
        return source
    weighted = "; ".join(f"{name} (weight {weight:g})" for name, weight in zip(names, weights, strict=True))
    return weighted + source.removeprefix(plain)


def _texts(config: str, parts: list[str]) -> tuple[list[str], list[float]]:
    """The names and weights of the texts in the options; a text that is one of `parts` is a name as a whole."""
    try:
        options: Any = json.loads(config)
    except (ValueError, RecursionError):
        return [], []
    given = options.get("calibration") if isinstance(options, dict) else None
    names, weights = [], []
    for text in given if isinstance(given, list) else ():
        if not isinstance(text, str):
            return [], []
        found = None if text in parts else _WEIGHTED.fullmatch(text)
        names.append(found[1] if found else text)
        try:
            weights.append(float(found[2]) if found else 1.0)
        except ValueError:
            return [], []
    return names, weights
