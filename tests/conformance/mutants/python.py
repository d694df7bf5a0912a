"""Mutants of the small Python reader, run in this process."""

from __future__ import annotations

import ast
import importlib
import signal
import sys
import types
from collections.abc import Iterator
from typing import Any

from peraxis_conformance import Corpus

from tests.conformance.helpers import KIT
from tests.conformance.in_process import InProcess
from tests.conformance.mutants import Mutant, Teeth

__all__ = ["SMALL", "python_mutants", "survives_python"]

SMALL = KIT / "loaders" / "wrong"
MODULES = (
    "common",
    "switches",
    "strict",
    "container",
    "manifest",
    "updates",
    "rules",
    "reader",
    "arithmetic",
    "base",
    "adapter",
)
MUTATED = ("strict", "container", "manifest", "updates", "rules", "reader", "arithmetic", "base", "adapter")
COMPARED: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE,),
    ast.LtE: (ast.Lt,),
    ast.Gt: (ast.GtE,),
    ast.GtE: (ast.Gt,),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}


class _Counter(ast.NodeTransformer):
    """Changes the place with the number `target` and describes the change; None only counts the places."""

    def __init__(self, target: int | None) -> None:
        self.target, self.count, self.said = target, 0, ""

    def _here(self, node: ast.AST, what: str) -> bool:
        self.count += 1
        if self.count - 1 != self.target:
            return False
        self.said = f"{getattr(node, 'lineno', 0)}: {what}"
        return True

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        # These read arguments and messages of the process. `make conformance` runs them; this runner calls `answer`.
        return node if node.name in ("main", "serve") else self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST:
        return node if "__name__" in ast.unparse(node.test) else self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        for i, operator in enumerate(node.ops):
            for other in COMPARED.get(type(operator), ()):
                if self._here(node, f"{type(operator).__name__} -> {other.__name__}"):
                    node.ops[i] = other()
        return self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        if self._here(node, "and <-> or"):
            node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        return self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if type(node.value) is int:
            for step in (1, -1):
                if self._here(node, f"{node.value} -> {node.value + step}"):
                    return ast.copy_location(ast.Constant(node.value + step), node)
        return node


class _Right(ast.NodeTransformer):
    """The reader without its mistakes: each `wrong("...")` becomes False, and conditions on it are folded."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return ast.copy_location(ast.Constant(False), node) if name == "wrong" else node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)
        false = [value for value in node.values if _is_false(value)]
        rest = [value for value in node.values if not _is_false(value)]
        if isinstance(node.op, ast.And) and false:
            return ast.copy_location(ast.Constant(False), node)
        node.values = rest or false[:1]
        return node.values[0] if len(node.values) == 1 else node

    def visit_If(self, node: ast.If) -> Any:
        self.generic_visit(node)
        return (node.orelse or ast.copy_location(ast.Pass(), node)) if _is_false(node.test) else node

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        self.generic_visit(node)
        return node.orelse if _is_false(node.test) else node


def _is_false(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def python_mutants() -> Iterator[Mutant]:
    """Every mutant of the small reader."""
    for module in MUTATED:
        tree = _Right().visit(ast.parse((SMALL / f"{module}.py").read_text()))
        source = ast.unparse(ast.fix_missing_locations(tree))
        lines = source.splitlines()
        counter = _Counter(None)
        counter.visit(ast.parse(source))
        for place in range(counter.count):
            changer = _Counter(place)
            changed = ast.unparse(ast.fix_missing_locations(changer.visit(ast.parse(source))))
            number, _, what = changer.said.partition(": ")
            line = lines[int(number) - 1].strip()[:90]
            yield Mutant(name=f"{module}.py: {what} in {line}", file=module, source=changed)


def loaded(mutant: Mutant) -> types.ModuleType:
    """The adapter of the small reader with one module replaced."""
    for name in MODULES:
        sys.modules.pop(name, None)
    for name in MODULES:
        if name == mutant.file:
            module = types.ModuleType(name)
            module.__file__ = str(SMALL / f"{name}.py")
            sys.modules[name] = module
            exec(compile(mutant.source, module.__file__, "exec"), module.__dict__)
        else:
            importlib.import_module(name)
    return sys.modules["adapter"]


class Late(BaseException):
    """A mutant does not end."""


def survives_python(mutant: Mutant, corpus: Corpus, teeth: Teeth) -> bool:
    """Whether every case passes."""

    def late(*_: object) -> None:
        raise Late

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(teeth.seconds)
    try:
        return teeth.passed(InProcess(loaded(mutant)), corpus)
    except (Late, Exception):
        return False
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
