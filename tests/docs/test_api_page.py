"""docs/api.md agrees with the package."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import peraxis

pytest.importorskip("torch")
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "api.md"


def test_the_python_page_is_what_the_code_says(tmp_path: Path) -> None:
    written = tmp_path / "api.md"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = ROOT / "docs" / "api_reference.py"
    subprocess.run([sys.executable, script, written], check=True, cwd=ROOT, env=environment)
    message = "stale: run `make docs`"
    assert PAGE.read_text("utf-8") == written.read_text("utf-8"), message


def test_every_function_of_the_package_has_its_section() -> None:
    sections = set(re.findall(r"^### (\w+)$", PAGE.read_text("utf-8"), re.MULTILINE))
    assert set(peraxis.__all__) - {"PxdError", "ToolError", "__version__"} <= sections
