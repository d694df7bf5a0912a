"""From a transfer's buffer on the device to weights in live storage: numba or numpy on the host, Triton on CUDA.

An engine knows a fixed set of transfers and the pristine base of each live storage; `write` may then be called any
number of times, with any buffer of the right content. Bases and live storages must not move in between.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from peraxis_format.delta import Axis, Encoding, ModuleDelta
from peraxis_format.dtypes import Array, DType
from peraxis_format.ops.rebuild.numpy import have_compiled, reconstruct
from peraxis_format.ops.tensors import storage_array, tensor_view
from peraxis_format.thread_pool import ThreadPool
from peraxis_format.torch.device import Device, require_triton
from peraxis_format.torch.place.shards import ShardView
from peraxis_format.torch.swap.transfer_plan import ModuleSlice, Transfer, piece

__all__ = ["TritonEngine", "Engine", "HostEngine", "engine_for"]

_COMPILED_FROM: Final = 1 << 20  # weights in all; below, numpy is done before numba is imported


class Engine(Protocol):
    """Writes the modules of a transfer into live storage."""

    def write(self, transfer: Transfer, buffer: Tensor) -> None:
        """buffer: the transfer's bytes on the device. On return the work is launched, on the host done."""


class HostEngine:
    """CPU storages. compiled: use numba (default: where it is installed and there is enough to do)."""

    def __init__(
        self,
        transfers: Sequence[Transfer],
        bases: Mapping[ShardView, Tensor],
        *,
        workers: ThreadPool,
        compiled: bool | None = None,
    ) -> None:
        weights = sum(math.prod(slice_.shape) for transfer in transfers for slice_ in transfer.modules)
        self._compiled = have_compiled() and weights >= _COMPILED_FROM if compiled is None else compiled
        self._bases = bases
        self._workers = workers

    def write(self, transfer: Transfer, buffer: Tensor) -> None:
        self._workers.run(self._jobs(transfer, storage_array(buffer)))

    def _jobs(self, transfer: Transfer, buffer: Array) -> Iterator[Callable[[], None]]:
        for slice_ in transfer.modules:
            module = piece(slice_, buffer)
            for part in slice_.views:
                yield from self._part_jobs(module, self._bases[part], part.view)

    def _part_jobs(self, module: ModuleDelta, base: Tensor, live: Tensor) -> Iterator[Callable[[], None]]:
        out = storage_array(live)
        if module.full is not None:
            full = module.full
            yield lambda: np.copyto(out, full)  # SPEC 6.4
        elif self._compiled and live.is_contiguous():
            from peraxis_format.ops.rebuild import numba as fast

            kind = module.dtype
            yield from fast.rebuild_jobs(
                module.components, storage_array(base), out, base_dtype=kind, dtype=kind
            )  # fmt: skip
        else:
            source = storage_array(base)
            yield lambda: np.copyto(out, reconstruct(module, source, compiled=self._compiled))


class TritonEngine:
    """CUDA storages; in Triton's interpreter CPU ones too. One launch a transfer and kind (dtype, alignment).

    The tables that kernels read are made here, once; `write` only launches. A live storage with strides of its own (a
    transposed layout) is rebuilt beside it, then copied; all of them take turns in one buffer.
    """

    def __init__(
        self, transfers: Sequence[Transfer], bases: Mapping[ShardView, Tensor], *, device: torch.device
    ) -> None:
        self._device = device
        self._launches = {transfer: list(_launches(transfer, bases, device)) for transfer in transfers}
        self._copies = {transfer: list(_copies(transfer)) for transfer in transfers}
        strided = {transfer: list(_signs(transfer, contiguous=False)) for transfer in transfers}
        sizes = [part.view.nbytes for items in strided.values() for _, part in items]
        buffer = torch.empty(max(sizes, default=0), dtype=torch.uint8, device=device)
        self._strided = {
            transfer: [_beside(slice_, bases[part], part.view, buffer) for slice_, part in items]
            for transfer, items in strided.items()
        }

    def write(self, transfer: Transfer, buffer: Tensor) -> None:
        with _current(self._device):
            for launch in self._launches[transfer]:
                _launch(launch, buffer)
            for slice_, offset, view in self._copies[transfer]:
                view.copy_(tensor_view(buffer, offset, slice_.entry.dtype, slice_.shape), non_blocking=True)
            for launches, out, view in self._strided[transfer]:
                for launch in launches:
                    _launch(launch, buffer)
                view.copy_(out)


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Kernels are launched on the current device: make it this one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


_Launch: TypeAlias = tuple[int, bool, Tensor, Tensor, Tensor]  # dtype kind, aligned, tiles, records, terms


def _launch(launch: _Launch, buffer: Tensor) -> None:
    from peraxis_format.ops.rebuild import triton as kernels

    kind, aligned, tiles, records, terms = launch
    kernels.apply_kernel[(tiles.numel(),)](
        tiles, records, terms, buffer, KIND=kind, ALIGNED=aligned, ROWS_=kernels.ROWS, COLUMNS_=kernels.COLUMNS,
        num_warps=8,
    )  # fmt: skip


def engine_for(
    transfers: Sequence[Transfer],
    bases: Mapping[ShardView, Tensor],
    *,
    device: Device,
    workers: ThreadPool,
    compiled: bool | None = None,
) -> Engine:
    """The engine of a device. compiled: see HostEngine."""
    if device.torch_device.type == "cpu":
        return HostEngine(transfers, bases, workers=workers, compiled=compiled)
    require_triton()
    return TritonEngine(transfers, bases, device=device.torch_device)


_KINDS: Final = {DType.BF16: 0, DType.F16: 1, DType.F32: 2}


def _copies(transfer: Transfer) -> Iterator[tuple[ModuleSlice, int, Tensor]]:
    for slice_ in transfer.modules:
        if slice_.entry.encoding is Encoding.FULL:
            for part in slice_.views:
                yield slice_, slice_.fields[0].offset, part.view


def _signs(transfer: Transfer, *, contiguous: bool) -> Iterator[tuple[ModuleSlice, ShardView]]:
    """The `sign` modules of a transfer and their storages, of one of the two kinds."""
    for slice_ in transfer.modules:
        if slice_.entry.encoding is Encoding.SIGN:
            yield from ((slice_, part) for part in slice_.views if part.view.is_contiguous() is contiguous)


def _launches(transfer: Transfer, bases: Mapping[ShardView, Tensor], device: torch.device) -> Iterator[_Launch]:
    items = _signs(transfer, contiguous=True)
    yield from _tables([(slice_, bases[part], part.view) for slice_, part in items], device)


def _beside(slice_: ModuleSlice, base: Tensor, view: Tensor, buffer: Tensor) -> tuple[list[_Launch], Tensor, Tensor]:
    """What rebuilds one module in a buffer, where in it, and the live view that it is then copied to."""
    out = tensor_view(buffer, 0, slice_.entry.dtype, slice_.shape)
    return list(_tables([(slice_, base, out)], base.device)), out, view


def _tables(items: Sequence[tuple[ModuleSlice, Tensor, Tensor]], device: torch.device) -> Iterator[_Launch]:
    """(dtype kind, aligned, tiles, records, terms) for each kind of matrix among (module, base, out) triples."""
    grouped: dict[tuple[int, bool], list[tuple[ModuleSlice, Tensor, Tensor]]] = {}
    for slice_, base, out in items:
        d_out, d_in = slice_.shape[-2:]
        aligned = d_in % 8 == 0 and base.data_ptr() % 16 == 0 and out.data_ptr() % 16 == 0
        # A mask begins at a multiple of 64 in the buffer; that of a later batch element only where their size allows.
        aligned = aligned and (len(slice_.shape) == 2 or d_out * d_in % 128 == 0)
        grouped.setdefault((_KINDS[slice_.entry.dtype], aligned), []).append((slice_, base, out))
    for (kind, aligned), members in grouped.items():
        records, terms, tiles = _matrix_rows(members)
        yield (
            kind,
            aligned,
            torch.tensor(tiles, dtype=torch.int32, device=device),
            torch.tensor(records, dtype=torch.int64, device=device),
            torch.tensor(terms, dtype=torch.int64, device=device),
        )


def _matrix_rows(
    members: Sequence[tuple[ModuleSlice, Tensor, Tensor]],
) -> tuple[list[list[int]], list[list[int]], Any]:
    """Records, terms and tiles of rebuild/triton.py: a record for each matrix, so one for each batch element."""
    from peraxis_format.ops.rebuild import triton as kernels

    records: list[list[int]] = []
    terms: list[list[int]] = []
    counts: list[int] = []
    for slice_, base, out in members:
        d_out, d_in = slice_.shape[-2:]
        size = d_out * d_in * base.element_size()
        for e in range(math.prod(slice_.shape[:-2])):
            first = sum(counts)
            records.append(
                [base.data_ptr() + e * size, out.data_ptr() + e * size, d_out, d_in, first, len(terms),
                 len(slice_.entry.components), 0]
            )  # fmt: skip
            terms.extend(_term_rows(slice_, e))
            counts.append(-(-d_out // kernels.ROWS) * -(-d_in // kernels.COLUMNS))
    return records, terms, np.repeat(np.arange(len(counts), dtype=np.int32), counts)


def _term_rows(slice_: ModuleSlice, e: int) -> Iterator[list[int]]:
    offsets = {f.suffix: f.offset for f in slice_.fields}
    d_out, d_in = slice_.shape[-2:]
    for k, component in enumerate(slice_.entry.components):
        row, stride, col = -1, 0, -1
        if component.axis in (Axis.ROW, Axis.ROW_COL):
            row, stride = offsets[f"{k}.row"] + 2 * e * d_out, 1
        elif component.axis is Axis.TENSOR:
            row = offsets[f"{k}.scalar"]
        if component.axis in (Axis.COL, Axis.ROW_COL):
            col = offsets[f"{k}.col"] + 2 * e * d_in
        factor = int(np.float32(2.0**component.exponent).view(np.uint32))
        yield [offsets[f"{k}.mask"] + e * d_out * -(-d_in // 8), row, stride, col, factor]
