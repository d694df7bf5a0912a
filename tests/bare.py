"""Run commands and Python code with the dependencies of no extra: imports of other packages fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

__all__ = ["run_bare"]

ROOT = Path(__file__).parents[1]
_PREAMBLE = """
import sys
ALLOWED = {"numpy", "click", "rich", "pygments", "markdown_it", "mdurl", "threadpoolctl"}
ALLOWED |= {"peraxis", "peraxis_format", "peraxis_tools"}
class Bare:
    # `import` fails and `find_spec` is None for all other packages, as where they are missing.
    def __init__(self, inner):
        self.inner = inner
    def find_spec(self, name, path=None, target=None):
        known = name.partition(".")[0] in ALLOWED | set(EXTRA) | set(sys.stdlib_module_names)
        return self.inner.find_spec(name, path, target) if known else None
sys.meta_path[:] = [Bare(finder) for finder in sys.meta_path]
"""


def run_bare(
    *arguments: object, code: str | None = None, extra: tuple[str, ...] = (), cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `peraxis-tools` with these arguments, or `code`. extra: other packages that may be imported."""
    argv = json.dumps(["peraxis-tools", *map(str, arguments)])
    main = f"sys.argv = {argv}\nfrom peraxis_tools.cli import main\nmain()"
    script = f"EXTRA = {extra!r}\n{_PREAMBLE}\n{code if code is not None else main}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=cwd or ROOT, env=environment
    )
