"""Fit the whole model, one decoder block at a time: teacher (fine-tuned) and student (base + deltas) side by side.

For each block: load it twice; record once which product reads which input (discovery); then, stage by stage in forward
order (q/k/v; o; gate/up; down), run both up to the stage's input, sum G, E, F (collector.py), fit the stage's modules,
and install them in the student exactly as apply will compute them. So later modules are fitted on inputs that include
the error of earlier ones. At the end both blocks' outputs replace the hidden states. The work is O(layers); memory
holds one block of each model, the hidden states, and the moments of one stage.

The embedding is fitted first, because its rows change all other inputs; it is fitted for the rows that the text reads
(table.py). lm_head is fitted last, on the final hidden states. A tied pair is both: it is fitted first, on the final
hidden states of the teacher, which one pass of the teacher on a part of the text gives. The error of its rows as an
embedding counts half as much as the error of its logits.

Experts: the student may route a token to another expert, so teacher inputs cannot be matched. There Z = 0, and experts
are fitted on the student's own tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from peraxis_format import Encoding, Safetensors
from peraxis_tools.checkpoints.parameter_names import NameMap, ParameterSlice
from peraxis_tools.compress.fit.choice import fit_matrices
from peraxis_tools.compress.fit.fit import FitOptions, FittedMatrix
from peraxis_tools.compress.fit.mean import mean_components
from peraxis_tools.compress.fit.moments.collector import MomentsCollector, Side, TextBatches, TokenBatch
from peraxis_tools.compress.fit.moments.spill import SpilledTensors
from peraxis_tools.compress.fit.moments.stages import Key, Stage
from peraxis_tools.compress.fit.moments.sums import Statistics
from peraxis_tools.compress.fit.table import fit_table, importance
from peraxis_tools.compress.model.layerwise_model import LayerwiseModel
from peraxis_tools.compress.model.orientation import OrientedModule
from peraxis_tools.compress.model.weights import Weights, kept_rows
from peraxis_tools.compress.plan.plan import TABLES, Plan, PlannedModule
from peraxis_tools.compress.run.distributed import Processes
from peraxis_tools.compress.run.types import FittedModule, ModuleReport
from peraxis_tools.compress.run.work_folder import WorkFolder
from peraxis_tools.display.progress import Staged
from peraxis_tools.process.heap import trim_heap

__all__ = ["LayerwiseCalibration"]

_TIED_INPUT_WEIGHT: Final = 0.5  # weight of a tied table's error as an embedding, relative to that as the head


class LayerwiseCalibration:
    """One run over all blocks. `fitted` grows during the run; every finished part is in the work folder."""

    def __init__(
        self,
        *,
        plan: Plan,
        base: Safetensors,
        fine_tuned: Safetensors,
        teacher: LayerwiseModel,
        student: LayerwiseModel,
        names: NameMap,
        batches: Sequence[TokenBatch],
        crossed: bool,
        options: FitOptions,
        work: WorkFolder,
        processes: Processes,
        hidden_limit: int,
        progress: Staged,
    ) -> None:
        self.teacher, self.student = teacher, student
        self.names, self.options, self.work, self.processes = names, options, work, processes
        places = processes.shard_indices(len(batches))
        # A process without a batch runs the first one, so that it takes part in every step, and adds nothing.
        self.text = TextBatches(every=batches, places=places or [0], crossed=crossed, idle=not places)
        self.modules = {module.name: module for module in plan.modules}
        self.fitted: dict[str, FittedModule] = {}
        self.weights = Weights(
            plan=plan, base=base, fine_tuned=fine_tuned, names=names, fitted=self.fitted, device=student.device
        )
        self._hidden = [
            SpilledTensors(work.path, f"hidden-{label}-{processes.rank}", limit=hidden_limit // 2)
            for label in ("teacher", "student")
        ]
        self._both = tuple(zip(self._hidden, (teacher, student), strict=True))
        self._limit = hidden_limit
        self._progress = progress
        self.device = student.device

    @torch.no_grad()
    def run(self) -> dict[str, FittedModule]:
        """Fit every module with signs in the plan. Returns the modules by name."""
        blocks = len(self.student)
        self._take(self._part("embedding", self._fit_tables))
        for hidden, (model, source) in zip(self._hidden, self._sources(), strict=True):  # one table at a time
            trim_heap()
            self.weights.fill_outer(model, source)
            for i, batch in enumerate(self.text.batches):
                hidden[i] = model.embed(batch.ids)
            if not (model.is_tied and self._heads()):  # a head that is fitted last needs its weights
                model.free_embedding()
        trim_heap()
        for index in range(blocks):
            self._progress("fit", index, blocks + 1)
            self._block(index)
        self._progress("fit", blocks, blocks + 1)
        self._take(self._part("head", self._fit_head))
        self._progress("fit", blocks + 1, blocks + 1)
        return self.fitted

    def _sources(self) -> tuple[tuple[LayerwiseModel, Callable[[str], Tensor]], ...]:
        return (self.teacher, self.weights.teacher), (self.student, self.weights.student)

    def _block(self, index: int) -> None:
        """Fill a block of both sides, fit it or load it from the work folder, and compute the next hidden states."""
        part = f"block-{index:05d}"
        finished = self._finished(part)
        self._take(finished or [])
        for model, source in self._sources():
            self.weights.fill(model, source, model.layer_parameters(index))
        if finished is None:
            self._save(part, self._fit_block(index))
        else:
            self._advance(index)
        for model in (self.teacher, self.student):
            model.empty(index)

    def _part(self, part: str, fit: Callable[[], list[FittedModule]]) -> list[FittedModule]:
        """A part from the work folder; if it is not there, it is fitted and saved."""
        modules = self._finished(part)
        if modules is None:
            modules = fit()
            self._save(part, modules)
        return modules

    def _finished(self, part: str) -> list[FittedModule] | None:
        return self.processes.broadcast(self.work.load(part) if self.processes.is_main_process else None)

    def _save(self, part: str, modules: Sequence[FittedModule]) -> None:
        if self.processes.is_main_process:
            self.work.save(part, modules)

    def _take(self, modules: Iterable[FittedModule]) -> None:
        """Use these modules for the student's weights from now on."""
        self.fitted.update((module.name, module) for module in modules)

    def _install(self, modules: Iterable[FittedModule]) -> None:
        """Take modules, and write them into the student's running block."""
        modules = list(modules)
        self._take(modules)
        for name in sorted({self.names.by_tensor[module.name].parameter for module in modules}):
            value = self.weights.parameter(name, self.weights.student, self.student)
            if value is not None:
                self.student.write(name, value)

    def _advance(self, index: int) -> None:
        for i, batch in enumerate(self.text.batches):
            for hidden, model in self._both:
                hidden[i] = model.run_layer(index, batch.ids, hidden[i])

    def _signed(self, parameters: Iterable[str]) -> list[tuple[PlannedModule, ParameterSlice]]:
        """The modules with signs whose tensors lie in these parameters, in plan order."""
        wanted = set(parameters)
        return [
            (module, piece)
            for module in self.modules.values()
            if module.encoding is Encoding.SIGN
            and (piece := self.names.by_tensor.get(module.name)) is not None
            and piece.parameter in wanted
        ]

    def _fit_tables(self) -> list[FittedModule]:
        """Fit embeddings for the rows that the text reads; and, without text, tensors that the model does not have."""
        mapped = self.names.by_tensor
        outer = set(self.teacher.outer_parameters())
        done: list[FittedModule] = []
        for module in self.modules.values():
            inside = module.name in mapped and mapped[module.name].parameter not in outer
            if module.encoding is not Encoding.SIGN or module.kind == "lm_head" or inside:
                continue
            fitted = self._fit_embedding(module, mapped[module.name]) if module.name in mapped else []
            note = "" if module.kind in TABLES else "not a parameter of the model: mean |delta|"
            done.extend(fitted or [self._plain(module, note)])
        return done

    def _fit_embedding(self, module: PlannedModule, piece: ParameterSlice) -> list[FittedModule]:
        """Fit the table of input embeddings. Empty if the module is none, or for the paper's fit."""
        self.weights.fill_outer(self.teacher, self.weights.teacher)
        if self.options.adamw_steps:
            return []
        if self.teacher.is_head(piece.parameter):
            return self._fit_tied(piece.parameter)
        whole = piece.index is None and piece.rows is None
        if not (whole and self.teacher.is_embedding(piece.parameter)):
            return []
        counts = self._counts(module.shape[0])
        fitted = self._fit_rows(module, counts[: kept_rows(module)]) if self.processes.is_main_process else None
        return self.processes.all_gather([fitted])

    def _counts(self, rows: int) -> Tensor:
        """How often the text of all processes has each of the first tokens, int64 [rows]."""
        counts = torch.zeros(rows, dtype=torch.int64, device=self.device)
        for batch in () if self.text.idle else self.text.batches:
            counts += torch.bincount(batch.ids.flatten(), minlength=rows)[:rows]
        self.processes.add([counts])
        return counts

    def _fit_rows(self, module: PlannedModule, counts: Tensor) -> FittedModule:
        weights = self.weights

        def delta(rows: slice) -> Tensor:
            return (
                weights.read(weights.fine_tuned, module.name, rows).float()
                - weights.read(weights.base, module.name, rows).float()
            )

        start = self._plain(module, "")
        fitted = fit_table(delta, importance(counts), start.components, signs=self.options.refine)
        return FittedModule(name=module.name, components=fitted.components, report=fitted.report)

    def _fit_tied(self, parameter: str) -> list[FittedModule]:
        """Fit an embedding that is tied to the head, on the inputs of the teacher's head."""
        hidden, text = self._hidden[0], self.text.enough_for(self.teacher.get(parameter).shape[-1])
        for i, batch in enumerate(text.batches):
            hidden[i] = self.teacher.embed(batch.ids)
        for index in range(len(self.teacher)):
            self.weights.fill(self.teacher, self.weights.teacher, self.teacher.layer_parameters(index))
            for i, batch in enumerate(text.batches):
                hidden[i] = self.teacher.run_layer(index, batch.ids, hidden[i])
            self.teacher.empty(index)
            trim_heap()
        # The student's final states are not known yet, so the teacher's are used for both.
        side = self._side(self.teacher, hidden, self.teacher.head, text)
        with self._collector([side, side], [parameter], text, outputs=False) as collector:
            collected = [(stage, collector.collect(stage)) for stage in collector.stages]
        self.teacher.empty_whole()  # a table is large, and `run` fills it again
        trim_heap()
        done: list[FittedModule] = []
        for stage, sums in collected:
            for statistics in sums.values():
                for moments in (statistics.fit, statistics.validation):
                    moments.add_isotropic(_TIED_INPUT_WEIGHT)
            done.extend(self._fit_stage(stage, sums))
        trim_heap()
        return done

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
        """Fit a block's modules, and compute the next hidden states of both sides."""
        local = self.student.layer_parameters(index)
        with ExitStack() as stack:
            sides = [self._side(model, h, stack.enter_context(model.at_layer(index))) for h, model in self._both]
            collector = stack.enter_context(self._collector(sides, local))
            done = [
                self._plain(module, "its input was not seen: mean |delta|")
                for module, _ in self._signed(set(local) - collector.seen)
            ]
            self._install(done)
            for stage in collector.stages:
                fitted = self._fit_stage(stage, collector.collect(stage))
                self._install(fitted)
                done.extend(fitted)
            for i, *outputs in collector.outputs():
                for hidden, output in zip(self._hidden, outputs, strict=True):
                    hidden[i] = output
        return done

    def _side(
        self,
        model: LayerwiseModel,
        hidden: SpilledTensors,
        run: Callable[[Tensor, Tensor], Tensor],
        text: TextBatches | None = None,
    ) -> Side:
        batches = (text or self.text).batches
        return Side(model, lambda i: run(batches[i].ids, hidden[i]))

    def _collector(
        self, sides: Sequence[Side], names: Sequence[str], text: TextBatches | None = None, *, outputs: bool = True
    ) -> MomentsCollector:
        teacher, student = sides
        return MomentsCollector(
            teacher,
            student,
            names,
            text=text or self.text,
            processes=self.processes,
            is_fitted=lambda stage: bool(self._signed(stage.parameters)),
            room=max(0, self._limit - sum(hidden.in_memory for hidden in self._hidden)),
            outputs=outputs,
        )

    def _fit_head(self) -> list[FittedModule]:
        heads = self._heads()
        mapped = [m for m in heads if m.name in self.names.by_tensor]
        done = [self._plain(m, "not a parameter of the model: mean |delta|") for m in heads if m not in mapped]
        if mapped:
            names = sorted({self.names.by_tensor[module.name].parameter for module in mapped})
            sides = [self._side(model, hidden, model.head) for hidden, model in self._both]
            with self._collector(sides, names, outputs=False) as collector:
                for stage in collector.stages:
                    done.extend(self._fit_stage(stage, collector.collect(stage)))
        return done

    def _heads(self) -> list[PlannedModule]:
        return [m for m in self.modules.values() if m.encoding is Encoding.SIGN and m.kind == "lm_head"]

    def _is_table(self, module: PlannedModule) -> bool:
        return module.kind in TABLES and len(module.shape) == 2 and not self.options.adamw_steps

    def _fit_stage(self, stage: Stage, sums: Mapping[Key, Statistics]) -> list[FittedModule]:
        """Fit a stage's modules, each in one process; modules that share an input are fitted together."""
        modules = self._signed(stage.parameters)
        mine = {
            i: OrientedModule.of(*modules[i], self.weights, stage) for i in self.processes.shard_indices(len(modules))
        }
        # Of a table, tokens that the text does not have need no refining.
        used = {i: self._counts(kept_rows(m)) > 0 for i, (m, _) in enumerate(modules) if self._is_table(m)}
        readers: dict[Key, list[tuple[int, int]]] = {}  # by whose sums they use: numbers of modules and batch elements
        for i, oriented in mine.items():
            for e, key in enumerate(oriented.keys):
                readers.setdefault(stage.input_of.get(key, key), []).append((i, e))
        found: dict[tuple[int, int], FittedMatrix] = {}
        for key, places in readers.items():
            matrices = [replace(mine[i].matrix(e, self.options.axes), used=used.get(i)) for i, e in places]
            statistics = sums.get(key) or Statistics.none(matrices[0].base.shape[1], device=self.device)
            fitted = fit_matrices(matrices, statistics=statistics, options=self.options)
            found.update(zip(places, fitted, strict=True))
        return self.processes.all_gather(
            [
                mine[i].module([found[i, e] for e in range(len(mine[i].keys))]) if i in mine else None
                for i in range(len(modules))
            ]
        )
