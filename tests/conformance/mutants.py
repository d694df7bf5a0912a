"""Run the kit on mutants of two loaders: each comparison, bound, constant and connective is changed, one at a time.

The kit should fail each mutant. Mutants that pass the quick cases also run on the cases of the limits of SPEC 9.

    python -m tests.conformance.mutants                    the small Python reader, in this process
    python -m tests.conformance.mutants --loader c         the loader in C; needs a compiler and about half an hour
    python -m tests.conformance.mutants --every 10         every tenth mutant
    python -m tests.conformance.mutants --only updates.py  mutants whose name matches a regular expression

The cases that failed earlier mutants run first, which ends most mutants at once. The command prints the mutants that
no case fails. The status is 1 if there are any except those that change no verdict (EQUIVALENT, each with its reason).
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import importlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from peraxis_conformance import Adapter, Case, Corpus, laid_out, run_cases
from peraxis_conformance.process import Reply
from peraxis_conformance.run import Caps

from tests.conformance.helpers import KIT, SLOW

__all__ = ["Mutant", "c_mutants", "main", "python_mutants"]

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
    "adapter",
)
MUTATED = ("strict", "container", "manifest", "updates", "rules", "reader", "arithmetic", "adapter")
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
C_TOKEN = re.compile(r"<=|>=|==|!=|&&|\|\||(?<![-<>])[<>](?![<>=])|(?<![\w.])(?:0x[0-9A-Fa-f]+|\d+)(?![\w.])")
C_SWAPS = {"<=": "<", ">=": ">", "==": "!=", "!=": "==", "&&": "||", "||": "&&", "<": "<=", ">": ">="}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One mutant. name: file, line and change. source: the whole mutated file."""

    name: str
    file: str
    source: str


# Changes that change no verdict: a part of the name -> the reason.
EQUIVALENT: dict[str, str] = {
    "codes = ('E202',) * 4": "which code of the right phase is said",
    "codes[": "which code of the right phase is said",
    "'E112' if": "which code of the right phase is said",
    "len(digits) <= 17": "longer numbers are beyond the range anyway",
    "deep = 0": "no file that the schema takes nests deeper than 5",
    "need(deep <= 8": "no file that the schema takes nests deeper than 5",
    "byte != 34": "a quotation mark is no bracket either",
    "total < 2 ** 53": "offsets end at 2^53 - 1, so that such a tensor does not fit them",
    "data[1:2] in": "another kind of file, of the same phase",
    "data[:8].strip": "another kind of file, of the same phase",
    "data[8:9]": "which code of the right phase is said",
    "value.update({key: []": "a mistake alone leaves keys out",
    "return {'name': module.get('name')": "what is left out is not asked for again",
    "31 -> 30 in return [raw[i:i + 32]": "digests are whole, so that their number is the same",
    "value % 2 ** 64": "a mistake alone calls it",
    "getattr(self, 'repeated'": "a mistake alone asks for it",
    "byte in b'[{'": "no file that the schema takes nests deeper than 5",
    "if about.st_size >= 2 ** 53": "what is as large has been refused",
    "53 -> 52 in need(about.st_size": "no file of so many bytes is at hand",
    "4096 -> 4095 in need(len(data)": "a header is not shorter than 4096, which its length says a step later",
    "LtE -> Lt in need(4088": "2^26 is no length of whole pages, and 4088 is that of most files",
    "4088 -> 4087": "no other length is one of whole pages",
    "need(8 + length <= len(self.file)": "the canonical header is compared with what there is, in the same phase",
    "need(span[0] >= 0": "tensors begin where others end, which a step of the same phase asks",
    "or '0' * 64": "of whatever length, no digest is equal to it",
    "size = self.width // 8": "32 // 7 is 4, and 16 // 7 is 2",
    "range(4, 4 + 2 * listed, 2)": "ends at the same number",
    "classes: list[list[int]]": "the last one stays empty",
    "len(data) > 0)": "an empty block holds no unary number, which is said in the same phase",
    "exponents = [(word & (1 << self.width - 1) - 1)": "the bits below the exponent are shifted away",
    "-(z + 1) // 2 if z & 1": "z is odd there, and the division rounds down",
    "in data, at = (self.bytes_of": "the first part begins at 0",
    "('', len(data), 0)": "where the end of the tensor ends is not asked",
    "magnitude = bits & 32767": "infinity is an even pattern",
    "32768 -> 32767 in need(bits": "0x7FFF is no number, which is told first",
    "in MAXIMUM": "a mistake alone saturates",
    "(value, '<f'))[0]": "there is one number",
    "in top = 1 << 8 * size - 1": "a mistake alone asks for the magnitude",
    "not math.isnan(value) and (not math.isinf": "a mistake alone is made of such numbers",
    "'scalar': 0}": "there is one scale",
    '".full", 0': "the suffix has no number",
    "b->high > i ? bit": "the bits below are those of no field that could be taken",
    "8 -> 7 in u64 size = BITS": "16 / 7 is 2, and 32 / 7 is 4",
    "< -> <= in block b = {": "both are one where a whole block is left",
    "4 -> 3 in bool raw": "three bytes hold no counts, which the block says itself",
    "in need(c->scale[s].p[i] < 0x7C": "which code of the right phase is said",
    "4 -> 5 in u32 said": "a fifth byte does not fit",
    "< -> <= in classes[i]": "15 is the last class either way",
    "1 -> 0 in classes[i]": "15 is the last class either way",
    "15 -> 16 in classes[i]": "15 is the last class either way",
    "16 -> 17 in EACH(c, 16)": "no weight is of class 16",
    "< -> <= in int64_t z": "both branches are one where k is the most",
    "1 -> 2 in step(b, place, z & 1": "z is odd there, and the division rounds",
    "need(rest + wide < b->length": "gaps that end behind the block end elsewhere than it, a line below",
    "need(b->low < b->high": "no bits are left then, which the next check finds",
    "in made, end = ([], 0)": "-1 is brought to 0 as well",
    "wanted += [(f'__asset__": "what is not of one dimension is equal to none",
    "self.bytes_of(tensor[0][0])": "there is one tensor",
    "back = decoded(": "a mistake alone asks for it",
    "if switch == ": "a mistake alone",
    "return (0, caps(switch))": "the runner is told of it otherwise here",
    "return {'protocol': 1": "the runner is told of it otherwise here",
    "in return (0, {'ok': True})": "there are two results, and the last one is it",
    "rows = (said['shape'] or [1])": "a mistake alone asks for it",
    "size = len(held[2]) * 8": "a mistake alone asks for it",
    "sys.path.insert(0": "the modules are found either way",
    "in made[": "a mistake alone keeps NaN",
    "in return (1, {'ok': False, 'phase'": "a mistake alone",
    "return (77, {": "every operation is known",
    "in a, b = (BITS": "a mistake alone keeps NaN",
    "manifest = json.loads(json.loads(data[8": "a mistake alone asks for it",
    "raw.ljust(count": "a mistake alone reinterprets",
    "8 -> 7 in start = 8 + int": "no header has 2^56 bytes",
    "if value != value": "a mistake alone keeps NaN",
    "(total or 0) < 2": "nothing is refused before",
    "exit(2)": "what is no checkpoint has no status of the protocol",
}


# --- the small reader in Python ------------------------------------------------------------------------


class _Counter(ast.NodeTransformer):
    """Changes the place with number `target` and records the change. With None it only counts the places."""

    def __init__(self, target: int | None) -> None:
        self.target, self.count, self.said = target, 0, ""

    def _here(self, node: ast.AST, what: str) -> bool:
        self.count += 1
        if self.count - 1 != self.target:
            return False
        self.said = f"{getattr(node, 'lineno', 0)}: {what}"
        return True

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
    """Removes the mistakes of the reader: each `wrong("...")` becomes False, and expressions with it are folded."""

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
    """Yield every mutant of the small reader."""
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
    """Return the adapter of the small reader with one module replaced."""
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


class InProcess(Adapter):
    """The small reader without a process."""

    def __init__(self, module: Any) -> None:
        self.module = module
        said = module.caps("")
        operations = frozenset(said["operations"])
        self.caps = Caps(
            implementation="mutant",
            version="1",
            spec=("1.0",),
            features=frozenset(said["features"]),
            operations=operations,
        )

    def ask(self, case: Case, arguments: Sequence[str]) -> Reply:
        try:
            status, result = self.module.answer("", list(arguments))
        except Exception as error:
            return Reply(problem=f"crashed: {error!r}")
        return Reply(exit=status, result=result)

    def close(self) -> None:
        """Do nothing, because there is no process."""


class Late(BaseException):
    """A mutant does not end."""


class Teeth:
    """The cases in the order in which they run. A case that failed a mutant moves to the front.

    seconds: time limit of all cases. level: optimisation level of compiled loaders.
    """

    def __init__(self, cases: Sequence[Case], seconds: int, level: str) -> None:
        self.cases, self.seconds, self.level = list(cases), seconds, level

    def passed(self, adapter: Adapter, corpus: Corpus) -> bool:
        """Whether every case passes."""
        summary = run_cases(adapter, corpus, self.cases, jobs=1, stop_at_first=True)
        for outcome in summary.outcomes:
            if outcome.status == "failed":
                self.cases.remove(outcome.case)
                self.cases.insert(0, outcome.case)
        return summary.passed


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


# --- the loader in C -----------------------------------------------------------------------------------


def c_mutants() -> Iterator[Mutant]:
    """Yield every mutant of the loader in C, outside of comments, texts, tables of SHA-256 and directives."""
    lines = (KIT / "loaders" / "c" / "pxd.c").read_text().splitlines(keepends=True)
    table = False
    for number, line in enumerate(lines):
        table = (table or "SHA_K[]" in line) and "};" not in lines[number - 1]
        if table or line.startswith(("#", " *", "/*", "_Static")):
            continue
        code = re.sub(r'"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\'|/\*.*', lambda m: " " * len(m[0]), line)
        for token in C_TOKEN.finditer(code):
            old = token[0]
            news = (C_SWAPS[old],) if old in C_SWAPS else tuple(str(int(old, 0) + step) for step in (1, -1))
            for new in news:
                changed = line[: token.start()] + new + line[token.end() :]
                source = "".join([*lines[:number], changed, *lines[number + 1 :]])
                yield Mutant(name=f"pxd.c:{number + 1}: {old} -> {new} in {line.strip()[:70]}", file="c", source=source)


def survives_c(mutant: Mutant, corpus: Corpus, teeth: Teeth, folder: Path) -> bool:
    """Whether it compiles and every case passes."""
    source, built = folder / "pxd.c", folder / "pxd"
    source.write_text(mutant.source)
    command = [shutil.which("cc") or "cc", "-std=c11", teeth.level, "-w", "-o", str(built), str(source)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        return False
    try:
        return teeth.passed(Adapter([str(built)]), corpus)
    except Exception:
        return False


# --- both ----------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loader", choices=("python", "c"), default="python")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth mutant")
    parser.add_argument("--only", default="", metavar="REGEX", help="only mutants whose name matches")
    parser.add_argument("--from", type=int, default=0, dest="first", metavar="N", help="the first of them")
    given = parser.parse_args(arguments)
    started, alive = time.monotonic(), []
    sys.path.insert(0, str(SMALL))
    with laid_out() as corpus, tempfile.TemporaryDirectory() as scratch:
        operations = ("decode", "apply")
        cases = [
            dataclasses.replace(case, seconds=3, mib=512)
            for case in corpus.select(skip=SLOW)
            if case.operation in operations and not case.id.startswith("hostile/limit")
        ]
        cases.sort(key=lambda case: (not case.id.startswith("valid/"), case.id.startswith("cut/")))
        made = python_mutants() if given.loader == "python" else c_mutants()
        mutants = [mutant for mutant in made if re.search(given.only, mutant.name)][given.first :: given.every]
        quick = Teeth(cases, 40, "-O0")
        large = [dataclasses.replace(case, mib=8192) for case in corpus.select(["hostile/limit-*"])]
        limits = Teeth(large, 600, "-O1")

        def lives_through(mutant: Mutant, teeth: Teeth) -> bool:
            if given.loader == "python":
                return survives_python(mutant, corpus, teeth)
            return survives_c(mutant, corpus, teeth, Path(scratch))

        known, quickly = [], []
        for number, mutant in enumerate(mutants, 1):
            if number % 50 == 0:
                sys.stderr.write(f"{number} of {len(mutants)}\n")
            if not lives_through(mutant, quick):
                continue
            if any(part in mutant.name for part in EQUIVALENT):
                known.append(mutant)
            else:
                quickly.append(mutant)
                sys.stderr.write(f"the limits are left for: {mutant.name}\n")
        # Files of up to 64 MiB, a minute each: for those that nothing else fails.
        for mutant in quickly:
            if lives_through(mutant, limits):
                alive.append(mutant.name)
                sys.stdout.write(f"survives: {mutant.name}\n")
                sys.stdout.flush()
    took = time.monotonic() - started
    sys.stdout.write(f"{len(mutants)} mutants, {len(known)} change nothing, {len(alive)} survive, in {took:.0f} s\n")
    return 1 if alive else 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
