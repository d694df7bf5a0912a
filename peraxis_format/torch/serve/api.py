"""serve: many variants of one model in one batch, over one copy of the base.

    served = serve(model, {"legal": "legal.pxd", "medical": "medical.pxd"})
    with served.using(["legal", None, "medical"]):              # one a sequence; None: the base
        model.generate(**batch)
    served.close()                                              # the model is an ordinary one again

The base's weights are never written. A variant costs its masks (a sixteenth of BF16) and its exact tensors. What a row
gets is its own variant's output; how that differs from the merged model's is said in docs/loading.md.
"""

from __future__ import annotations

import contextlib
import math
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import TracebackType
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from peraxis_format.delta import Encoding, ModuleDelta
from peraxis_format.errors import DeviceError, LiveModelError
from peraxis_format.ops.rebuild.torch import Scratch, factors_of
from peraxis_format.ops.tensors import tensor_view
from peraxis_format.reader import DeltaFile
from peraxis_format.thread_pool import ThreadPool
from peraxis_format.torch.device import device_of, require_triton
from peraxis_format.torch.place.binding import check_live, is_sharded
from peraxis_format.torch.place.placement import place
from peraxis_format.torch.place.shards import Placement, Views
from peraxis_format.torch.ring import Ring
from peraxis_format.torch.serve.linear import ServedLinear, TorchProducts
from peraxis_format.torch.serve.modules import GroupForward, Patch, Products, ServedEmbedding, State
from peraxis_format.torch.serve.rows import Rows
from peraxis_format.torch.swap.payload import check_pads
from peraxis_format.torch.swap.transfer_plan import TRANSFER_LIMIT

__all__ = ["Served", "serve"]

Backend = Literal["auto", "torch", "triton"]


class Served:
    """A model that serves several variants at once. A context manager; `close` puts the model back."""

    def __init__(self, model: nn.Module, names: Sequence[str], backend: Backend) -> None:
        self.model = model
        self.names = tuple(names)
        self.stored = 0
        self._index = {name: i for i, name in enumerate(names)}
        self._rows: ContextVar[Rows | None] = ContextVar("peraxis_rows", default=None)
        self._states: dict[nn.Module, State] = {}
        self._classes: dict[nn.Module, type[nn.Module]] = {}
        self._backend = backend
        self._scratch = Scratch()

    @contextlib.contextmanager
    def using(self, variants: Sequence[str | int | None] | Tensor) -> Iterator[None]:
        """Within the block (and this thread or task) batches are of these variants.

        variants: one a sequence (dimension 0 of the batch), or one a token row of a slice_ batch; a name, its index in
        `names`, or None or -1 for the base. Beams and repeated sequences have to be repeated here too.
        """
        given = variants.tolist() if isinstance(variants, Tensor) else list(variants)
        if not given:
            raise LiveModelError("an empty batch has no variants; give one a sequence")
        token = self._rows.set(Rows(tuple(self._id(v) for v in given)))
        try:
            yield
        finally:
            self._rows.reset(token)

    def _id(self, variant: str | int | None) -> int:
        if variant is None:
            return -1
        if isinstance(variant, str):
            if variant not in self._index:
                raise LiveModelError(f"no variant {variant!r}; served: {', '.join(self.names)}")
            return self._index[variant]
        if not -1 <= variant < len(self.names):
            raise LiveModelError(f"no variant {variant}; served: -1 (the base) to {len(self.names) - 1}")
        return int(variant)

    def state(self, module: nn.Module) -> State:
        """The state of a module, made and put in its place when first asked for."""
        if module not in self._states:
            products: Products = TorchProducts()
            if self._backend == "triton":
                from peraxis_format.torch.serve.launch import LinearKernels

                products = LinearKernels()
            tokens = getattr(self.model, "get_input_embeddings", lambda: module)()
            self._states[module] = State(self._rows.get, products, self._scratch, broadcast=module is not tokens)
            self._exchange(module, self._states[module])
        return self._states[module]

    def _exchange(self, module: nn.Module, state: State) -> None:
        kind = type(module)
        if kind is nn.Linear:
            self._classes[module] = kind
            module.__class__ = ServedLinear
            module.__dict__["peraxis"] = state
        elif isinstance(module, nn.Embedding):
            self._classes[module] = kind
            # A subclass keeps its own attributes and methods behind the exchanged forward.
            bases = (ServedEmbedding,) if kind is nn.Embedding else (ServedEmbedding, kind)
            module.__class__ = type("ServedEmbedding", bases, {})
            module.__dict__.update(peraxis=state, peraxis_class=kind)
        else:
            module.__dict__["forward"] = GroupForward(module, state)

    def close(self) -> None:
        """Make the model an ordinary one again, with the base's weights."""
        for module in self._states:
            kind = self._classes.get(module)
            if kind is None:
                del module.__dict__["forward"]
                continue
            module.__class__ = kind
            module.__dict__.pop("peraxis")
            module.__dict__.pop("peraxis_class", None)
        self._states.clear()
        self._classes.clear()

    def __enter__(self) -> Served:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@torch.no_grad()
def serve(
    model: nn.Module,
    variants: Mapping[str, DeltaFile | str | os.PathLike[str]],
    *,
    backend: Backend = "auto",
    views: Views | None = None,
    workers: int | None = None,
) -> Served:
    """Let a live model that holds the base serve variants of it, mixed in one batch.

    backend: "triton" (CUDA), "torch" (anywhere), "auto". views: see placement.place. Every delta is checked in full,
    and the base's bytes once. Raises as apply_ does; the model is then as it was.
    """
    if any(isinstance(module.__dict__.get("peraxis"), State) for module in model.modules()):
        raise LiveModelError("the model is served already; close that first, or give all variants at once")
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "placements"):
            raise LiveModelError(f"{name}: sharded weights (DTensor) cannot be served on the fly; use VariantSwitch")
    served = Served(model, list(variants), _backend(backend, model))
    try:
        ring: Ring | None = None
        with ThreadPool(workers) as pool:
            for index, delta in enumerate(variants.values()):
                with contextlib.ExitStack() as stack:
                    file = delta if isinstance(delta, DeltaFile) else stack.enter_context(DeltaFile(delta))
                    placement = place(model, file.manifest, views=views)
                    if is_sharded(placement, file.manifest):
                        raise LiveModelError("pieces of weights cannot be served on the fly; use VariantSwitch")
                    ring = ring or Ring(device_of(placement))
                    if ring.device.staged:
                        ring.reserve(TRANSFER_LIMIT)
                    check_live(file.manifest, placement, ring=ring, workers=pool.count)
                    _register(served, index, file, placement)
    except BaseException:
        served.close()
        raise
    return served


def _backend(asked: Backend, model: nn.Module) -> Backend:
    cuda = any(parameter.is_cuda for parameter in model.parameters())
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if asked == "triton" and not cuda and not interpreted:
        raise DeviceError('backend="triton" needs a model on a CUDA device; use "torch" on the CPU')
    chosen: Backend = asked if asked != "auto" else ("triton" if cuda else "torch")
    if chosen == "triton":
        require_triton()
    return chosen


def _register(served: Served, index: int, file: DeltaFile, placement: Placement) -> None:
    """Bring one variant's patches to the modules that own the parameters."""
    owners = _Owners(served.model)
    check_pads(file)
    for name in file:
        entry = file.entry(name)
        if entry.encoding is Encoding.SAME:
            continue
        delta = file.load(name)
        begin, end = file.span(name)
        served.stored += end - begin
        for part in placement[name]:
            where, found = owners.of(part.view)
            if not found:
                raise LiveModelError(f"{name}: no module owns its storage; give rows of a parameter in `views`")
            patch = _patch(delta, part.view, where)
            for module, parameter in found:
                if patch.region is not None and isinstance(module, nn.Linear | nn.Embedding):
                    raise LiveModelError(f"{name}: lies across rows of a {type(module).__name__}; use VariantSwitch")
                served.state(module).patches.setdefault(parameter, {}).setdefault(index, []).append(patch)


_Where: TypeAlias = tuple[int, int, tuple[tuple[int, ...], tuple[int, ...], int] | None]  # Patch: begin, end, region


def _patch(delta: ModuleDelta, view: Tensor, where: _Where) -> Patch:
    begin, end, region = where
    if delta.full is not None:
        raw = torch.frombuffer(bytearray(delta.full.tobytes()), dtype=torch.uint8)
        full = tensor_view(raw, 0, delta.dtype, delta.shape).to(view.device)
        return Patch(begin, end, full=full, region=region)
    batch = tuple(tuple(terms) for terms in factors_of(delta, view.device))
    if view.ndim == 2:
        return Patch(begin, end, terms=batch[0], region=region)
    return Patch(begin, end, batch=batch, region=region)


class _Owners:
    """Which modules own a storage: all that hold the parameter (tied ones are several), and which stretch of it."""

    def __init__(self, model: nn.Module) -> None:
        by_storage: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None and tensor.numel():
                    by_storage.setdefault(tensor.data_ptr(), []).append((module, name))
        self._begins = sorted(by_storage)
        self._owners = by_storage

    def of(self, view: Tensor) -> tuple[_Where, list[tuple[nn.Module, str]]]:
        """(where, owners) of a view into a parameter; no owners where there is none."""
        at = view.data_ptr()
        place = bisect_right(self._begins, at) - 1
        if place < 0:
            return (0, 0, None), []
        begin = self._begins[place]
        owners = self._owners[begin]
        tensor: Tensor = getattr(*owners[0])
        offset = (at - begin) // tensor.element_size()
        if offset >= tensor.numel():
            return (0, 0, None), []
        row = math.prod(tensor.shape[1:])
        if view.shape[1:] == tensor.shape[1:] and view.is_contiguous() and tensor.is_contiguous() and offset % row == 0:
            first = offset // row
            return (first, first + (view.shape[0] if view.ndim else 1), None), owners
        return (0, 0, (tuple(view.shape), view.stride(), offset)), owners
