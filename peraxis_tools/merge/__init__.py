"""The verb merge: several deltas on one base become one: joined parts, a weighted sum, or a sum fitted into k masks.

A weighted sum keeps every component, with its weight folded in (fold.py gives the error bound). Inputs are sorted by
content ID, so the order of the arguments does not change the file. The manifest records them: `peraxis.inputs` has
content IDs and weights, `peraxis.merge` the method. It imports no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import peraxis_format as pxd
from peraxis_tools.arguments import check_paths, sequence
from peraxis_tools.checkpoints.assets import with_groups
from peraxis_tools.checkpoints.checkpoint import Checkpoint, open_checkpoint
from peraxis_tools.checkpoints.completeness import is_update
from peraxis_tools.deltas.parts import join_parts, refuse_part
from peraxis_tools.deltas.rows import base_rows
from peraxis_tools.deltas.unpacked import UnpackedFile, unpacked
from peraxis_tools.deltas.whole_tensors import full_bytes, note_whole
from peraxis_tools.display.notes import note
from peraxis_tools.display.progress import Progress, watched
from peraxis_tools.display.shown import counted, listed
from peraxis_tools.errors import CheckFailedError, OptionError, ToolError
from peraxis_tools.merge.methods import SUM_MIN, Method, Mixture
from peraxis_tools.merge.modules import MergedModule, merge_module, needs_base, relative_error
from peraxis_tools.outputs.rules import claim_delta
from peraxis_tools.process.parallel import ordered_map

__all__ = ["MergeInput", "MergeResult", "MergedModule", "Method", "Mixture", "merge", "merge_parts"]

# Beyond these, products with scales leave the range of F16 and exponent.
_WEIGHT_MIN, _WEIGHT_MAX = 1e-6, 1e6
_AHEAD_BYTES: Final = 128 << 20
_INPUTS_KEY: Final = "peraxis.inputs"
_MERGE_KEY: Final = "peraxis.merge"
_WHOLE: Final = (
    "at least one input stores each of them exactly; for a smaller file, apply this merge and compress the result"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeInput:
    """One input. path: as it was given. weight: None for a part."""

    path: str
    content_id: str
    weight: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeResult:
    """The result of `merge`. kind: parts, sum (all components kept) or fit. method: mergekit's name; None for parts.
    inputs: in the order given; parts in that of their modules.

    error: ||sum - fit|| / ||sum|| over the fitted modules; 0 if nothing was fitted.
    """

    path: Path
    content_id: str
    kind: str
    method: Method | None
    inputs: tuple[MergeInput, ...]
    bytes: int
    full_bytes: int
    masks_max: int
    error: float
    modules: tuple[MergedModule, ...]


def merge_parts(
    deltas: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress = None,
) -> MergeResult:
    """Join the parts of one delta into the file that was split. A folder means every .pxd in it.

    Raises ToolError, PxdError.
    """
    check_paths(output=output)
    output = Path(output)
    files = _files_of(deltas)
    if not files:
        raise ToolError("no parts to join; pass all parts of one delta")
    with claim_delta(output, overwrite=overwrite, inputs=files):
        manifest, inputs, size = join_parts(files, output, overwrite=overwrite, progress=progress)
    modules = tuple(
        MergedModule(name=m.name, encoding=m.encoding.value, components=len(m.components)) for m in manifest.modules
    )
    names = {_content_id(path): str(path) for path in files}
    ids = tuple(MergeInput(path=names[content_id], content_id=content_id) for content_id in inputs)
    return _result(output, manifest, size, "parts", None, ids, modules)


def _content_id(path: Path) -> str:
    with pxd.open(path) as file:
        return file.content_id


def merge(
    deltas: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    weights: float | Sequence[float],
    mixture: Mixture | None = None,
    masks: int | None = None,
    base: str | Path | None = None,
    name: str | None = None,
    overwrite: bool = False,
    progress: Progress = None,
) -> MergeResult:
    """Write the merge of deltas on one base.

    deltas: files; a folder means every .pxd in it, by name. weights: one for each delta. mixture: the method, by
    default the weighted sum. masks: the number of masks of a module in the result. None keeps all components of a
    weighted sum; for `ties` and `dare` it means the sum of the inputs' masks, at most 8. base: the checkpoint of the
    base. It is needed for exact tensors, except for a sum of equal whole ones (`full`) with weights that sum to 1.
    name: the name of the merged checkpoint. progress: called with numbers of payload bytes of the inputs, or True for a
    bar. The small files (configuration, tokenizer) are those of the input with the largest weight; a note says where
    they differ. Raises CheckFailedError for different bases, ToolError, PxdError, CheckpointError.
    """
    check_paths(output=output)
    check_paths(base=base, optional=True)
    mixture = mixture or Mixture()
    if masks is not None and not 1 <= masks <= pxd.COMPONENTS_MAX:
        raise OptionError(f"masks {masks}: must be 1 to {pxd.COMPONENTS_MAX}")
    output = Path(output)
    paths = _files_of(deltas)
    weights = [weights] if isinstance(weights, int | float) else list(weights)
    _check_weights(paths, weights, mixture)
    with ExitStack() as stack:
        stack.enter_context(claim_delta(output, overwrite=overwrite, inputs=(*paths, base)))
        opened = [stack.enter_context(pxd.open(path)) for path in paths]
        total = sum(file.data_size for file in opened)
        step = stack.enter_context(watched(progress, "merge", total))
        for file in opened:
            refuse_part(file.manifest, file.path)
        _check_compatible(opened)
        pairs = sorted(zip(opened, weights, strict=True), key=lambda pair: (pair[0].content_id, pair[1]))
        files = [file for file, _ in pairs]
        ordered = [float(weight) for _, weight in pairs]
        checkpoint = stack.enter_context(open_checkpoint(base)) if base is not None else None
        files = [unpacked(file, None if checkpoint is None else checkpoint.tensors) for file in files]
        if checkpoint is None:
            _check_no_base_needed(files, ordered, mixture)
        else:
            pxd.check_base_names(files[0].manifest, checkpoint.tensors)
        if masks is None and not mixture.is_sum:
            masks = min(pxd.COMPONENTS_MAX, sum(_masks(file) for file in files))
        with _writer(output, files, ordered, mixture, masks, name, overwrite=overwrite) as writer:
            modules = tuple(_add_all(writer, files, ordered, mixture, masks, checkpoint, step))
            _add_rest(writer, files, ordered, checkpoint)
            manifest = writer.finish()
    inputs = tuple(
        MergeInput(path=str(path), content_id=file.content_id, weight=float(weight))
        for path, file, weight in zip(paths, opened, weights, strict=True)
    )
    note_whole(output, manifest, size=writer.size, reason=_WHOLE)
    if all(module.encoding is pxd.Encoding.SAME for module in manifest.modules):
        note(f"{output}: holds no change, because the weighted sum is the base; check the weights")
    return _result(output, manifest, writer.size, "sum" if masks is None else "fit", mixture.method, inputs, modules)


def _result(
    output: Path,
    manifest: pxd.Manifest,
    size: int,
    kind: str,
    method: Method | None,
    inputs: tuple[MergeInput, ...],
    modules: tuple[MergedModule, ...],
) -> MergeResult:
    error = math.fsum(module.square_error for module in modules)
    return MergeResult(
        path=output,
        content_id=manifest.content_id,
        kind=kind,
        method=method,
        inputs=inputs,
        bytes=size,
        full_bytes=full_bytes(manifest.modules),
        masks_max=max(module.components for module in modules),
        error=relative_error(error, math.fsum(module.square_norm for module in modules)),
        modules=modules,
    )


def _files_of(deltas: str | Path | Sequence[str | Path]) -> list[Path]:
    """These files; a folder means every .pxd in it, by name. Raises ToolError for a folder without one."""
    found: list[Path] = []
    for path in map(Path, sequence(deltas)):
        files = sorted(path.glob("*.pxd")) if path.is_dir() else [path]
        if not files:
            raise ToolError(f"{path}: has no .pxd files; check the name")
        found += files
    return found


def _check_weights(paths: Sequence[str | Path], weights: Sequence[float], mixture: Mixture) -> None:
    if not paths:
        raise ToolError("no deltas to merge; pass at least one")
    if len(weights) != len(paths):
        raise ToolError(f"{counted(len(weights), 'weight')} for {counted(len(paths), 'delta')}; pass one for each")
    if not all(isinstance(weight, int | float) for weight in weights):
        raise OptionError(f"weights {weights!r}: must be numbers, one for each delta")
    odd = [weight for weight in weights if not (weight == 0 or _WEIGHT_MIN <= abs(weight) <= _WEIGHT_MAX)]
    if odd:
        raise ToolError(f"weight {odd[0]:g}: must be 0, or {_WEIGHT_MIN:g} to {_WEIGHT_MAX:g} in magnitude")
    if mixture.normalized and mixture.method != "ties" and abs(math.fsum(weights)) <= SUM_MIN:
        # `ties` divides by the weights of the elected sign alone, whose sum is not 0.
        shown = ", ".join(f"{weight:g}" for weight in weights)
        raise OptionError(f"weights {shown}: their sum is 0; pass normalize=False (--no-normalize)")


def _masks(file: pxd.DeltaFile) -> int:
    return max(len(module.components) for module in file.manifest.modules)


def _check_compatible(files: Sequence[pxd.DeltaFile]) -> None:
    """Raise CheckFailedError unless all deltas are on one base and have the same tensors."""
    first = files[0]
    for file in files[1:]:
        pair = f"{first.path} and {file.path}"
        if sorted(file) != sorted(first):
            odd = min(set(file) ^ set(first))
            raise ToolError(
                f"{pair}: do not have the same tensors, for example {odd}; only deltas of one model can be merged"
            )
        for name in first:
            a, b = first.entry(name), file.entry(name)
            if a.base != b.base:
                raise CheckFailedError(
                    f"{pair}: made for different bases ({first.manifest.base.id!r} and {file.manifest.base.id!r} "
                    f"differ at {name}); only deltas on one base can be merged"
                )
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                raise ToolError(f"{pair}: {name} has another shape or dtype; only deltas of one model can be merged")
        if (file.manifest.tied, file.manifest.dropped) != (first.manifest.tied, first.manifest.dropped):
            raise ToolError(f"{pair}: tie or drop different tensors; only deltas of one model can be merged")


def _check_no_base_needed(files: Sequence[pxd.DeltaFile], weights: Sequence[float], mixture: Mixture) -> None:
    """Raise ToolError before any work if a module needs the base; the manifests alone show that."""
    unpacking = any(isinstance(file, UnpackedFile) for file in files)
    for entry in files[0].manifest.modules:
        if unpacking or needs_base([file.entry(entry.name) for file in files], weights, mixture):
            raise ToolError(
                f"{entry.name}: is an exact tensor, and merging its delta needs the base; pass base (--base), "
                f"which is {files[0].manifest.base.id!r}"
            )


def _writer(
    output: Path,
    files: Sequence[pxd.DeltaFile],
    weights: Sequence[float],
    mixture: Mixture,
    masks: int | None,
    name: str | None,
    *,
    overwrite: bool,
) -> pxd.DeltaWriter:
    first = files[0].manifest
    calibrations = {file.manifest.calibration for file in files}
    names = [file.manifest.fine_tuned.id for file in files]
    terms = " + ".join(f"{weight:g} * {its}" for weight, its in zip(weights, names, strict=True))
    inputs = [{"content_id": f.content_id, "weight": repr(w)} for f, w in zip(files, weights, strict=True)]
    return pxd.DeltaWriter(
        output,
        base=pxd.Identity(id=first.base.id, revision=first.base.revision),
        fine_tuned=pxd.Identity(id=name or terms),
        calibration=calibrations.pop() if len(calibrations) == 1 else None,
        metadata={_INPUTS_KEY: json.dumps(inputs), _MERGE_KEY: json.dumps(_how(mixture, masks), sort_keys=True)},
        overwrite=overwrite,
    )


def _how(mixture: Mixture, masks: int | None) -> dict[str, Any]:
    how: dict[str, Any] = {"method": mixture.method, "masks": masks, "normalize": mixture.normalized}
    if not mixture.is_sum:
        how["density"] = repr(mixture.density)
    if mixture.method == "dare":
        how["seed"] = mixture.seed
    return how


def _add_all(
    writer: pxd.DeltaWriter,
    files: Sequence[pxd.DeltaFile],
    weights: Sequence[float],
    mixture: Mixture,
    masks: int | None,
    checkpoint: Checkpoint | None,
    progress: Callable[[int], None],
) -> list[MergedModule]:
    def work(entry: pxd.ModuleEntry) -> tuple[pxd.ModuleDelta, MergedModule]:
        rows = base_rows(checkpoint.tensors, entry) if checkpoint is not None and entry.base is not None else None
        return merge_module(
            [file.load(entry.name) for file in files],
            weights,
            mixture=mixture,
            masks=masks,
            base=rows,
            keys=[f"{file.content_id} {entry.name}" for file in files],
        )

    def size(entry: pxd.ModuleEntry) -> int:
        return sum(file.payload_bytes(entry.name) for file in files)

    merged = []
    # Inputs and results take about twice the inputs' bytes.
    for entry, (module, found) in zip(
        files[0].manifest.modules,
        ordered_map(work, files[0].manifest.modules, cost=lambda entry: 2 * size(entry), budget=_AHEAD_BYTES),
        strict=True,
    ):
        writer.add(module)
        merged.append(found)
        progress(size(entry))
    return merged


def _add_rest(
    writer: pxd.DeltaWriter, files: Sequence[pxd.DeltaFile], weights: Sequence[float], base: Checkpoint | None
) -> None:
    """Add aliases and dropped names, and the assets of the input with the largest weight; note those that differ.

    An update has only the assets that changed. The merge is no update, so it gets the others of the base.
    """
    manifest = files[0].manifest
    main = max(zip(files, weights, strict=True), key=lambda pair: pair[1])[0]
    taken = set(main.manifest.assets)
    odd = sorted({asset.path for file in files for asset in taken ^ set(file.manifest.assets)})
    if odd:
        note(f"{writer.path}: the inputs differ in {listed(odd)}; the small files of {main.path} are taken")
    assets = {asset.path: main.asset(asset.path) for asset in main.manifest.assets}
    if is_update(main.manifest) and base is not None:
        assets = with_groups(dict(base.assets(checked=False)), assets)
    writer.add_rest(tied=manifest.tied, dropped=manifest.dropped, assets=assets.items())
