"""Read a YAML file that holds one mapping. Its author may be a stranger, so its size and its references are bounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from peraxis_tools.errors import OptionError, first_line
from peraxis_tools.process.optional import require

__all__ = ["check_yaml", "read_mapping", "what_is_wrong"]

_SIZE: Final = 1 << 16  # of a file of options
_DEPTH: Final = 64  # of values in values: the time of the parser grows with its square


def check_yaml(text: str, label: str, *, limit: int = _SIZE) -> None:
    """Raise OptionError for a text of more bytes than the limit, with references (`*name`), or of many levels.

    A few lines of references to references stand for any number of values. Raises yaml.YAMLError, ValueError,
    RecursionError for a text that is not YAML.
    """
    import yaml

    _refuse_large(len(text.encode()), limit, label)
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise OptionError(f"{label}: has a reference (*name); write the value itself")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEPTH:
            raise OptionError(f"{label}: has values at more than {_DEPTH} levels; write it flatter")


def what_is_wrong(error: Exception, *, above: int = 0) -> str:
    """The problem that a parser of YAML found, with its line, like `line 2: expected ',' or ']', but got ':'`.

    above: the lines of the file above the text that was parsed.
    """
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return first_line(error) if mark is None or not problem else f"line {above + mark.line + 1}: {first_line(problem)}"


def _refuse_large(size: int, limit: int, label: str) -> None:
    if size > limit:
        raise OptionError(f"{label}: is larger than {limit} bytes; shorten it")


def _refuse_twice(node: Any, label: str) -> None:
    """Raise OptionError for a key that stands twice in the mapping of a file; YAML would take the last value."""
    seen: dict[str, int] = {}
    for key, _ in getattr(node, "value", ()) if getattr(node, "id", "") == "mapping" else ():
        line = key.start_mark.line + 1
        if str(key.value) in seen:
            raise OptionError(f"{label}: {key.value} stands in lines {seen[str(key.value)]} and {line}; keep one")
        seen[str(key.value)] = line


def read_mapping(path: Path) -> dict[Any, Any]:
    """The mapping of a YAML (or JSON) file; an empty file is an empty one.

    Raises OptionError for another file, a larger one than 64 KiB, one with a key twice, and one with references
    (`*name`), because a few lines of references to references stand for any number of values.
    """
    require(f"{path} (a configuration)", "yaml")
    import yaml

    with open(path, "rb") as file:
        data = file.read(_SIZE + 1)
    _refuse_large(len(data), _SIZE, str(path))
    try:
        text = data.decode("utf-8")
        check_yaml(text, str(path))
        _refuse_twice(yaml.compose(text, yaml.SafeLoader), str(path))
        values = yaml.safe_load(text)
        repr(values)  # a ValueError for an integer that is too large to be shown
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:  # an invalid date is a ValueError
        raise OptionError(f"{path}: not a YAML file: {what_is_wrong(error)}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise OptionError(f"{path}: must have lines `option: value`, not a {type(values).__name__}")
    return values
