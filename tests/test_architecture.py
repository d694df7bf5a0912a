"""The layout agrees with the README: imports point one way, and light verbs import little."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest

import peraxis_format

ROOT = Path(__file__).parents[1]
# Within each package a module imports only earlier entries (or modules of its own entry). A folder stands for
# all its modules except those that have their own entry.
FORMAT = (
    *(
        "version",
        "errors",
        "arguments",
        "thread_pool",
        "dtypes",
        "sizes",
        "digest_table",
        "ops.exact.kinds",
        "ops.compiling",
        "ops.backend",
        "ops.simd",
        "ops.exact",
        "bits",
        "strict_json",
        "canonical",
        "chain_names",
    ),
    *("interrupts", "files", "opening", "delta", "exact", "manifest", "schema_types"),
    *(
        "schema",
        "profile",
        "container",
        "header",
        "payload",
        "checkpoint_files",
        "checkpoint",
        "binding",
    ),
    *("ops.tensors", "ops.rebuild", "ops.exact.triton", "ops.exact.torch", "reader", "writer", "testing", "ops"),
    *(
        "torch.modes",
        "torch.place.remedies",
        "torch.place.renamed",
        "torch.place.shards",
        "torch.place.wrappers",
        "torch.place.finder",
        "torch.place.widened",
        "torch.place.placement",
        "torch.device",
    ),
    *(
        "urls",
        "hub",
        "create_remote",
        "torch.swap.transfer_plan",
        "torch.ring",
        "torch.swap.lock",
        "torch.swap.guard",
        "torch.place",
    ),
    *(
        "torch.serve.rows",
        "torch.serve.lookup",
        "torch.serve.modules",
        "torch.serve.linear",
        "torch.serve.launch",
        "torch.swap.payload",
    ),
    *(
        "torch.serve",
        "torch.swap.exact",
        "torch.swap.engine",
        "torch.swap.stream",
        "torch.swap.apply",
        "torch.swap.reports",
    ),
    *("torch.swap.undo", "torch.swap.registry", "torch.swap", "torch"),
)
COMPRESS = (
    *(
        "shared_sizes",
        "recipes",
        "option_values",
        "options",
        "options_file",
        "fit.encode",
        "fit.directions",
        "fit.mean",
        "plan.plan",
        "plan.unchanged",
        "plan.casts",
        "plan.quantised",
        "plan.renaming",
        "plan.finite",
        "plan.record",
        "plan.size",
        "plan.price",
        "plan.budget",
        "plan.pairing",
        "run.types",
        "run.work_folder",
        "run.module_delta",
    ),
    *("run.distributed", "fit.moments.recorder", "fit.gram", "fit.signs", "fit.scales", "model"),
    *("calibration.partition", "plan", "calibration"),
    *(
        "fit.moments",
        "fit.adamw",
        "fit.fit",
        "fit.table",
        "model.orientation",
        "fit",
        "distill",
        "run.inputs",
        "run.continuing",
        "run.memory",
        "run.streamed",
    ),
    *("run.calibrated", "run"),
)
VERBS = "inspect verify apply diff merge split convert evaluate publish compress".split()
# Modules of a verb in addition to the module or folder of its name.
VERB_FILES = {"verify_files": "verify", "inspect_details": "inspect"}
# These modules run verbs but are not verbs: the demo, chains of updates, the bounds of `verify`, and the shell.
COMPOSED = {"demo", "chain", "bounds", "commands", "report", "cli", "entry", "__main__", "reference", "process"}


def module_of(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


@cache
def imported(path: Path) -> frozenset[str]:
    """Return every module that a file imports, at any depth and by any means, except for type checking."""
    tree = ast.parse(path.read_text("utf-8"))
    skipped = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    return frozenset(name for node in ast.walk(tree) if id(node) not in skipped for name in names_of(node))


def names_of(node: ast.AST) -> Iterator[str]:
    """Yield the modules that one statement or one call of import_module imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        inner = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name if is_module(name) else node.module for name in inner)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
        function = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
        if function in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
            yield str(node.args[0].value)


def is_module(name: str) -> bool:
    place = ROOT / name.replace(".", "/")
    return place.with_suffix(".py").exists() or (place / "__init__.py").exists()


def place_in(order: Sequence[str], name: str) -> int:
    """Return the index of the longest entry that contains the name. The package itself comes last."""
    fitting = [entry for entry in order if name == entry or name.startswith(entry + ".")]
    return order.index(max(fitting, key=len)) if fitting else len(order)


def out_of_order(package: str, order: Sequence[str]) -> list[str]:
    wrong = []
    for path in sources(package.replace(".", "/")):
        name = module_of(path).removeprefix(package).removeprefix(".")
        for other in imported(path):
            inner = other.removeprefix(package + ".")
            if inner != other and place_in(order, inner) > place_in(order, name):
                wrong.append(f"{name} imports {inner}, which comes after it")
    return wrong


# --- direction of imports ------------------------------------------------------------------------------------


def test_the_format_library_imports_neither_torch_nor_the_tools() -> None:
    for path in sources("peraxis_format"):
        names = {name.split(".")[0] for name in imported(path)}
        assert "peraxis_tools" not in names, path
        inside = path.relative_to(ROOT / "peraxis_format")
        if not {"torch", "engines"} & set(inside.parts) and inside.stem not in ("torch", "triton", "tensors", "launch"):
            allowed = {"numpy", "numba", "llvmlite", "peraxis_format", *sys.stdlib_module_names}
            if path.name == "testing.py":
                allowed |= {"hypothesis"}
            if path.name == "hub.py":
                allowed |= {"huggingface_hub"}  # imported when a name is looked up
            if path.name == "urls.py":
                allowed |= {"aiohttp"}  # imported when a URL of HTTP is read
            assert names <= allowed, (path, names - allowed)


def test_no_import_is_hidden_in_a_string_that_is_put_together() -> None:
    for path in sources("peraxis_format", "peraxis_tools"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__"))):
                continue
            # Only the tables of lazy names in a package, the list of commands and the names of vLLM are imported by a
            # computed name.
            allowed = path.name in ("__init__.py", "cli.py", "names.py")
            assert isinstance(node.args[0], ast.Constant) or allowed, f"{path}:{node.lineno}"


def test_one_file_of_the_vllm_plug_in_knows_the_names_of_vllm() -> None:
    for path in sources("peraxis_format/engines/vllm"):
        names = {name.split(".")[0] for name in imported(path)}
        # names.py looks names up when it needs them, and names a missing one.
        assert "vllm" not in names or path.name == "names.py", path
        if path.name not in ("names.py", "__init__.py", "worker.py"):
            assert "import_module" not in path.read_text("utf-8"), path


def test_one_file_of_the_vllm_plug_in_reaches_into_the_loader() -> None:
    modules = ("torch", "torch.updates", "hub", "urls", "errors", "reader", "manifest", "delta", "bits")
    public = {f"peraxis_format.{name}" for name in modules}
    for path in sources("peraxis_format/engines/vllm"):
        if path.name == "bridge.py":
            continue
        inner = {name for name in imported(path) if name.startswith("peraxis_format.")}
        assert {name for name in inner if not name.startswith("peraxis_format.engines")} <= public, path


def test_imports_within_the_format_library_point_one_way() -> None:
    assert out_of_order("peraxis_format", FORMAT) == []


def test_imports_within_compress_point_one_way() -> None:
    assert out_of_order("peraxis_tools.compress", COMPRESS) == []


def test_no_imports_go_in_a_circle() -> None:
    graph = {
        module_of(path): {name for name in imported(path) if name != module_of(path)}
        for path in sources("peraxis_format", "peraxis_tools")
    }
    assert circle_in(graph) == []


def circle_in(graph: Mapping[str, set[str]]) -> list[str]:
    """Return the modules that remain after repeatedly removing those that import none of the others."""
    left = {name: others & graph.keys() for name, others in graph.items()}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


def test_no_verb_imports_a_verb() -> None:
    def verb_of(name: str) -> str | None:
        room = name.split(".")[1] if name.startswith("peraxis_tools.") else ""
        room = VERB_FILES.get(room, room)
        return room if room in VERBS else None

    wrong = []
    for path in sources("peraxis_tools"):
        mine = module_of(path)
        room = mine.split(".")[1] if "." in mine else "cli"
        if room in COMPOSED:
            continue
        wrong += [f"{mine} imports {name}" for name in imported(path) if verb_of(name) not in (None, verb_of(mine))]
    assert wrong == []


def test_neither_verbs_nor_what_they_share_know_the_command_line() -> None:
    shells = {"commands", "report", "cli"}
    for path in sources("peraxis_tools"):
        mine = module_of(path)
        if "." in mine and mine.split(".")[1] not in COMPOSED:
            found = {name for name in imported(path) if name.split(".")[1:2] and name.split(".")[1] in shells}
            assert not {name for name in found if name.startswith("peraxis_tools.")}, (path, found)


def test_the_tools_import_public_names_of_the_format_alone() -> None:
    for path in sources("peraxis_tools"):
        deep = {name for name in imported(path) if name.startswith("peraxis_format.")}
        public = {f"peraxis_format.{name}" for name in peraxis_format.__all__}
        modules = {name for name in deep - public if is_module(name)}
        modules = {name for name in modules if not name.startswith("peraxis_format.ops")}
        # The operations of the tools are built like those of the format, from the same parts.
        inner = {"peraxis_format.dtypes", "peraxis_format.thread_pool"} if "ops" in path.parts else set()
        public = ("arguments", "create_remote", "errors", "hub", "torch", "urls")
        assert modules <= {*(f"peraxis_format.{name}" for name in public), *inner}, (
            path,
            modules,
        )


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


# --- cost of imports -----------------------------------------------------------------------------------------


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
