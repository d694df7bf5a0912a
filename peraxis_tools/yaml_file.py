"""Read a YAML file that holds one mapping. Its author may be a stranger, so its size and its references are bounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from peraxis_tools.errors import OptionError, first_line
from peraxis_tools.optional import require

__all__ = ["read_mapping"]

_SIZE: Final = 1 << 16  # bytes of a file of options


def read_mapping(path: Path) -> dict[Any, Any]:
    """The mapping of a YAML (or JSON) file; an empty file is an empty one.

    Raises OptionError for another file, a larger one than 64 KiB, and for one with references (`*name`), because a few
    lines of references to references stand for any number of values.
    """
    require(f"{path} (a configuration)", "yaml")
    import yaml

    with open(path, "rb") as file:
        data = file.read(_SIZE + 1)
    if len(data) > _SIZE:
        raise OptionError(f"{path}: is larger than {_SIZE} bytes; pass a file of options")
    try:
        text = data.decode("utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise OptionError(f"{path}: has a reference (*name); write the value itself")
        values = yaml.safe_load(text)
        repr(values)  # a ValueError for an integer that is too large to be shown
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:  # an invalid date is a ValueError
        raise OptionError(f"{path}: not a YAML file: {first_line(error)}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise OptionError(f"{path}: must have lines `option: value`, not a {type(values).__name__}")
    return values
