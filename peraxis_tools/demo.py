"""The demo on a small real pair, offline: train, compress, inspect, verify, apply, measure.

Each step runs the verb of the same name; `demo` yields them one by one, so that progress is visible.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from peraxis_tools.apply import apply
from peraxis_tools.compress import compress
from peraxis_tools.evaluate import EvaluateResult, Fidelity, evaluate
from peraxis_tools.inspect import InspectResult, inspect
from peraxis_tools.outputs.folders import write_marker
from peraxis_tools.outputs.rules import claim_folder
from peraxis_tools.pair import PairFolders, PairSize, train_pair
from peraxis_tools.process.command_line import told_on_interrupt
from peraxis_tools.process.optional import require
from peraxis_tools.verify import verify

__all__ = ["DemoResult", "DemoRow", "DemoStep", "demo"]

_SAMPLES: Final = 48
_LENGTH: Final = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoRow:
    """One candidate for the fine-tuned model: its bytes, and its fidelity by domain."""

    label: str
    bytes: int
    ratio: float | None
    fidelity: dict[str, Fidelity]


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """The result of the demo. rows: the base alone, one scalar per tensor, peraxis with 1 mask, peraxis by default."""

    path: Path
    full_bytes: int
    rows: tuple[DemoRow, ...]
    axis_counts: dict[str, int]


@dataclass(frozen=True, slots=True)
class DemoStep:
    """One finished step: the command that gives this result, and the result; no command for the table at the end."""

    command: str | None
    result: Any


def demo(
    folder: Path, *, size: PairSize | None = None, seed: int = 0, progress: Callable[[int], None] | None = None
) -> Iterator[DemoStep]:
    """Run the demo in `folder`, a new one or one of an earlier demo; the last step's result is a DemoResult.

    progress counts training steps. Raises ToolError if the folder has other files.
    """
    require("the demo", "torch", "transformers", "datasets", extra="compress")
    with claim_folder(folder, overwrite=True):
        folder.mkdir(exist_ok=True)
        # The marker says unfinished, so that the next demo may replace the folder.
        write_marker(folder, [], finished=False)
        with told_on_interrupt(lambda: "the next demo begins with the training again", alone=True):
            yield from _steps(folder, size=size, seed=seed, progress=progress)


def _steps(
    folder: Path, *, size: PairSize | None, seed: int, progress: Callable[[int], None] | None
) -> Iterator[DemoStep]:
    pair = train_pair(folder, size=size, seed=seed, progress=progress)
    base, fine_tuned, calibration = pair.base, pair.fine_tuned, str(pair.calibration)
    delta, applied = folder / "delta.pxd", folder / "applied"
    text: dict[str, Any] = {"calibration_samples": _SAMPLES, "sequence_length": _LENGTH}
    length = ("--sequence-length", _LENGTH)
    ours = compress(base, fine_tuned, delta, calibration=calibration, overwrite=True, **text)
    options = ("--calibration", calibration, "--calibration-samples", _SAMPLES, *length, "--overwrite")
    yield DemoStep(_command("compress", base, fine_tuned, "-o", delta, *options), ours)
    yield DemoStep(_command("inspect", delta), inspect(delta))
    yield DemoStep(_command("verify", delta, "--base", base), verify(delta, base=base))
    done = apply(base, delta, applied, overwrite=True)
    yield DemoStep(_command("apply", base, delta, "-o", applied, "--overwrite"), done)
    measured = evaluate(base, fine_tuned, delta, pair.held_out, samples=_SAMPLES, sequence_length=_LENGTH)
    texts = [word for name, path in pair.held_out.items() for word in ("--text", f"{name}={path}")]
    yield DemoStep(_command("eval", base, fine_tuned, delta, *texts, "--samples", _SAMPLES, *length), measured)
    one_mask = compress(
        base,
        fine_tuned,
        folder / "one-mask.pxd",
        calibration=calibration,
        embeddings="sign",
        overwrite=True,
        **text,
    )
    scalar = compress(
        base,
        fine_tuned,
        folder / "one-scalar.pxd",
        fit="none",
        axis="tensor",
        embeddings="sign",
        overwrite=True,
    )
    others = {"one scalar": scalar.path, "peraxis 1 mask": one_mask.path}
    yield DemoStep(None, _compared(folder, pair, others, measured, inspect(delta)))


def _command(*words: object) -> str:
    """A command line of peraxis-tools, as a shell reads it."""
    return shlex.join(map(str, words))


def _compared(
    folder: Path, pair: PairFolders, others: dict[str, Path], ours: EvaluateResult, inspected: InspectResult
) -> DemoResult:
    """The table of all candidates. others: label -> delta; ours: the evaluation of the default delta."""
    full = inspected.full_bytes
    rows = [DemoRow(label="base alone", bytes=0, ratio=None, fidelity=_fidelity(ours, "base"))]
    for label, path in others.items():
        found = evaluate(
            pair.base,
            pair.fine_tuned,
            path,
            pair.held_out,
            samples=_SAMPLES,
            sequence_length=_LENGTH,
            candidates=("merged",),
        )
        rows.append(_row(label, found, full))
    rows.append(_row("peraxis default", ours, full))
    axes = sum((Counter(group.axis_counts) for group in inspected.axes_by_group), Counter[str]())
    return DemoResult(path=folder, full_bytes=full, rows=tuple(rows), axis_counts=dict(axes))


def _row(label: str, found: EvaluateResult, full_bytes: int) -> DemoRow:
    return DemoRow(label=label, bytes=found.bytes, ratio=full_bytes / found.bytes, fidelity=_fidelity(found, "merged"))


def _fidelity(found: EvaluateResult, candidate: str) -> dict[str, Fidelity]:
    return {domain.domain: domain.candidates[candidate] for domain in found.domains}
