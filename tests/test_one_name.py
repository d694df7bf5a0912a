"""A concept has one name, and a name one concept: parameters are options of the same name, classes share no name."""

from __future__ import annotations

import ast
import inspect
from collections import defaultdict
from collections.abc import Mapping
from typing import Final

import click
import pytest

import peraxis
from peraxis_tools.cli import VERBS, cli
from tests.test_architecture import module_of, sources

FUNCTIONS: Final = {verb: verb for verb in VERBS if verb in peraxis.__all__} | {"eval": "evaluate"}
# Parameters of any function that are no options of the verb, and why.
EVERYWHERE: Final[Mapping[str, str]] = {
    "progress": "the command shows its own bars; --quiet",
}
EXCEPTIONS: Final[Mapping[str, Mapping[str, str]]] = {
    "compress": {
        "options": "a mapping of the other parameters; --config FILE",
        "show_plan": "the command prints the plan",
    },
    "convert": {"layout": "--from, which is a keyword of Python"},
    "eval": {"candidates": "the command always measures the base and the merged model; --no-on-the-fly"},
    "merge": {"mixture": "an object with the fields method, density, normalize and seed"},
    "sign": {"password": "the environment variable PERAXIS_KEY_PASSWORD, because others see options"},
    "verify": {"keep_going": "the command always reports all files"},
}


def names_of(verb: str) -> set[str]:
    """The names of a verb's arguments and options, with underscores; a repeatable option may be a plural in Python."""
    command = cli.get_command(click.Context(cli), verb)
    assert command is not None
    found = set()
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            found.add(parameter.name or "")
        names = {name.lstrip("-").replace("-", "_") for name in parameter.opts if name.startswith("--")}
        found |= names | ({f"{name}s" for name in names} if parameter.multiple else set())
    return found


def parameters_of(verb: str) -> list[str]:
    return list(inspect.signature(getattr(peraxis, FUNCTIONS[verb])).parameters)


@pytest.mark.parametrize("verb", FUNCTIONS)
def test_every_parameter_is_an_option_of_the_same_name_or_has_a_reason(verb: str) -> None:
    allowed = names_of(verb) | set(EVERYWHERE) | set(EXCEPTIONS.get(verb, {}))
    assert [name for name in parameters_of(verb) if name not in allowed] == []


def test_every_exception_is_one() -> None:
    for verb, reasons in EXCEPTIONS.items():
        assert set(reasons) <= set(parameters_of(verb)), verb
        assert not set(reasons) & names_of(verb), verb


def test_every_verb_that_has_a_function_is_compared() -> None:
    assert set(VERBS) - set(FUNCTIONS) == {"demo", "completion", "help"}


@pytest.mark.parametrize("verb", VERBS)
def test_a_concept_has_the_same_name_in_all_verbs(verb: str) -> None:
    """The input is `delta` or `deltas`, the output `output`, in Python too."""
    for name in ("path", "paths", "folder", "file", "key"):
        if verb in FUNCTIONS:
            assert name not in parameters_of(verb)


def test_the_name_of_a_class_stands_for_one_class() -> None:
    found: dict[str, list[str]] = defaultdict(list)
    for path in sources("peraxis", "peraxis_format", "peraxis_tools"):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef):
                found[node.name].append(module_of(path))
    assert {name: places for name, places in found.items() if len(places) > 1} == {}


def test_in_the_loader_a_part_is_what_the_specification_calls_so() -> None:
    """A part of a module (SPEC 4.1) or of a delta (SPEC 14). What a model has of a tensor is a shard, and a piece."""
    found: set[str] = set()
    for path in sources("peraxis_format/torch"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Name):
                found.add(node.id)
            elif isinstance(node, ast.arg):
                found.add(node.arg)
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
    named = {name for name in found if {"part", "parts"} & set(name.lower().split("_"))}
    assert named == {"PART_KEY", "_refuse_part", "part_box", "_part_box"}
