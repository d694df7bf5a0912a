"""`__all__` of a module has the names that other modules use, and no others."""

from __future__ import annotations

import ast
import re
from collections import Counter
from functools import cache

from tests.test_architecture import ROOT, module_of, sources

PRODUCTION = ("peraxis", "peraxis_format", "peraxis_tools")
EVERYWHERE = (*PRODUCTION, "conformance", "tests", "benchmarks", "examples", "docs")


def exported(tree: ast.Module) -> list[str]:
    """Return the names in `__all__`; none if the module has none."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [str(name) for name in ast.literal_eval(node.value)]
    return []


@cache
def files_with() -> Counter[str]:
    """Return the number of files that contain each word."""
    texts = [path.read_text("utf-8") for path in sources(*EVERYWHERE)] + [(ROOT / "pyproject.toml").read_text("utf-8")]
    return Counter(word for text in texts for word in set(re.findall(r"\w+", text)))


def test_every_exported_function_and_constant_is_used_by_another_file() -> None:
    alone = []
    for path in sources(*PRODUCTION):
        tree = ast.parse(path.read_text("utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        # Types stay: they are the arguments and the results of exported functions.
        names = [name for name in exported(tree) if name in functions or name.isupper()]
        alone += [f"{module_of(path)}.{name}" for name in names if files_with()[name] < 2]
    assert alone == []


def test_every_name_that_another_module_imports_is_exported() -> None:
    modules = {module_of(path): ast.parse(path.read_text("utf-8")) for path in sources(*PRODUCTION)}
    hidden = []
    for name, tree in modules.items():
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.ImportFrom)
                and node.module in modules
                and (known := exported(modules[node.module]))
            ):
                found = (alias.name for alias in node.names if f"{node.module}.{alias.name}" not in modules)
                hidden += [f"{name} imports {node.module}.{each}" for each in found if each not in known]
    assert hidden == []
