"""The layout is the one that the README draws: imports point one way, and light verbs stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import peraxis_format

ROOT = Path(__file__).parents[1]
# Within the format library each module imports only what stands before it.
ORDER = [
    *(
        "version",
        "threads",
        "errors",
        "dtypes",
        "bits",
        "strict_json",
        "canonical",
        "files",
        "delta",
        "manifest",
        "schema",
        "profile",
        "container",
        "header",
        "payload",
    ),
    *("checkpoint_files", "checkpoint", "binding", "lanes", "pairs", "fast", "reconstruct", "reader", "writer"),
]


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, at any depth, type checking aside."""
    tree = ast.parse(path.read_text("utf-8"))
    skipped = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "peraxis_format":
            yield from (f"peraxis_format.{alias.name}" if alias.name.islower() else node.module for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def test_the_format_library_imports_neither_torch_nor_the_tools() -> None:
    for path in sources("peraxis_format"):
        names = {name.split(".")[0] for name in imported(path)}
        assert "peraxis_tools" not in names, path
        if not {"torch", "engines"} & set(path.relative_to(ROOT / "peraxis_format").parts):
            allowed = {"numpy", "numba", "peraxis_format", *sys.stdlib_module_names}
            if path.name == "testing.py":
                allowed |= {"hypothesis"}
            if path.name == "hub.py":
                allowed |= {"huggingface_hub"}  # imported when a name has to be looked up
            assert names <= allowed, path


def test_one_file_of_the_vllm_plug_in_knows_the_names_of_vllm() -> None:
    for path in sources("peraxis_format/engines/vllm"):
        names = {name.split(".")[0] for name in imported(path)}
        assert "vllm" not in names, path  # layout.py looks them up by name, and says which one is missing
        if path.name not in ("layout.py", "__init__.py", "worker.py"):
            assert "import_module" not in path.read_text("utf-8"), path


def test_one_file_of_the_vllm_plug_in_reaches_into_the_loader() -> None:
    public = {"peraxis_format.torch"} | {f"peraxis_format.{name}" for name in ("hub", "errors", "reader", "manifest")}
    public |= {f"peraxis_format.{name}" for name in ("delta", "bits")}
    for path in sources("peraxis_format/engines/vllm"):
        if path.name == "bridge.py":
            continue
        inner = {name for name in imported(path) if name.startswith("peraxis_format.")}
        assert {name for name in inner if not name.startswith("peraxis_format.engines")} <= public, path


def test_imports_within_the_format_library_point_one_way() -> None:
    for path in (ROOT / "peraxis_format").glob("*.py"):
        if path.stem in ORDER:
            before = {f"peraxis_format.{name}" for name in ORDER[: ORDER.index(path.stem)]}
            inner = {name for name in imported(path) if name.startswith("peraxis_format")}
            assert inner <= before, (path.name, inner - before)


def test_the_tools_import_public_names_of_the_format_alone() -> None:
    for path in sources("peraxis_tools"):
        deep = {name for name in imported(path) if name.startswith("peraxis_format.")}
        public = {f"peraxis_format.{name}" for name in peraxis_format.__all__}
        modules = {name for name in deep - public if (ROOT / (name.replace(".", "/") + ".py")).exists()}
        allowed = {"peraxis_format.hub", "peraxis_format.ops.rebuild.numba", "peraxis_format.torch"}
        assert modules <= allowed, (path, modules)


def test_the_conformance_kit_stands_on_the_standard_library() -> None:
    for path in (ROOT / "conformance").glob("*.py"):
        names = {name.split(".")[0] for name in imported(path)}
        assert names <= {"peraxis_conformance", "pytest", *sys.stdlib_module_names}, path


def test_only_the_report_layer_prints() -> None:
    for path in sources("peraxis_format", "peraxis_tools"):
        if "report" in path.relative_to(ROOT).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            assert not called, f"{path}:{getattr(node, 'lineno', 0)}"


@pytest.mark.parametrize("verb", ["inspect", "verify", "apply"])
def test_light_verbs_import_neither_torch_nor_transformers(verb: str) -> None:
    code = (
        f"import sys, peraxis_tools.cli, peraxis_tools.commands.{verb}; "
        "print([m for m in ('torch', 'transformers', 'datasets', 'numba') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_verb_is_its_function_whatever_was_imported_before() -> None:
    code = (
        "import peraxis_tools, peraxis_tools.inspect, peraxis_tools.apply, peraxis_tools.compress.run.run; "
        "print(all(callable(getattr(peraxis_tools, name)) for name in peraxis_tools.__all__ if name[0] != '_'))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "True"
