"""The demo on a small real pair, offline: train, compress, inspect, verify, apply, measure.

Each step runs the verb of the same name; `demo` yields them one by one, so that progress is visible.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from peraxis_tools.apply import apply
from peraxis_tools.compress import compress
from peraxis_tools.evaluate import Fidelity, evaluate
from peraxis_tools.folders import write_marker
from peraxis_tools.inspect import InspectResult, inspect
from peraxis_tools.optional import require
from peraxis_tools.outputs import claim_folder
from peraxis_tools.pair import PairFolders, PairSize, train_pair
from peraxis_tools.process import told_on_interrupt
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

    folder: Path
    checkpoint_bytes: int
    rows: tuple[DemoRow, ...]
    axes: dict[str, int]


@dataclass(frozen=True, slots=True)
class DemoStep:
    """One finished step: the equivalent command, and its result."""

    command: str
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
        with told_on_interrupt(lambda: "the next demo begins with the training again"):
            yield from _steps(folder, size=size, seed=seed, progress=progress)


def _steps(
    folder: Path, *, size: PairSize | None, seed: int, progress: Callable[[int], None] | None
) -> Iterator[DemoStep]:
    pair = train_pair(folder, size=size, seed=seed, progress=progress)
    text: dict[str, Any] = {"calibration_samples": _SAMPLES, "sequence_length": _LENGTH}
    ours = compress(
        pair.base, pair.fine_tuned, folder / "delta.pxd", calibration=str(pair.calibration), overwrite=True, **text
    )
    yield DemoStep(f"compress base fine-tuned -o delta.pxd --calibration {pair.calibration.name}", ours)
    yield DemoStep("inspect delta.pxd", inspect(ours.path))
    yield DemoStep("verify delta.pxd --base base", verify(ours.path, base=pair.base))
    yield DemoStep("apply base delta.pxd -o applied", apply(pair.base, ours.path, folder / "applied", overwrite=True))
    same_size = compress(
        pair.base,
        pair.fine_tuned,
        folder / "one-mask.pxd",
        calibration=str(pair.calibration),
        embeddings="sign",
        overwrite=True,
        **text,
    )
    scalar = compress(
        pair.base,
        pair.fine_tuned,
        folder / "one-scalar.pxd",
        fit="none",
        axis="tensor",
        embeddings="sign",
        overwrite=True,
    )
    deltas = {
        "one scalar": scalar.path,
        "peraxis 1 mask": same_size.path,
        "peraxis default": ours.path,
    }
    yield DemoStep("eval base fine-tuned delta.pxd --text ...", _measure(folder, pair, deltas, inspect(ours.path)))


def _measure(folder: Path, pair: PairFolders, deltas: dict[str, Path], ours: InspectResult) -> DemoResult:
    rows: list[DemoRow] = []
    for label, path in deltas.items():
        found = evaluate(
            pair.base,
            pair.fine_tuned,
            path,
            pair.held_out,
            samples=_SAMPLES,
            sequence_length=_LENGTH,
            candidates=("merged",) if rows else ("base", "merged"),
        )
        if not rows:
            base = {domain.domain: domain.candidates["base"] for domain in found.domains}
            rows.append(DemoRow(label="base alone", bytes=0, ratio=None, fidelity=base))
        merged = {domain.domain: domain.candidates["merged"] for domain in found.domains}
        rows.append(DemoRow(label=label, bytes=found.bytes, ratio=ours.full_bytes / found.bytes, fidelity=merged))
    axes = sum((Counter(subtype.counts) for subtype in ours.axes), Counter[str]())
    return DemoResult(folder=folder, checkpoint_bytes=ours.full_bytes, rows=tuple(rows), axes=dict(axes))
