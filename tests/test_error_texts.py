"""Our own errors have fields: no module takes the message of one apart."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.test_architecture import ROOT, sources

PRODUCTION = ("peraxis", "peraxis_format", "peraxis_tools")
METHODS = {"partition", "rpartition", "startswith", "endswith", "replace", "removeprefix", "removesuffix", "find"}
# Functions that read the text of an error of ours, and why.
EXCEPTIONS = {"peraxis_format/engines/vllm/fetching.py": "the ranks answer with the text alone, through vLLM"}


def own_errors() -> set[str]:
    """The names of the classes of ours whose names end in Error."""
    trees = (ast.parse(path.read_text("utf-8")) for path in sources(*PRODUCTION))
    return {
        node.name
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name.endswith("Error")
    }


def caught(handler: ast.ExceptHandler) -> set[str]:
    """The names in the types of an `except`."""
    nodes = [] if handler.type is None else ast.walk(handler.type)
    return {getattr(node, "attr", getattr(node, "id", "")) for node in nodes}


def taken_apart(handler: ast.ExceptHandler) -> Iterator[ast.Call]:
    """The calls in a handler that take `str(error)` apart, by a method of texts or a regular expression."""
    text = f"str({handler.name})"
    for node in ast.walk(handler):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        of, method = ast.unparse(node.func.value), node.func.attr
        cut = of == text and (method in METHODS or (method == "split" and node.args))
        matched = of == "re" and any(ast.unparse(argument) == text for argument in node.args)
        if cut or matched:
            yield node


def test_the_message_of_an_error_of_ours_is_never_taken_apart() -> None:
    own = own_errors()
    assert {"ToolError", "PxdError", "LiveModelError", "RequestError"} <= own
    found = {
        str(path.relative_to(ROOT)): ast.unparse(call)
        for path in sources(*PRODUCTION)
        for handler in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(handler, ast.ExceptHandler) and caught(handler) & own
        for call in taken_apart(handler)
    }
    assert set(found) == set(EXCEPTIONS), found
