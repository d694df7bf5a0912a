"""No file or function is too long, and the map of the README agrees with the tree."""

from __future__ import annotations

import ast
import re
import tomllib

from tests.test_architecture import ROOT, module_of, sources

LINES_OF_A_FILE, LINES_OF_A_FUNCTION = 350, 60


def test_no_file_and_no_function_is_too_long() -> None:
    wrong = []
    for path in sources("peraxis_format", "peraxis_tools", "peraxis"):
        text = path.read_text("utf-8")
        name = path.relative_to(ROOT)
        if (lines := len(text.splitlines())) > LINES_OF_A_FILE:
            wrong.append(f"{name}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            kernel = path.name == "triton.py"  # a kernel may be one long function, because Triton inlines calls anyway
            if isinstance(node, ast.FunctionDef) and node.end_lineno and not kernel:
                # Only the statements count, because a command has a line for each option and its help before them.
                first = node.body[1] if len(node.body) > 1 and ast.get_docstring(node) else node.body[0]
                length = node.end_lineno - first.lineno + 1
                if length > LINES_OF_A_FUNCTION:
                    wrong.append(f"{name}:{node.lineno}: {node.name} has {length} lines")
    assert wrong == []


def test_files_of_the_kit_and_of_the_tests_are_not_too_long() -> None:
    for path in sources("conformance", "tests"):
        assert len(path.read_text("utf-8").splitlines()) <= LINES_OF_A_FILE, path


def map_of_the_code() -> str:
    """Return the first code block under this heading of the README."""
    _, _, rest = (ROOT / "README.md").read_text("utf-8").partition("## The map of the code")
    assert rest, "README.md has no section 'The map of the code'"
    return rest.split("```")[1]


def test_every_file_on_the_map_exists() -> None:
    tracked = {str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if ".venv" not in path.parts}
    named = re.findall(r"[\w.*-]+(?:/[\w.*-]+)*/?", map_of_the_code())
    for name in named:
        if name.endswith("/") or re.search(r"\.(py|md|toml|cff|txt|c|js)$", name):
            pattern = re.compile(r"(^|.*/)" + re.escape(name.rstrip("/")).replace(r"\*", "[^/]*") + "$")
            assert any(pattern.match(path) for path in tracked), f"{name} is on the map and nowhere else"


def test_every_package_is_on_the_map() -> None:
    words = set(re.findall(r"[\w-]+", map_of_the_code()))
    with open(ROOT / "pyproject.toml", "rb") as file:
        packages = tomllib.load(file)["tool"]["setuptools"]["packages"]
    names = {name.split(".")[-1].replace("peraxis_conformance", "conformance") for name in packages}
    assert names <= words, f"not on the map: {sorted(names - words)}"


def test_every_package_folder_is_installed() -> None:
    with open(ROOT / "pyproject.toml", "rb") as file:
        packages = set(tomllib.load(file)["tool"]["setuptools"]["packages"])
    found = {module_of(path) for path in sources("peraxis_format", "peraxis_tools") if path.name == "__init__.py"}
    assert found == {name for name in packages if name.split(".")[0] in ("peraxis_format", "peraxis_tools")}
