"""Mutants of the loader in C; each is compiled."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from peraxis_conformance import Adapter, Corpus

from tests.conformance.helpers import KIT
from tests.conformance.mutants import Mutant, Teeth

__all__ = ["c_mutants", "survives_c", "unchanged_c"]

C_TOKEN = re.compile(r"<=|>=|==|!=|&&|\|\||(?<![-<>])[<>](?![<>=])|(?<![\w.])(?:0x[0-9A-Fa-f]+|\d+)(?![\w.])")
C_SWAPS = {"<=": "<", ">=": ">", "==": "!=", "!=": "==", "&&": "||", "||": "&&", "<": "<=", ">": ">="}


def unchanged_c() -> Mutant:
    """The loader as it is."""
    return Mutant(name="pxd.c, unchanged", file="c", source=(KIT / "loaders" / "c" / "pxd.c").read_text())


def c_mutants() -> Iterator[Mutant]:
    """Every mutant of the loader in C. Comments, strings, directives and the table of SHA-256 stay."""
    lines = unchanged_c().source.splitlines(keepends=True)
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
                near = changed[max(token.start() - 24, 0) : token.start() + len(new) + 24].strip()
                name = f"pxd.c:{number + 1}: {old} -> {new} in {line.strip()[:70]} as {near}"
                yield Mutant(name=name, file="c", source=source)


def survives_c(mutant: Mutant, corpus: Corpus, teeth: Teeth, folder: Path) -> bool:
    """Whether it compiles and every case passes."""
    source, built = folder / "pxd.c", folder / "pxd"
    source.write_text(mutant.source)
    command = [shutil.which("cc") or "cc", "-std=c11", *teeth.flags, "-w", "-o", str(built), str(source)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        return False
    try:
        return teeth.passed(Adapter([str(built)]), corpus)
    except Exception:
        return False
