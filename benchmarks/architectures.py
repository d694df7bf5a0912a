"""Check peraxis on each architecture of transformers and write docs/architectures.md.

    python benchmarks/architectures.py -o docs/architectures.md          # takes 15 minutes of one core
    python benchmarks/architectures.py --only mamba --only "bert (masked)"

Each architecture is checked in its own process, with a time limit and a memory limit. The folder --work keeps finished
outcomes, so an interrupted run continues from there. The exit code is 1 if a result is wrong.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import re
import resource
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from architecture_checks import CHECKS, RIGHT, WRONG, check_family
from tiny_models import build, families, inputs, logits

__all__ = ["main", "run", "table"]

SECONDS: Final = 180.0
MEMORY: Final = 6 << 30  # limit on the data segment of one process, in bytes
_FOLDER: Final = re.compile(r"\S*/architecture-\w+/(?:bfloat16|float32)/")  # the temporary folders of a run


def run(names: Sequence[str], work: Path, *, seconds: float = SECONDS) -> dict[str, dict[str, str]]:
    """Check each architecture, or reuse its outcome from `work`. Returns architecture -> check -> outcome."""
    warm_up()
    work.mkdir(parents=True, exist_ok=True)
    found = {}
    for number, name in enumerate(names, 1):
        kept = work / f"{name.replace(' ', '-')}.json"
        known = read_kept(kept)
        if known is None:
            known = isolated(name, kept, seconds)
        found[name] = known
        print(f"{number}/{len(names)}  {name}: {summary(known)}", file=sys.stderr, flush=True)
    return found


def warm_up() -> None:
    """Import the common modules once, before the processes fork."""
    import peft  # noqa: F401
    import transformers

    import peraxis_tools.convert  # noqa: F401

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = build("llama", torch.float32)
    logits(model, inputs(model, 1))


def versions() -> dict[str, str]:
    """Return the versions that the outcomes depend on."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in ("torch", "transformers")}}


def read_kept(path: Path) -> dict[str, str] | None:
    """Return the outcome of an earlier run with the same versions, or None."""
    try:
        kept = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return dict(kept["outcome"]) if kept.get("versions") == versions() else None


def isolated(name: str, result: Path, seconds: float) -> dict[str, str]:
    """Check one architecture in its own process, for at most `seconds`."""
    child = multiprocessing.get_context("fork").Process(target=_child, args=(name, result))
    child.start()
    child.join(seconds)
    if child.is_alive():
        child.kill()
        child.join()
        return {"build": f"{WRONG}: not done in {seconds:g} s"}
    return read_kept(result) or {"build": f"{WRONG}: the process ended with code {child.exitcode}"}


def _child(name: str, result: Path) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    folder = Path(tempfile.mkdtemp(prefix="architecture-"))
    try:
        outcome = check_family(name, folder)
        temporary = result.with_suffix(".tmp")
        temporary.write_text(json.dumps({"versions": versions(), "outcome": outcome}, indent=1), "utf-8")
        temporary.replace(result)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def summary(outcome: Mapping[str, str]) -> str:
    """Return "right", or the outcomes of the other checks."""
    other = [f"{check}: {text}" for check, text in outcome.items() if text not in (RIGHT, "-")]
    return "; ".join(other) or RIGHT


# --- the page --------------------------------------------------------------------------------------------


def table(found: Mapping[str, Mapping[str, str]]) -> str:
    """Return the text of docs/architectures.md."""
    built = {name: outcome for name, outcome in found.items() if outcome["build"] == RIGHT}
    notes: dict[str, int] = {}
    rows = []
    for name, outcome in built.items():
        cells = [_cell(outcome.get(check, "-"), notes) for check in CHECKS]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    missing = [f"| {name} | {_escaped(outcome['build'])} |" for name, outcome in found.items() if name not in built]
    right = Counter(check for outcome in built.values() for check in CHECKS if outcome.get(check) == RIGHT)
    totals = " | ".join(f"{right[check]} of {len(built)}" for check in CHECKS)
    said = [f"{number}. {_escaped(text)}" for text, number in notes.items()]
    bad = sum(text.startswith(WRONG) for outcome in found.values() for text in outcome.values())
    return INTRODUCTION.format(count=len(found), built=len(built), bad=bad or "none", **versions()) + "\n".join(
        [
            f"| architecture | {' | '.join(f'`{c}`' if c.islower() or c == 'apply_' else c for c in CHECKS)} |",
            f"|{'---|' * (len(CHECKS) + 1)}",
            *rows,
            f"| **right** | {totals} |",
            "",
            "## Refusals",
            "",
            *(said or ["None."]),
            "",
            "## Not built",
            "",
            "No tiny model of these architectures could be built from the default configuration:",
            "",
            "| architecture | reason |",
            "|---|---|",
            *missing,
            "",
        ]
    )


INTRODUCTION: Final = """\
# Architectures

<!-- Generated by `python benchmarks/architectures.py -o docs/architectures.md`. -->

This page shows the results of peraxis on the decoders of transformers, and on T5, BERT and Llava. Each pair is a tiny
random model, made from the default configuration with small sizes, and a fine-tune of it in which every tensor differs.
{built} of {count} models are built with transformers {transformers}, torch {torch} and Python {python}.

| check | it is right if |
|---|---|
| `compress` | `compress --fit none --force` and then `verify --base` succeed |
| `apply` | the folder has the bytes of the reference arithmetic, and transformers loads it |
| `load` | `peraxis.load_model` returns the model of that folder, bit for bit |
| `apply_` | the live base becomes that model, bit for bit |
| `switch` | `VariantSwitch` goes to the variant, back to the base and to the variant again, bit for bit |
| serve BF16, F32 | each row of a mixed batch has the logits of its own model; BF16 may route to other experts |
| LoRA | PEFT loads `convert --to lora` at full rank and gives the logits of the tensors reported as carried |

The checks run in BF16, as most checkpoints do, except serve F32 and LoRA; `compress` and `apply` also run in F32. A
number links to a refusal below. A result that differs is marked {wrong}: {bad} here.

""".replace("{wrong}", WRONG)


def _cell(text: str, notes: dict[str, int]) -> str:
    if text in (RIGHT, "-"):
        return text
    if text.startswith(WRONG):
        return f"**{_escaped(text)}**"
    return f"[{notes.setdefault(_FOLDER.sub('', text), len(notes) + 1)}](#refusals)"


def _escaped(text: str) -> str:
    """Return the text as one line of a table, at most 240 characters, without temporary folders."""
    line = _FOLDER.sub("", " ".join(text.split())).replace("|", "\\|")
    return line if len(line) <= 240 else f"{line[:237]}..."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns 1 if a result is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--only", action="append", metavar="NAME", help="check only this model type; may be repeated")
    parser.add_argument("-o", "--output", type=Path, help="write the page here")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "peraxis-architectures",
                        help="folder of finished outcomes; remove it to start anew (default: %(default)s)")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit per architecture (default: %(default)g)")
    options = parser.parse_args(arguments)
    known = families()
    unknown = [name for name in options.only or () if name not in known]
    if unknown:
        parser.error(f"no architecture {unknown[0]!r}; transformers knows {', '.join(known)}")
    found = run(options.only or list(known), options.work, seconds=options.seconds)
    if options.output:
        options.output.write_text(table(found), "utf-8")
    if options.json:
        document: dict[str, Any] = {"schema": "peraxis.architectures/1", "versions": versions(), "architectures": found}
        print(json.dumps(document, indent=1))
    return int(any(text.startswith(WRONG) for outcome in found.values() for text in outcome.values()))


if __name__ == "__main__":
    sys.exit(main())
