"""The commands of docs/engines.md name options, routes and classes that exist."""

from __future__ import annotations

import ast
import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "engines.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def commands() -> list[list[str]]:
    """Return every shell command, with continued lines joined and without comments."""
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_every_json_argument_parses() -> None:
    found = [word for words in commands() for word in words if word.startswith("{")]
    assert len(found) == 9
    for word in found:
        assert isinstance(json.loads(word), dict)


def test_every_python_example_compiles() -> None:
    assert blocks("python")
    for block in blocks("python"):
        ast.parse(block)


def test_the_routes_are_those_of_the_plug_in() -> None:
    source = (ROOT / "peraxis_format" / "engines" / "vllm" / "routes.py").read_text("utf-8")
    urls = {word.partition("/v1/peraxis")[2] for words in commands() for word in words if "/v1/peraxis" in word}
    assert urls == {"", "/variants", "/use", "/variants/legal", "/update", "/follow"}
    for suffix in ("/variants", "/variants/{{name}}", "/use", "/update", "/follow"):
        assert f'f"{{_PREFIX}}{suffix}"' in source


def test_the_worker_class_that_is_named_exists() -> None:
    (name,) = {words[words.index("--worker-cls") + 1] for words in commands() if "--worker-cls" in words}
    module, _, kind = name.rpartition(".")
    source = (ROOT / (module.replace(".", "/") + ".py")).read_text("utf-8")
    assert kind in {node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}


@pytest.mark.vllm
def test_vllm_takes_every_option_that_is_named() -> None:
    assert find_spec("vllm") is not None
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    served = [words[words.index("serve") + 1 :] for words in commands() if "serve" in words and "vllm" in words]
    assert len(served) >= 4
    for _, *options in served:
        parser.parse_args(["--model", "BASE", *options])
