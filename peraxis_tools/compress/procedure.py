"""The whole model, one decoder block at a time: teacher (fine-tuned) and student (base + deltas) side by side.

For each block: load it twice; see once which product reads which input (discovery); then, stage by stage in the order
of the data (q/k/v; o; gate/up; down), run both up to the stage's input, sum G, E, F (statistics.py), fit the stage's
modules, and put them into the student exactly as the file will apply them. What comes later is then fitted on inputs
that already contain what came before. At last both blocks' outputs replace the hidden states. O(layers) work;
memory holds one block of each model, the hidden states, and the sums of one stage.

Embedding first, as its rows change what everything else sees; lm_head last, on the final hidden states. A tied
pair is fitted as the embedding that it is, by its weights alone: what the head reads is not known yet.

Experts: a token may be routed elsewhere in the student, so teacher inputs cannot be matched; there Z = 0, and the
experts are fitted on the student's own tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peraxis_format import Axis, Encoding, Safetensors
from peraxis_tools.compress.distributed import Processes
from peraxis_tools.compress.fit import FitOptions, FittedMatrix, fit_matrix
from peraxis_tools.compress.hidden import HiddenStates
from peraxis_tools.compress.modules import TORCH_DTYPES, components_of
from peraxis_tools.compress.names import NameMap, Piece
from peraxis_tools.compress.observe import Call, Observer, StopForward
from peraxis_tools.compress.options import OptionError
from peraxis_tools.compress.plan import TABLES, Plan, PlannedModule
from peraxis_tools.compress.skeleton import Skeleton
from peraxis_tools.compress.stages import Key, Stage, stages_of
from peraxis_tools.compress.statistics import Moments, Statistics
from peraxis_tools.compress.streaming import mean_components
from peraxis_tools.compress.types import FittedModule, ModuleReport
from peraxis_tools.compress.weights import Weights, kept_rows
from peraxis_tools.compress.workfolder import WorkFolder

__all__ = ["Batch", "Procedure"]


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids [samples, length]; whether they judge (held-out) or fit."""

    ids: Tensor
    held_out: bool


class Procedure:
    """One run over all blocks. `fitted` fills as it goes; every finished part is in the work folder."""

    def __init__(
        self,
        *,
        plan: Plan,
        base: Safetensors,
        fine_tuned: Safetensors,
        teacher: Skeleton,
        student: Skeleton,
        names: NameMap,
        batches: Sequence[Batch],
        options: FitOptions,
        work: WorkFolder,
        processes: Processes,
        hidden_limit: int,
        progress: Callable[[str, int, int], None],
    ) -> None:
        self.teacher, self.student = teacher, student
        self.names, self.options, self.work, self.processes = names, options, work, processes
        self.batches = [batches[i] for i in processes.share(len(batches))]
        if len(batches) < processes.count:
            raise OptionError(f"{processes.count} processes for {len(batches)} batches: give fewer, or a smaller batch")
        self.modules = {module.name: module for module in plan.modules}
        self.fitted: dict[str, FittedModule] = {}
        self.weights = Weights(
            plan=plan, base=base, fine_tuned=fine_tuned, names=names, fitted=self.fitted, device=student.device
        )
        self._hidden = [
            HiddenStates(work.path, f"{label}-{processes.rank}", limit=hidden_limit // 2)
            for label in ("teacher", "student")
        ]
        self._progress = progress
        self.device = student.device

    # -- the run ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def run(self) -> dict[str, FittedModule]:
        """Fit every module that the plan gives signs. Returns them by name."""
        blocks = len(self.student)
        self._part("embedding", self._fit_tables)
        for i, batch in enumerate(self.batches):
            for hidden, skeleton in zip(self._hidden, (self.teacher, self.student), strict=True):
                hidden[i] = skeleton.embed(batch.ids)
        for index in range(blocks):
            self._progress("fit", index, blocks + 1)
            for skeleton, source in self._sources():
                self.weights.fill(skeleton, source, skeleton.layer_parameters(index))
            self._part(f"block-{index:05d}", lambda index=index: self._fit_block(index))
            self._advance(index)
            for skeleton in (self.teacher, self.student):
                skeleton.empty(index)
        self._progress("fit", blocks, blocks + 1)
        self._part("head", self._fit_head)
        self._progress("fit", blocks + 1, blocks + 1)
        return self.fitted

    def _sources(self) -> tuple[tuple[Skeleton, Callable[[str], Tensor]], ...]:
        return (self.teacher, self.weights.teacher), (self.student, self.weights.student)

    def _part(self, part: str, fit: Callable[[], list[FittedModule]]) -> None:
        """Fit a part, or take it from the work folder, and see to it that the student has it."""
        modules = self.processes.spread(self.work.load(part) if self.processes.leader else None)
        if modules is None:
            modules = fit()
            if self.processes.leader:
                self.work.save(part, modules)
        for module in modules:
            self.fitted[module.name] = module
        if part == "embedding":
            for skeleton, source in self._sources():
                self.weights.fill_outer(skeleton, source)
        else:
            self._install({self.names.by_tensor[module.name].parameter for module in modules})

    def _install(self, parameters: Iterable[str]) -> None:
        for name in sorted(parameters):
            value = self.weights.parameter(name, self.weights.student, self.student)
            if value is not None:
                self.student.set(name, value)

    def _advance(self, index: int) -> None:
        for i, batch in enumerate(self.batches):
            for hidden, skeleton in zip(self._hidden, (self.teacher, self.student), strict=True):
                hidden[i] = skeleton.run_layer(index, batch.ids, hidden[i])

    def _signed(self, parameters: Iterable[str]) -> list[tuple[PlannedModule, Piece]]:
        """Modules with signs whose tensors lie in these parameters, in plan order."""
        wanted = set(parameters)
        return [
            (module, piece)
            for module in self.modules.values()
            if module.encoding is Encoding.SIGN
            and (piece := self.names.by_tensor.get(module.name)) is not None
            and piece.parameter in wanted
        ]

    def _fit_tables(self) -> list[FittedModule]:
        """Embeddings, and what no parameter of the model holds: without calibration."""
        mapped = self.names.by_tensor
        outer = set(self.teacher.outer_parameters())
        return [
            self._plain(module, "" if module.kind in TABLES else "not a parameter of the model: mean |delta|")
            for module in self.modules.values()
            if module.encoding is Encoding.SIGN
            and (module.name not in mapped or mapped[module.name].parameter in outer)
            and module.kind != "lm_head"
        ]

    def _plain(self, module: PlannedModule, note: str) -> FittedModule:
        rows = slice(0, kept_rows(module))
        components = mean_components(
            self.weights.base.read(module.name, rows),
            self.weights.fine_tuned.read(module.name, rows),
            base_dtype=self.weights.base[module.name].dtype,
            dtype=module.dtype,
            axis=module.axis,
            components=module.components,
        )
        return FittedModule(name=module.name, components=components, report=ModuleReport(note=note))

    def _fit_block(self, index: int) -> list[FittedModule]:
        local = {name: self.student.get(name) for name in self.student.layer_parameters(index)}
        calls: list[Call] = []
        with Observer(local.items(), calls.append):
            self.student.run_layer(index, self.batches[0].ids, self._hidden[1][0])
        stages = stages_of(calls)
        del calls
        seen = {name for stage in stages for name in stage.parameters}
        done = [self._plain(m, "its input was not seen: mean |delta|") for m, _ in self._signed(set(local) - seen)]
        self._take(done)
        for stage in stages:
            modules = self._signed(stage.parameters)
            if modules:
                fitted = self._fit_stage(stage, modules, lambda skeleton, i: self._layer_forward(index, skeleton, i))
                self._take(fitted)
                done.extend(fitted)
        return done

    def _take(self, modules: Sequence[FittedModule]) -> None:
        for module in modules:
            self.fitted[module.name] = module
        self._install({self.names.by_tensor[module.name].parameter for module in modules})

    def _layer_forward(self, index: int, skeleton: Skeleton, i: int) -> None:
        skeleton.run_layer(index, self.batches[i].ids, self._hidden[skeleton is self.student][i])

    def _fit_head(self) -> list[FittedModule]:
        heads = [m for m in self.modules.values() if m.encoding is Encoding.SIGN and m.kind == "lm_head"]
        done: list[FittedModule] = []
        for module in heads:
            piece = self.names.by_tensor.get(module.name)
            if piece is None:
                done.append(self._plain(module, "not a parameter of the model: mean |delta|"))
                continue
            stage = Stage([piece.parameter], {(piece.parameter, None): (piece.parameter, None)})
            stage.transposed[piece.parameter] = False
            done.extend(self._fit_stage(stage, [(module, piece)], self._head_forward))
        return done

    def _head_forward(self, skeleton: Skeleton, i: int) -> None:
        skeleton.head(self.batches[i].ids, self._hidden[skeleton is self.student][i])

    # -- one stage -------------------------------------------------------------------------------------------

    def _inputs(
        self, stage: Stage, skeleton: Skeleton, run: Callable[[Skeleton, int], None], i: int
    ) -> dict[Key, Tensor]:
        """The inputs of the stage's leaders on batch i; the pass ends once all are there."""
        leaders = set(stage.leader.values())
        found: dict[Key, list[Tensor]] = {}

        def see(call: Call) -> None:
            key: Key = (call.parameter, call.index[0] if call.index else None)
            if key in leaders or (stage.experts and stage.leader.get(key, key) == key):
                found.setdefault(key, []).append(call.inputs.clone())
            if not stage.experts and len(found) == len(leaders):
                raise StopForward

        parameters = [(name, skeleton.get(name)) for name in stage.parameters]
        try:
            with Observer(parameters, see):
                run(skeleton, i)
        except StopForward:
            pass
        return {key: torch.cat(inputs) for key, inputs in found.items()}

    def _collect(self, stage: Stage, run: Callable[[Skeleton, int], None]) -> dict[Key, Statistics]:
        sums: dict[Key, Statistics] = {}
        for i, batch in enumerate(self.batches):
            ours = self._inputs(stage, self.student, run, i)
            theirs = {} if stage.experts else self._inputs(stage, self.teacher, run, i)
            for key, inputs in ours.items():
                if key not in sums:
                    width = inputs.shape[-1]
                    fit, judge = (Moments.zeros(width, paired=not stage.experts, device=self.device) for _ in range(2))
                    sums[key] = Statistics(fit=fit, held_out=judge)
                moments = sums[key].held_out if batch.held_out else sums[key].fit
                moments.add(inputs, theirs.get(key))
        self._add_up(stage, sums)
        return sums

    def _add_up(self, stage: Stage, sums: dict[Key, Statistics]) -> None:
        """Make the sums those of all processes. An expert may have had tokens in some of them only."""
        if self.processes.count == 1:
            return
        keys = {stage.leader.get(key, key) for key in stage.leader if key[1] is None}
        for name in stage.parameters if stage.experts else ():
            shape = self.student.get(name).shape
            for e in range(shape[0]) if len(shape) == 3 else ():
                keys.add((name, e))
                sums.setdefault((name, e), _no_statistics(shape[-2 if stage.transposed[name] else -1], self.device))
        for key in sorted(keys, key=str):
            for moments in (sums[key].fit, sums[key].held_out):
                tokens = torch.tensor([moments.tokens], device=self.device)
                self.processes.add([*moments.tensors(), tokens])
                moments.tokens = int(tokens)

    def _fit_stage(
        self,
        stage: Stage,
        modules: Sequence[tuple[PlannedModule, Piece]],
        run: Callable[[Skeleton, int], None],
    ) -> list[FittedModule]:
        sums = self._collect(stage, run)
        mine = set(self.processes.share(len(modules)))
        return self.processes.exchange(
            [
                self._fit_module(module, piece, stage, sums) if i in mine else None
                for i, (module, piece) in enumerate(modules)
            ]
        )

    def _fit_module(
        self, module: PlannedModule, piece: Piece, stage: Stage, sums: dict[Key, Statistics]
    ) -> FittedModule:
        base, tuned = self.weights.pair(module)
        transposed = stage.transposed[piece.parameter]
        if torch.equal(base, tuned):
            return FittedModule(name=module.name, components=(), report=ModuleReport(note="unchanged"))
        batch = base.shape[:-2]
        options = self._options(module, batch=bool(batch), transposed=transposed)
        results: list[FittedMatrix] = []
        matrices = zip(base.reshape(-1, *base.shape[-2:]), tuned.reshape(-1, *tuned.shape[-2:]), strict=True)
        for e, (b, t) in enumerate(matrices):
            key: Key = (piece.parameter, e if batch else piece.index)
            statistics = sums.get(stage.leader.get(key, key)) or _no_statistics(
                b.shape[-2 if transposed else -1], self.device
            )
            if transposed:
                b, t = b.t().contiguous(), t.t().contiguous()
            results.append(fit_matrix(b, t, dtype=TORCH_DTYPES[module.dtype], statistics=statistics, options=options))
        if all(not result.terms for result in results):
            components = ()
        else:
            components = components_of([r.terms for r in results], batch=tuple(batch), transposed=transposed)
        return FittedModule(name=module.name, components=components, report=_report(results))

    def _options(self, module: PlannedModule, *, batch: bool, transposed: bool) -> FitOptions:
        axes = self.options.axes if module.axis is None else (module.axis,)
        if batch and len(axes) > 1:
            axes = (Axis.ROW_COL,)  # experts of one tensor share their axis; this one contains row and col
        if transposed:
            swapped = {Axis.ROW: Axis.COL, Axis.COL: Axis.ROW}
            axes = tuple(swapped.get(axis, axis) for axis in axes)
        return replace(self.options, axes=axes, components=module.components)


def _no_statistics(width: int, device: torch.device) -> Statistics:
    """For an expert that no token reached."""
    fit, judge = (Moments.zeros(width, paired=False, device=device) for _ in range(2))
    return Statistics(fit=fit, held_out=judge)


def _report(results: Sequence[FittedMatrix]) -> ModuleReport:
    notes = sorted({result.note for result in results if result.note})
    count = sum(1 for result in results if result.note)
    share = f"{count} of {len(results)} experts: " if len(results) > 1 and notes else ""
    return ModuleReport(
        error=sum(result.error for result in results),
        error_none=sum(result.error_none for result in results),
        error_same=sum(result.error_same for result in results),
        note=share + "; ".join(notes),
    )
