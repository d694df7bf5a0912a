"""The paths of the kit and its loaders, and helpers that their tests share."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import peraxis_conformance
import pytest

__all__ = [
    "CAPS",
    "C_FLAGS",
    "KIT",
    "SANITIZED",
    "SLOW",
    "SPEC",
    "compiled_loader",
    "node_loader",
    "reference_loader",
    "script",
    "wrong_loader",
]

KIT = Path(peraxis_conformance.__file__).parent
SPEC = Path(__file__).parents[2] / "SPEC.md"
# Cases with headers of up to 64 MiB. `make conformance` runs them; the tests leave them out.
SLOW = (
    "hostile/limit-limits-met",
    "hostile/limit-header-largest",
    "hostile/limit-header-values-within",
    "hostile/limit-manifest-values*",
    "hostile/limit-modules",
    "hostile/limit-assets",
    "hostile/bomb-*",
)
C_FLAGS = ("-std=c11", "-g", "-O1", "-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Werror")
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
CAPS = {
    "protocol": 1,
    "implementation": "script",
    "version": "1",
    "spec": ["1.0"],
    "features": [],
    "operations": ["decode"],
}


def reference_loader() -> list[str]:
    """The adapter of peraxis_format."""
    return [sys.executable, str(KIT / "loaders" / "python" / "adapter.py")]


def wrong_loader(switch: str = "") -> list[str]:
    """The small reader, correct or with one mistake."""
    command = [sys.executable, "-S", str(KIT / "loaders" / "wrong" / "adapter.py")]
    return [*command, "--wrong", switch] if switch else command


def node_loader() -> list[str]:
    """The loader in JavaScript. The test skips if Node is not installed."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node on this machine")
    return [node, str(KIT / "loaders" / "js" / "adapter.js")]


@functools.cache
def _build(folder: Path) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler on this machine")
    built = folder / "pxd"
    source = str(KIT / "loaders" / "c" / "pxd.c")
    subprocess.run([compiler, *C_FLAGS, *SANITIZED, "-o", str(built), source], check=True, timeout=600)
    return built


def compiled_loader(folder: Path) -> list[str]:
    """The loader in C, built with warnings as errors and with sanitizers, which end it with status 99 on a finding."""
    os.environ["ASAN_OPTIONS"] = "exitcode=99"
    os.environ["UBSAN_OPTIONS"] = "halt_on_error=1:exitcode=99"
    return [str(_build(folder))]


def script(folder: Path, body: str) -> list[str]:
    """Write an adapter with correct caps. `body` is the rest of its code."""
    path = folder / "adapter.py"
    caps = json.dumps(json.dumps(CAPS))
    start = f"import json, os, sys, time\nif sys.argv[1] == 'caps':\n    print({caps}); sys.exit(0)\n"
    path.write_text(start + body)
    return [sys.executable, "-S", str(path)]
