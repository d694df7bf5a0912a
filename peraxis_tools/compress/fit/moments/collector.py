"""The moments of one block: its stages, and for each stage G, E, F over all batches, of teacher and student.

The caches of passes (passes.py) share a memory limit with the hidden states; batches beyond the limit are run again
for each stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from peraxis_tools.compress.fit.moments.passes import BlockPass, CachedPass, ReplayedPass, Run, SuspendedPass
from peraxis_tools.compress.fit.moments.recorder import Call, RecordedPass, Watch, discover
from peraxis_tools.compress.fit.moments.stages import Key, Stage, stages_of
from peraxis_tools.compress.fit.moments.sums import Moments, Statistics, grid_of
from peraxis_tools.compress.model.layerwise_model import LayerwiseModel
from peraxis_tools.compress.plan.estimate import TABLE_TOKENS
from peraxis_tools.compress.run.distributed import Processes
from peraxis_tools.process.heap import trim_heap

__all__ = ["MomentsCollector", "Side", "TextBatches", "TokenBatch"]

_THREADS: Final = 64  # suspended passes at most
_LARGE_SUMS: Final = 32 << 20


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Token ids [samples, length], and whether they are for validation (held out) or for the fit."""

    ids: Tensor
    validation: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TextBatches:
    """The batches of the calibration text.

    every: those of all processes. places: the numbers of those of this process, at least one. crossed: the validation
    batches are another text, which the others validate too (sums.py). idle: the batches of this process are not added
    to the moments; they run, so that it takes part in every step.
    """

    every: Sequence[TokenBatch]
    places: Sequence[int]
    crossed: bool = False
    idle: bool = False

    @property
    def batches(self) -> list[TokenBatch]:
        """The batches of this process."""
        return [self.every[i] for i in self.places]

    @property
    def validated(self) -> bool:
        """Whether any batch is for validation."""
        return any(batch.validation for batch in self.every)

    def enough_for(self, width: int) -> TextBatches:
        """Return a share of the batches, the same for the fit and for validation, with enough tokens for one fit of
        this width.

        The choice does not depend on the number of processes; a process without a chosen batch is idle.
        """
        share = min(1.0, TABLE_TOKENS * width / max(1, sum(batch.ids.numel() for batch in self.every)))
        chosen: set[int] = set()
        for validation in (False, True):
            its = [i for i, batch in enumerate(self.every) if batch.validation is validation]
            chosen.update(its[: max(1, round(share * len(its)))])
        places = [i for i in self.places if i in chosen]
        return replace(self, places=places or self.places[:1], idle=self.idle or not places)


@dataclass(frozen=True, slots=True)
class Side:
    """Teacher or student. forward: runs the block on the batch of this number, from its hidden states."""

    model: LayerwiseModel
    forward: Callable[[int], Tensor]


class MomentsCollector:
    """Both sides of one block. Collect the stages in order and fit each before the next; then take the outputs."""

    def __init__(
        self,
        teacher: Side,
        student: Side,
        names: Sequence[str],
        *,
        text: TextBatches,
        processes: Processes,
        is_fitted: Callable[[Stage], bool],
        room: int,
        outputs: bool = True,
    ) -> None:
        """names: parameters of the block. is_fitted: whether a stage has modules. room: bytes that passes may cache.

        outputs: False if the outputs are not needed; then no pass runs beyond the last stage.
        """
        self._student, self._text, self._processes = student, text, processes
        parameters = {name: value for name in names if (value := teacher.model.get(name)).dim() in (2, 3)}
        owners = {name: teacher.model.owner(name) for name in parameters}
        found = discover(lambda: teacher.forward(0), parameters, owners, to_the_end=outputs)
        shared = processes.broadcast_json(
            [stage.to_json() for stage in stages_of(found.calls)] if processes.is_main_process else None
        )
        every = [Stage.from_json(values) for values in shared]
        self.seen = {name for stage in every for name in stage.parameters}
        self.stages = [stage for stage in every if is_fitted(stage)]
        self._open = ExitStack()
        self._teachers: list[BlockPass] = []
        self._students: list[BlockPass] = []
        self._make_passes(teacher, found, room)

    def __enter__(self) -> MomentsCollector:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _make_passes(self, teacher: Side, found: RecordedPass, room: int) -> None:
        paired = [stage for stage in self.stages if not stage.experts]
        first = None if found.output is None else CachedPass(found.calls, found.output, paired)
        # A suspended pass holds as much again: an input, and the residual states.
        within = 0 if first is None else min(_THREADS, room // max(1, 2 * first.nbytes))
        names = sorted({name for stage in self.stages for name in stage.parameters})
        teachers, students = (self._runs(side, names, found.hooked) for side in (teacher, self._student))
        can_suspend = all(stage.can_suspend for stage in self.stages)
        for i, (run_teacher, run_student) in enumerate(zip(teachers, students, strict=True)):
            if i >= within or first is None:
                self._teachers.append(ReplayedPass(run_teacher))
            else:
                self._teachers.append(CachedPass.of(run_teacher, paired) if i else first)
            self._students.append(
                SuspendedPass(run_student) if i < within and can_suspend else ReplayedPass(run_student)
            )
        for one in (*self._teachers, *self._students):
            self._open.callback(one.close)

    def _runs(self, side: Side, names: Sequence[str], hooked: frozenset[str]) -> list[Run]:
        owners = {name: side.model.owner(name) for name in names}
        watch = Watch({name: side.model.get(name) for name in names}, owners, hooked=hooked)
        self._open.enter_context(watch)

        def run_of(i: int) -> Run:
            def run(see: Callable[[Call], None]) -> Tensor:
                with watch.reporting(see):
                    return side.forward(i)

            return run

        return [run_of(i) for i in range(len(self._text.batches))]

    def collect(self, stage: Stage) -> dict[Key, Statistics]:
        """The moments of a stage, over the batches of all processes."""
        large = self._sums_bytes(stage) >= _LARGE_SUMS
        if large:
            trim_heap()  # what earlier stages freed is in pieces that large sums do not fit into
        sums: dict[Key, Statistics] = {}
        for batch, teacher, student in zip(self._text.batches, self._teachers, self._students, strict=True):
            ours = student.inputs(stage)
            theirs = {} if stage.experts else teacher.inputs(stage)
            for key, inputs in ours.items():
                if key not in sums:
                    sums[key] = self._empty(stage, inputs.shape[-1])
                moments = sums[key].validation if batch.validation else sums[key].fit
                if not self._text.idle:
                    moments.add(inputs, theirs.get(key))
        self._add_up(stage, sums)
        if large:
            trim_heap()  # of the passes; a fit needs other sizes
        return sums

    def _sums_bytes(self, stage: Stage) -> int:
        """The bytes of G, E and F of one input of the stage, for the fit and for its validation."""
        shapes = [(self._student.model.get(name).shape, swapped) for name, swapped in stage.transposed.items()]
        return 6 * 8 * max(shape[-2 if swapped else -1] ** 2 for shape, swapped in shapes)

    def _empty(self, stage: Stage, width: int) -> Statistics:
        grid = grid_of(stage.energy, len(self._text.every))
        device = self._student.model.device
        fit, validation = (
            Moments.zeros(width, paired=not stage.experts, validates=validates, grid=grid, device=device)
            for validates in (self._text.crossed or not self._text.validated, True)
        )
        return Statistics(fit=fit, validation=validation, crossed=self._text.crossed)

    def _add_up(self, stage: Stage, sums: dict[Key, Statistics]) -> None:
        """Add the moments over all processes. An expert may have tokens in only some of them."""
        if self._processes.count == 1:
            return
        keys = {stage.input_of.get(key, key) for key in stage.input_of if key[1] is None}
        for name in stage.parameters if stage.experts else ():
            shape = self._student.model.get(name).shape
            for e in range(shape[0]) if len(shape) == 3 else ():
                keys.add((name, e))
                sums.setdefault((name, e), self._empty(stage, shape[-2 if stage.transposed[name] else -1]))
        for key in sorted(keys, key=str):
            for moments in (sums[key].fit, sums[key].validation):
                tokens = torch.tensor([moments.tokens], device=moments.G.device)
                self._processes.add([*moments.tensors(), tokens])
                moments.tokens = int(tokens)

    def outputs(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (batch index, teacher's output, student's output). Call this once, at the end."""
        for i, (teacher, student) in enumerate(zip(self._teachers, self._students, strict=True)):
            yield i, teacher.finish(), student.finish()
            teacher.close()
            student.close()
