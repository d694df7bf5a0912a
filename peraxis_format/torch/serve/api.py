"""serve: many variants of one model in one batch, over one copy of the base.

    served = serve(model, {"legal": "legal.pxd", "medical": "medical.pxd"})
    with served.using(["legal", None, "medical"]):              # one a sequence; None: the base
        model.generate(**batch)
    served.close()                                              # the model is the base again

The base's weights are never written. A variant takes the memory of its masks (a sixteenth of BF16) and its exact
tensors. Each row gets its own variant's output; docs/loading.md describes the difference to the merged model's.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import TracebackType
from typing import Final, Literal, get_args

import torch
from torch import Tensor, nn

from peraxis_format.arguments import check_choice, check_least, check_path, check_variant, did_you_mean, kind_of
from peraxis_format.delta import Encoding, ModuleDelta
from peraxis_format.errors import BackendError, LiveModelError, located
from peraxis_format.ops.backend import choose
from peraxis_format.ops.rebuild.torch import Scratch, component_tensors
from peraxis_format.ops.tensors import tensor_view
from peraxis_format.reader import DeltaFile
from peraxis_format.thread_pool import ThreadPool
from peraxis_format.torch.device import device_of, require_triton
from peraxis_format.torch.modes import allocates
from peraxis_format.torch.place.binding import check_live, is_sharded
from peraxis_format.torch.place.claims import claim, release
from peraxis_format.torch.place.placement import place
from peraxis_format.torch.place.proof import proven
from peraxis_format.torch.place.shards import Placement, ShardView, Views, storage_key
from peraxis_format.torch.ring import Ring
from peraxis_format.torch.serve.grouped import GroupForward
from peraxis_format.torch.serve.linear import ServedLinear, TorchProducts
from peraxis_format.torch.serve.modules import Patch, Products, ServedEmbedding, ServedModule, State
from peraxis_format.torch.serve.owners import Owners, Where
from peraxis_format.torch.serve.routed import routers
from peraxis_format.torch.serve.rows import Rows
from peraxis_format.torch.swap.payload import check_pads
from peraxis_format.torch.swap.transfer_plan import TRANSFER_LIMIT

__all__ = ["Served", "serve"]

Backend = Literal["auto", "torch", "numba", "triton"]
_INDEX_DTYPES: Final = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_CLAIMED: Final = "the model is being served, so its weights must stay the base; close that `Served` first"


class Served:
    """A model that serves several variants at once. A context manager; `close` makes it an ordinary model again."""

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
        self._closed = False
        self._active = 0
        self._routers = routers(model)
        self._hook = model.register_forward_pre_hook(self._begin, with_kwargs=True)

    @contextlib.contextmanager
    def using(self, variants: str | int | Sequence[str | int | None] | Tensor | None) -> Iterator[None]:
        """Run batches with these variants inside the block, in this thread or task.

        variants: one for each sequence (dimension 0 of the batch), or one for each token of a packed batch. A variant
        is a name, its index in `names`, or None or -1 for the base. Repeat it for beams and repeated sequences. A
        single name outside a list applies to every row. Raises LiveModelError for an unknown variant and after `close`;
        the forward raises it for a batch of another length.
        """
        if self._closed:
            raise LiveModelError("`serve` has been closed: the model is the base; serve it again")
        rows = self._batch_rows(variants)
        with self._within(rows):
            self._active += 1
            try:
                yield
            finally:
                self._active -= 1

    def _batch_rows(self, variants: str | int | Sequence[str | int | None] | Tensor | None) -> Rows:
        if variants is None or isinstance(variants, str | int):
            return Rows((self._id(variants),), every=True)
        if isinstance(variants, Tensor):
            if variants.ndim != 1 or variants.dtype not in _INDEX_DTYPES:
                raise LiveModelError(
                    f"variants as a tensor must be integers [sequences], not {variants.dtype} {list(variants.shape)}"
                )
            variants = variants.tolist()
        given = list(variants)
        if not given:
            raise LiveModelError("an empty batch has no variants; give one for each sequence")
        return Rows(tuple(self._id(v) for v in given))

    @contextlib.contextmanager
    def _within(self, rows: Rows) -> Iterator[None]:
        token = self._rows.set(rows)
        try:
            yield
        finally:
            self._rows.reset(token)

    def _alone(self, variant: int) -> contextlib.AbstractContextManager[None]:
        return self._within(Rows((variant,), every=True))

    def _begin(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """A hook before each forward of the model: compare the batch with the given variants."""
        rows = self._rows.get()
        named = [kwargs.get(name) for name in ("input_ids", "inputs_embeds")]
        given = next((value for value in (*args, *named) if isinstance(value, Tensor) and value.ndim >= 2), None)
        if rows is not None and given is not None:
            rows.begin(given.shape[:-1] if given.is_floating_point() else given.shape)

    def _id(self, variant: object) -> int:
        if variant is None:
            return -1
        if isinstance(variant, str):
            if variant not in self._index:
                hint = did_you_mean(variant, self.names)
                raise LiveModelError(f"no variant {variant!r}; served: {', '.join(self.names)}{hint}")
            return self._index[variant]
        if not isinstance(variant, int) or isinstance(variant, bool):
            raise LiveModelError(
                f"{variant!r} names no variant; give a name, its index in `names`, or None for the base"
            )
        if not -1 <= variant < len(self.names):
            raise LiveModelError(f"no variant {variant}; served: -1 (the base) to {len(self.names) - 1}")
        return variant

    def state(self, module: nn.Module, *, widened: bool = False) -> State:
        """The state of a module, made and attached on first use.

        widened: the module has a tensor in F32 that is BF16 or F16 in the base, so it runs once for each variant.
        """
        if module not in self._states:
            products: Products = TorchProducts(None if self._backend == "auto" else self._backend)
            if self._backend == "triton":
                from peraxis_format.torch.serve.launch import LinearKernels

                products = LinearKernels()
            tokens = getattr(self.model, "get_input_embeddings", lambda: module)()
            self._states[module] = State(
                self._rows.get, self._alone, products, self._scratch, broadcast=module is not tokens
            )
            self._exchange(module, self._states[module], widened=widened)
            if module in self._routers:
                self.state(self._routers[module]).grouped = True
        return self._states[module]

    def _exchange(self, module: nn.Module, state: State, *, widened: bool) -> None:
        kind = type(module)
        if kind is nn.Linear and not widened:
            self._classes[module] = kind
            module.__class__ = ServedLinear
            module.__dict__["peraxis"] = state
        elif isinstance(module, nn.Embedding) and not widened and _looks_up_ids(kind):
            self._classes[module] = kind
            # A subclass keeps its own attributes and methods; only its forward is replaced.
            bases = (ServedEmbedding,) if kind is nn.Embedding else (ServedEmbedding, kind)
            module.__class__ = type("ServedEmbedding", bases, {})
            module.__dict__.update(peraxis=state, peraxis_class=kind)
        else:
            module.__dict__["forward"] = GroupForward(module, state)
            self._classes[module] = kind
            module.__class__ = type(f"Served{kind.__name__}", (ServedModule, kind), {})
            module.__dict__["peraxis"] = state

    def close(self) -> None:
        """Make the model an ordinary one again, with the base's weights. Raises LiveModelError inside `using`."""
        if self._active:
            raise LiveModelError("`close` inside `using`; leave that block first")
        self._closed = True
        self._hook.remove()
        release(self)
        for module in self._states:
            module.__class__ = self._classes[module]
            forward = module.__dict__.get("forward")
            replaced = forward.replaced if isinstance(forward, GroupForward) else None
            for key in ("forward", "peraxis", "peraxis_class"):
                module.__dict__.pop(key, None)
            if replaced is not None:
                module.__dict__["forward"] = replaced
        self._states.clear()
        self._classes.clear()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self.stored:,} bytes"
        return f"<Served: {', '.join(map(repr, self.names)) or 'no variant'}, {state}>"

    def __enter__(self) -> Served:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@allocates()
def serve(
    model: nn.Module,
    variants: Mapping[str, DeltaFile | str | os.PathLike[str]],
    *,
    backend: Backend = "auto",
    views: Views | None = None,
    workers: int | None = None,
) -> Served:
    """Make a live model with the base's weights serve several variants in one batch.

    backend: "triton" (CUDA), "torch" (anywhere), "numba" (CPU), or "auto". views: as in apply_.
    Every delta is checked in full, and the base's bytes once. Raises the errors of apply_, and BackendError; the model
    is then unchanged.
    """
    check_choice("backend", backend, get_args(Backend), error=BackendError)
    check_least("workers", workers, 1, error=LiveModelError)
    if not isinstance(variants, Mapping):
        raise LiveModelError(f"variants is {kind_of(variants)}; pass a mapping, like {{'legal': 'legal.pxd'}}")
    for name, delta in variants.items():
        check_variant(name, error=LiveModelError)
        if not isinstance(delta, DeltaFile):
            check_path(f"variants[{name!r}]", delta, error=LiveModelError)
    _refuse_model(model)
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
                    claim((shard.live for placed in placement.values() for shard in placed), served, _CLAIMED)
                    ring = ring or Ring(device_of(placement))
                    if ring.device.staged:
                        ring.reserve(TRANSFER_LIMIT)
                    with located(file.path):
                        check_live(file.manifest, placement, ring=ring, workers=pool.count)
                    _register(served, index, file, placement)
    except BaseException:
        served.close()
        raise
    return served


def _refuse_model(model: nn.Module) -> None:
    """Raise LiveModelError for a model that is served already, compiled, or sharded."""
    if any(isinstance(module.__dict__.get("peraxis"), State) for module in model.modules()):
        raise LiveModelError("the model is already served; close that `Served` first, or pass all variants at once")
    if any(type(module).__name__ == "OptimizedModule" for module in model.modules()):
        raise LiveModelError("a compiled model cannot be served on the fly; pass the model that was compiled")
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "placements"):
            raise LiveModelError(f"{name}: sharded weights (DTensor) cannot be served on the fly; use VariantSwitch")


def _looks_up_ids(kind: type[nn.Module]) -> bool:
    """Whether a class of embeddings takes only token ids, so that it reads only rows of its table."""
    return len(inspect.signature(kind.forward).parameters) == 2


def _backend(asked: Backend, model: nn.Module) -> Backend:
    """The backend of the whole model, or "auto" if it is chosen for each weight. Raises BackendError."""
    device = "cuda" if any(parameter.is_cuda for parameter in model.parameters()) else "cpu"
    if device == "cuda" and asked in ("auto", "triton"):
        require_triton()
    chosen = choose("signed_matmul", 0, device, None if asked == "auto" else asked)
    return "triton" if chosen == "triton" else asked


def _register(served: Served, index: int, file: DeltaFile, placement: Placement) -> None:
    """Add one variant's patches to the modules that own the parameters."""
    owners = Owners(served.model)
    check_pads(file)
    for shard in (shard for placed in placement.values() for shard in placed if shard.wide is not None):
        for module, _ in owners.of(shard.live)[1]:
            served.state(module, widened=True)
    written = set()  # equal modules of the file may share a storage
    for name in file:
        entry = file.entry(name)
        if entry.encoding is Encoding.SAME:
            continue
        delta = file.load(name)
        exact = _decoded(file, delta, placement[name][0]) if entry.encoding is Encoding.EXACT else None
        served.stored += file.payload_bytes(name) if exact is None else exact.nbytes
        for shard in placement[name]:
            if storage_key(shard.live) in written:
                continue
            written.add(storage_key(shard.live))
            where, found = owners.of(shard.live)
            if not found:
                raise LiveModelError(f"{name}: no module owns its storage; pass rows of a parameter in `views`")
            patch = _patch(delta, shard, where, exact)
            for module, parameter in found:
                if patch.region is not None and isinstance(module, nn.Linear | nn.Embedding):
                    raise LiveModelError(f"{name}: is not whole rows of a {type(module).__name__}; use VariantSwitch")
                served.state(module).patches.setdefault(parameter, {}).setdefault(index, []).append(patch)


def _decoded(file: DeltaFile, delta: ModuleDelta, shard: ShardView) -> Tensor:
    """The new weights of an exact module, checked (SPEC 7.4), on the device of the base."""
    with located(file.path):
        ranges = [new for _, new in proven(file.entry(delta.name), shard.view, delta)]
    return torch.cat(ranges).reshape(delta.shape)


def _patch(delta: ModuleDelta, shard: ShardView, where: Where, exact: Tensor | None = None) -> Patch:
    """exact: the new weights of an exact module."""
    begin, end, region = where
    view = shard.view
    if exact is not None:
        return Patch(begin, end, full=exact.to(view.device), region=region)
    if delta.full is not None:
        raw = torch.frombuffer(bytearray(delta.full.tobytes()), dtype=torch.uint8)
        full = tensor_view(raw, 0, delta.dtype, delta.shape).to(view.device)
        return Patch(begin, end, full=full, region=region)
    batch = tuple(tuple(terms) for terms in component_tensors(delta, view.device))
    if view.ndim == 2:
        return Patch(begin, end, factors=batch[0], region=region, dtype=view.dtype)
    return Patch(begin, end, batch=batch, region=region, dtype=view.dtype)
