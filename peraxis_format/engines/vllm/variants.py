"""The variants of one rank, by vLLM's adapter ids. The least recently used are evicted and read again from their files.

    resident    in the memory of the model's device      at most `resident`, including those of the step
    host        in host memory                            at most `host`
    file        open, so that it can be read again even if it is renamed or removed       at most `files`

On the CPU resident and host are the same memory, and only `host` counts. An evicted variant is read from its file and
all digests are checked. If that fails on one rank, it fails on all of them, and is tried again at the next use.

vLLM's server does not tell its workers that an adapter was unloaded. So of more than `files` variants the least
recently used one is forgotten; if vLLM still has it, its next request adds it again by its path.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import torch
from torch import nn

from peraxis_format.delta import Encoding
from peraxis_format.engines.vllm.bridge import Placement, check_base, check_pads, claim, place, release, together
from peraxis_format.engines.vllm.kept import KeptFile
from peraxis_format.engines.vllm.layers import RankVariant
from peraxis_format.engines.vllm.layout import placed_tensors, plain_tensors, refuse_uncovered, views
from peraxis_format.engines.vllm.loader import check_assets
from peraxis_format.engines.vllm.names import LinearBase, VocabParallelEmbedding, tensor_group
from peraxis_format.engines.vllm.patches import LayerPatch, RankPatch, patch_of
from peraxis_format.engines.vllm.source import open_delta, shown
from peraxis_format.errors import LiveModelError, PxdError
from peraxis_format.reader import DeltaFile

__all__ = ["StoreCounters", "VariantStore"]

T = TypeVar("T")
_FILES: Final = 256
_CLAIMED: Final = "variants are served over these weights; swap the model in another server"


@dataclass(slots=True)
class StoreCounters:
    """The number of reads of variants from their files, and of evictions."""

    reads: int = 0
    evictions: int = 0


@dataclass(slots=True, eq=False, weakref_slot=True)
class VariantStore:
    """Variants by adapter id. resident, host, files: the largest numbers in device memory, in host memory, and of open
    files; files is at least twice the others. caches_prefixes: vLLM keeps keys and values by a variant's name and path,
    so another file under both is refused.
    """

    model: nn.Module
    model_config: Any
    device: torch.device
    resident: int
    host: int
    checks_assets: bool = True
    caches_prefixes: bool = True
    files: int = _FILES
    counters: StoreCounters = field(default_factory=StoreCounters)
    _files: OrderedDict[int, tuple[str, KeptFile]] = field(default_factory=OrderedDict)
    _host: OrderedDict[int, RankVariant] = field(default_factory=OrderedDict)
    _resident: OrderedDict[int, RankVariant] = field(default_factory=OrderedDict)
    _pinned: set[int] = field(default_factory=set)
    _contents: dict[tuple[str, str], str] = field(default_factory=dict)  # name, source -> the content ID served

    def ids(self) -> set[int]:
        """The known adapter ids."""
        return set(self._files)

    def add(self, number: int, name: str, source: str, *, replace: bool = False) -> bool:
        """Check a delta and its base, and load it. Returns whether it was new.

        Raises LiveModelError, PxdError, CheckpointError, OSError, on all ranks; an earlier variant is then kept.
        """
        if number in self._files and not replace:
            self.get(number)
            return False
        group, count = tensor_group()
        with open_delta(source, group=group if count > 1 else None) as file:
            if self.checks_assets:
                check_assets(file, self.model_config)
            self._refuse_other_content(name, source, file)
            refuse_uncovered(self.model, file.manifest)
            _refuse_exact(file)
            placement = place(plain_tensors(self.model), file.manifest, views=views(self.model, file.manifest))
            claim((shard.view for placed in placement.values() for shard in placed), self, _CLAIMED)
            check_base(file, placement, group=group if count > 1 else None)
            variant, kept = self._agreed(lambda: (self._read(name, file, placement), KeptFile(file)))
        self.remove(number)
        self._contents[name, source] = variant.content_id
        self._files[number] = name, kept
        self._keep(number, variant)
        self._forget()
        return True

    def get(self, number: int) -> RankVariant:
        """A variant in device memory, now the most recently used. Raises PxdError, LiveModelError, OSError, on all
        ranks, if it was evicted and cannot be read again.
        """
        self.touch([number])
        if number in self._resident:
            self._resident.move_to_end(number)
            self._host.move_to_end(number)
            return self._resident[number]
        variant = self._host.get(number)
        if variant is None:
            name, kept = self._files[number]

            def read() -> RankVariant:
                with kept.read() as file:
                    return self._read(name, file, None)

            variant = self._agreed(read)
        self._keep(number, variant)
        return self._resident[number]

    def step(self, numbers: Iterable[int]) -> tuple[dict[int, RankVariant], dict[int, Exception]]:
        """The variants of a step, all resident, and the errors of those that could not be read again.

        Raises LiveModelError if they are too many.
        """
        wanted = sorted(set(numbers))
        if len(wanted) > max(self.resident, 1):
            raise LiveModelError(
                f"{len(wanted)} variants in one step, but --max-loras is {self.resident}; start with more"
            )
        # Mark those in memory as used first, so that reading the others does not evict them.
        for number in wanted:
            if number in self._resident:
                self.get(number)
        found: dict[int, RankVariant] = {}
        failed: dict[int, Exception] = {}
        for number in wanted:
            try:
                found[number] = self.get(number)
            except (PxdError, LiveModelError, OSError) as error:
                failed[number] = error
        return found, failed

    def touch(self, numbers: Iterable[int]) -> None:
        """Mark the files of these variants as used, so that adding others does not close them."""
        for number in numbers:
            if number in self._files:
                self._files.move_to_end(number)

    def pin(self, number: int) -> bool:
        """Never evict a variant. Returns whether it is known."""
        if number in self._files:
            self._pinned.add(number)
        return number in self._files

    def remove(self, number: int) -> bool:
        """Remove a variant. Returns whether it was known."""
        for kept in (self._host, self._resident):
            kept.pop(number, None)
        self._pinned.discard(number)
        known = self._files.pop(number, None)
        if known is not None:
            known[1].close()
        return known is not None

    def close(self) -> None:
        """Remove all variants."""
        for number in list(self._files):
            self.remove(number)
        release(self)

    def _keep(self, number: int, variant: RankVariant) -> None:
        self._host[number] = variant
        self._host.move_to_end(number)
        self._resident[number] = variant if self.device.type == "cpu" else _moved(variant, self.device)
        self._resident.move_to_end(number)
        on_cpu = self.device.type == "cpu"
        self._evict(self._resident, max(self.host if on_cpu else self.resident, 1), number)
        self._evict(self._host, max(self.host, 1), number)
        if on_cpu:
            for each in list(self._resident):
                if each not in self._host:
                    del self._resident[each]

    def _refuse_other_content(self, name: str, source: str, file: DeltaFile) -> None:
        if self.caches_prefixes and self._contents.get((name, source), file.content_id) != file.content_id:
            raise LiveModelError(
                f"{shown(source)}: is another file than the one that {name} was loaded from before, and vLLM's prefix "
                "cache would mix both; give the new file another path"
            )

    def _forget(self) -> None:
        most = max(self.files, 2 * self.host, 2 * self.resident)
        for number in list(self._files)[:-most]:
            if number not in self._pinned:
                self.remove(number)

    def _evict(self, kept: OrderedDict[int, RankVariant], most: int, newest: int) -> None:
        for number in list(kept):
            if len(kept) <= most:
                return
            if number not in self._pinned and number != newest:
                del kept[number]
                self.counters.evictions += 1

    def _agreed(self, read: Callable[[], T]) -> T:
        """The result of reading, on all ranks or on none."""
        group, count = tensor_group()
        with together(group, sharded=count > 1):
            return read()

    def _read(self, name: str, file: DeltaFile, placement: Placement | None) -> RankVariant:
        """Read a file's payload for the layers, and check all digests. placement: None if the base was checked."""
        self.counters.reads += 1
        if placement is not None:
            check_pads(file)
        owners = _owners(self.model)
        layers: dict[nn.Module, dict[str, list[RankPatch]]] = {}
        for entry, pieces in placed_tensors(self.model, file.manifest).items():
            if entry not in file or file.entry(entry).encoding is Encoding.SAME:
                continue
            module = file.load(entry)
            for piece in pieces:
                tensor = getattr(piece.module, piece.parameter)
                places = owners[tensor.data_ptr()]
                for layer, parameter in places:
                    _refuse_layer(layer, parameter, entry, tensor.ndim)
                patch = patch_of(module, piece.box, piece.rows)
                for layer, parameter in places:
                    layers.setdefault(layer, {}).setdefault(parameter, []).append(patch)
        return RankVariant(name, file.content_id, layers)


def _refuse_exact(file: DeltaFile) -> None:
    exact = next((entry.name for entry in file.manifest.modules if entry.encoding is Encoding.EXACT), None)
    if exact is not None:
        raise LiveModelError(
            f"{file.path}: {exact} is stored exactly, which variants in one batch cannot use; serve this fine-tune "
            "with a live swap, or from a folder that `peraxis-tools apply` writes"
        )


def _owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Storage -> the layers that have it; tied layers share one."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None and tensor.numel():
                found.setdefault(tensor.data_ptr(), []).append((module, name))
    return found


def _refuse_layer(layer: Any, parameter: str, name: str, dimensions: int) -> None:
    kind = type(layer).__name__
    if isinstance(layer, LinearBase | VocabParallelEmbedding):
        if parameter == "bias" and getattr(layer, "skip_bias_add", False):
            raise LiveModelError(f"{name}: {kind} does not add its bias itself; serve this fine-tune with a live swap")
        if parameter not in ("weight", "bias"):
            raise LiveModelError(f"{name}: {kind} stores it as {parameter}, which variants cannot change")
    elif dimensions > 1:
        raise LiveModelError(f"{name}: {kind} cannot be mixed in one batch; serve this fine-tune with a live swap")


def _moved(variant: RankVariant, device: torch.device) -> RankVariant:
    moved: dict[int, RankPatch] = {}
    layers: dict[nn.Module, LayerPatch] = {}
    for layer, parameters in variant.layers.items():
        layers[layer] = {
            name: [moved.setdefault(id(p), p.to(device)) for p in patches] for name, patches in parameters.items()
        }
    return RankVariant(variant.name, variant.content_id, layers)
