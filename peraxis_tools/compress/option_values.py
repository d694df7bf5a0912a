"""The values of options in a mapping (YAML, JSON): their names and types."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

from peraxis_tools.display.sizes import parse_size
from peraxis_tools.errors import OptionError

__all__ = ["AUTO", "named", "texts", "typed"]

AUTO: Final[Literal["auto"]] = "auto"
_SIZES: Final = ("target_size", "hidden_limit", "logits_limit")
# Options whose default has another type.
_KINDS: Final[Mapping[str, type]] = {
    "target_ratio": float,
    "target_size": int,
    "masks": int,
    "calibration_samples": int,
    "generated_samples": int,
    "exact": str,
    "text_column": str,
}
_KIND_NAMES: Final[Mapping[type, str]] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
}


def named(values: Mapping[Any, Any]) -> dict[str, Any]:
    """The values by the names of options, with `_` for `-`. Raises OptionError for an option that is given twice."""
    keys: dict[str, object] = {}
    found: dict[str, Any] = {}
    for key, given in values.items():
        name = str(key).replace("-", "_")
        if name in keys:
            raise OptionError(f"{key} is another name of {keys[name]}; give only one of them")
        keys[name], found[name] = key, given
    return found


def texts(value: Any) -> str | tuple[str, ...] | None:
    """Normalise the calibration texts: one text is a string, as in files of earlier versions; several are a tuple."""
    if value is None or isinstance(value, str | Path):
        return None if value is None else str(value)
    if isinstance(value, list | tuple) and all(isinstance(text, str | Path) for text in value):
        return None if not value else str(value[0]) if len(value) == 1 else tuple(map(str, value))
    raise OptionError(f"calibration {value!r}: must be a text, or a list of them")


def typed(name: str, value: Any, default: object) -> Any:
    """The value of an option with this default, in its type. Raises OptionError."""
    if name in _SIZES and isinstance(value, str):
        return parse_size(value)
    kind: type = _KINDS.get(name, type(default))
    if (name == "masks" and value == AUTO) or kind is type(None) or (value is None and default is None):
        return value
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    allowed = "auto, or 1 to 8" if name == "masks" else _KIND_NAMES[kind]
    raise OptionError(f"{name} {value!r}: must be {allowed}")
