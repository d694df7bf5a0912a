"""`import peraxis` has every verb under one name, imports it on first use, and has types and readable reprs."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

import peraxis
import peraxis_format as pxd
from peraxis_tools.compress import CompressOptions
from peraxis_tools.compress.options import AXES, EMBEDDINGS, FITS, RECIPES
from tests.bare import run_bare
from tests.factories import random_storage, sign_module, write_delta

ROOT = Path(__file__).parents[1]


def test_importing_the_package_imports_nothing_of_ours_and_no_library() -> None:
    heavy = ("peraxis_", "numpy", "torch", "rich")
    code = f"import sys, peraxis; print([name for name in sys.modules if name.startswith({heavy!r})])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"


def test_every_name_is_there_and_what_a_type_checker_sees() -> None:
    tree = ast.parse((ROOT / "peraxis" / "__init__.py").read_text("utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    declared = {alias.asname or alias.name: node.module for node in block.body for alias in node.names}
    assert set(declared) == set(peraxis.__all__) == set(peraxis._HOMES)
    assert dir(peraxis) == sorted(peraxis.__all__)
    for name, module in peraxis._HOMES.items():
        assert declared[name] == module
        assert getattr(peraxis, name) is getattr(sys.modules[module], name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = peraxis.nothing


def test_the_light_names_need_numpy_alone() -> None:
    light = "open inspect verify apply diff merge merge_parts split publish compress update log PxdError ToolError"
    done = run_bare(code=f"import peraxis\nfor name in {light!r}.split():\n    getattr(peraxis, name)")
    assert done.returncode == 0, done.stderr


def test_the_loader_without_torch_says_what_to_install() -> None:
    done = run_bare(code="import peraxis\nperaxis.VariantSwitch")
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].endswith("pip install 'peraxis[torch]'")


def test_every_public_parameter_has_a_type_and_none_is_hidden_in_keywords() -> None:
    for name in peraxis.__all__:
        value = getattr(peraxis, name)
        if not inspect.isfunction(value):
            continue
        signature = inspect.signature(value)
        assert signature.return_annotation is not inspect.Signature.empty, name
        for parameter in signature.parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty, (name, parameter)
            # Both pass unknown options to transformers.
            if name not in ("load", "load_model"):
                assert parameter.kind is not inspect.Parameter.VAR_KEYWORD, (name, parameter)
        assert value.__doc__, name


def test_compress_takes_each_option_by_its_name() -> None:
    parameters = inspect.signature(peraxis.compress).parameters
    assert {field.name for field in fields(CompressOptions)} | {"recipe"} <= set(parameters)
    from peraxis_tools.compress import api

    for alias, values in (
        (api.Fit, FITS),
        (api.AxisChoice, AXES),
        (api.Embeddings, EMBEDDINGS),
        (api.Recipe, tuple(RECIPES)),
    ):
        assert alias.__args__ == tuple(values)


def test_compress_refuses_options_given_twice(tmp_path: Path) -> None:
    with pytest.raises(peraxis.ToolError, match="pass a CompressOptions or masks by name"):
        peraxis.compress("base", "tuned", tmp_path / "d.pxd", masks=2, options=CompressOptions())


def test_an_open_file_says_what_it_holds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = write_delta(tmp_path / "delta.pxd", [sign_module(rng, "a.weight", random_storage(rng, (16, 24)))])
    with peraxis.open(path) as delta:
        shown = repr(delta)
        for part in (str(path), "'tuned' on 'base'", "1 module,", f"{delta.size} bytes", delta.content_id[:19]):
            assert part in shown
    assert repr(delta).endswith("closed>")


def test_a_switch_and_a_served_model_say_what_they_hold(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    base = random_storage(rng, (16, 24))
    model = torch.nn.Sequential(torch.nn.Linear(24, 16, bias=False, dtype=torch.bfloat16))
    with torch.no_grad():
        model[0].weight.copy_(torch.from_numpy(base).view(torch.bfloat16))
    path = write_delta(tmp_path / "delta.pxd", [sign_module(rng, "0.weight", base)])
    with pxd.open(path) as file:
        stored = sum(end - begin for begin, end in map(file.span, file))
    with peraxis.VariantSwitch(model) as switch:
        assert "now the base" in repr(switch)
        assert "variants: none" in repr(switch)
        variant = switch.add("legal", path)
        assert f"'legal': pinned, {stored} bytes stored" in repr(variant)
        switch.use("legal")
        assert "now 'legal'" in repr(switch)
        assert f"'legal' (pinned, {stored} bytes)" in repr(switch)
        switch.use(None)
    with peraxis.serve(model, {"legal": path}) as served:
        assert repr(served) == f"<Served: 'legal', {stored:,} bytes>"
    assert "closed" in repr(served)
