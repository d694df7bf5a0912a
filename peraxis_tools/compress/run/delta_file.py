"""Write the file of a compression: its modules, its small files, its metadata."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from peraxis_format import DeltaWriter, Encoding, Manifest
from peraxis_format import open as open_delta
from peraxis_tools.checkpoints.assets import LEFT_BEHIND
from peraxis_tools.checkpoints.checkpoint import Checkpoint
from peraxis_tools.compress.options import CompressOptions
from peraxis_tools.compress.plan.budget import target_of
from peraxis_tools.compress.plan.plan import Plan, PlannedModule
from peraxis_tools.compress.plan.record import PLAN_KEY, plan_text, report_text
from peraxis_tools.compress.plan.saving import check_saving, saves
from peraxis_tools.compress.run.module_delta import EncodedModule, module_delta
from peraxis_tools.compress.run.types import ModuleReport, RunFit
from peraxis_tools.deltas.blocks import count_blocks
from peraxis_tools.deltas.metadata_keys import CONFIG_KEY, REPORT_KEY
from peraxis_tools.display.notes import note
from peraxis_tools.display.progress import Staged
from peraxis_tools.display.shown import counted
from peraxis_tools.process.parallel import ordered_map

__all__ = ["WrittenDelta", "read_delta", "write_delta"]

# A tensor in work takes its own bytes, its base's, and twice that in binary32 if a second mask is fitted.
_BYTES_IN_FLIGHT_PER_TENSOR: Final = 4  # times its own bytes
_AHEAD_BYTES: Final = 512 << 20
_EXACT_SAVING: Final = 0.2  # the share of a file that exact tensors would save, from which a note says so


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenDelta:
    """A written file. size: its bytes. blocks: those of exact modules by mode (SPEC 5.6). notes: by module."""

    manifest: Manifest
    size: int
    blocks: Mapping[str, int]
    notes: Mapping[str, str]


@dataclass(slots=True, kw_only=True)
class _Stored:
    """What is known of the stored modules. savings: bytes that `exact` would save, of modules that it would help."""

    reports: dict[str, ModuleReport] = field(default_factory=dict)
    blocks: Counter[str] = field(default_factory=Counter)
    savings: list[int] = field(default_factory=list)

    def add(self, module: EncodedModule) -> None:
        self.blocks += count_blocks(module.delta)
        if module.exact_saving:
            self.savings.append(module.exact_saving)
        if module.report is not None:
            self.reports[module.delta.name] = module.report


def write_delta(
    base: Checkpoint,
    fine_tuned: Checkpoint,
    fit: RunFit,
    output: Path,
    options: CompressOptions,
    progress: Staged,
    *,
    overwrite: bool,
    force: bool,
) -> WrittenDelta:
    """Write the file. Raises ToolError if it saves too little, unless `force`."""
    planned = fit.plan
    with DeltaWriter(
        output,
        base=base.identity,
        fine_tuned=fine_tuned.identity,
        calibration=fit.calibration,
        overwrite=overwrite,
    ) as writer:
        stored = _add_modules(writer, base, fine_tuned, fit, options, progress)
        writer.add_rest(tied=planned.tied, dropped=planned.dropped, assets=fine_tuned.assets())
        _add_metadata(writer, fit, options)
        _add_report(writer, planned, stored.reports, target_of(planned, options))
        _note_exact(stored.savings, writer.file_size(), options)
        if saves(planned, planned.file_bytes or 0):  # otherwise the note was made, and it is forced
            check_saving(planned, base, fine_tuned, size=writer.file_size(), force=force)
        for checkpoint in (base, fine_tuned):
            checkpoint.tensors.check_unchanged()
        manifest = writer.finish()
    return WrittenDelta(manifest=manifest, size=writer.size, blocks=stored.blocks, notes=_notes(stored.reports))


def read_delta(output: Path, fit: RunFit) -> WrittenDelta:
    """Return what `write_delta` returned in the process that wrote the file, for another process of the run."""
    with open_delta(output) as delta:
        exact = [entry.name for entry in delta.manifest.modules if entry.encoding is Encoding.EXACT]
        blocks = sum((count_blocks(delta.load(name)) for name in exact), Counter[str]())
        notes = _notes({name: module.report for name, module in fit.modules.items()})
        return WrittenDelta(manifest=delta.manifest, size=delta.size, blocks=blocks, notes=notes)


def _notes(reports: Mapping[str, ModuleReport]) -> dict[str, str]:
    return {name: report.note for name, report in reports.items() if report.note}


def _add_modules(
    writer: DeltaWriter,
    base: Checkpoint,
    fine_tuned: Checkpoint,
    fit: RunFit,
    options: CompressOptions,
    progress: Staged,
) -> _Stored:
    """Add the modules of the plan in order; one tensor is read and hashed while another is fitted."""
    stored, done, total = _Stored(), 0, fit.plan.full_bytes

    def made(module: PlannedModule) -> EncodedModule:
        return module_delta(module, base.tensors, fine_tuned.tensors, fit.modules.get(module.name), options)

    def in_flight(module: PlannedModule) -> int:
        return _BYTES_IN_FLIGHT_PER_TENSOR * fine_tuned.tensors[module.name].size

    for module in ordered_map(made, fit.plan.modules, cost=in_flight, budget=_AHEAD_BYTES):
        writer.add(module.delta)
        stored.add(module)
        done += fine_tuned.tensors[module.delta.name].size
        progress("write", done, total)
    return stored


def _add_metadata(writer: DeltaWriter, fit: RunFit, options: CompressOptions) -> None:
    if fit.plan.left_behind:
        writer.metadata[LEFT_BEHIND] = fit.plan.left_behind
    writer.metadata[CONFIG_KEY] = options.canonical_json()
    writer.metadata[PLAN_KEY] = plan_text(fit.plan)
    writer.metadata.update(fit.metadata)


def _note_exact(savings: Sequence[int], size: int, options: CompressOptions) -> None:
    """Note where exact tensors would save a good part of the file. savings: of modules that they would make smaller."""
    if sum(savings) >= _EXACT_SAVING * size:
        how = "--exact auto, without a target" if options.has_target else "--exact auto"
        found = f"{counted(len(savings), 'tensor')} changed only in part"
        note(f"{found}; exact ({how}) would store them without loss, in about {sum(savings)} bytes less")


def _add_report(writer: DeltaWriter, planned: Plan, reports: Mapping[str, ModuleReport], target: int | None) -> None:
    """Add the report of the fit; without its notes, or not at all, where the file would exceed the target.

    The plan knows the size of the errors, but not which modules will have a note.
    """
    names = [module.name for module in planned.modules]
    lines = {n: (r.error, r.error_none, r.error_same, r.note) for n, r in reports.items()}
    whole = report_text(names, lines)
    for said in (whole, report_text(names, {n: (*line[:3], "") for n, line in lines.items()}), ""):
        writer.metadata.pop(REPORT_KEY, None)
        if said:
            writer.metadata[REPORT_KEY] = said
        if target is None or writer.file_size() <= target:
            break
    else:
        note(f"{writer.path}: {writer.file_size()} bytes, above the target of {target}")
    if said != whole:
        note(f"{writer.path}: the report of the fit lacks its notes or is left out, to keep the file within the target")
