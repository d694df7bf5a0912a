"""Record which parameter reads which input, from the operations themselves; no list of architectures is needed.

A linear layer, however it is written (nn.Linear, GPT-2's Conv1D, an expert's slice of a fused 3-D tensor, a tied
lm_head, an einsum), ends in one of a few matrix products of ATen. A TorchDispatchMode looks at their
operands. If one is a view of a known parameter's storage, then its storage offset gives the batch element (expert) and
its strides show whether the parameter is transposed. The other operand is the input.

    stored [d_out, d_in], used as X W^T   (nn.Linear)          transposed = False
    stored [d_in, d_out], used as X W     (Conv1D, some experts)   transposed = True

The mode intercepts every operation of a pass, which costs as much as a small model's own arithmetic. If the first pass
shows that all relevant products are those of nn.Linear layers, hooks on these layers replace the mode (Watch).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Call", "RecordedPass", "Observer", "StopForward", "Watch", "discover"]

_aten = torch.ops.aten
# op -> (position of the left operand, position of the right operand, whether the right one is [d_out, d_in])
_PRODUCTS: dict[Any, tuple[int, int, bool]] = {
    _aten.mm.default: (0, 1, False),
    _aten.bmm.default: (0, 1, False),
    _aten.matmul.default: (0, 1, False),
    _aten.addmm.default: (1, 2, False),
    _aten.baddbmm.default: (1, 2, False),
    _aten.linear.default: (0, 1, True),
}


class StopForward(Exception):  # noqa: N818 - control flow, not an error
    """A callback raises this to end a forward pass early; it carries a value."""

    def __init__(self, value: Any = None) -> None:
        super().__init__()
        self.value = value


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One product of an input with (a batch element of) a parameter.

    inputs: [n, d_in]. index: () for a 2-D parameter, (e,) for batch element e of a 3-D one.
    """

    parameter: str
    index: tuple[int, ...]
    transposed: bool
    inputs: Tensor

    @property
    def source(self) -> tuple[int, int, int]:
        """Identifies the input's memory; calls with one source share their moments. Valid while the input lives."""
        inputs = self.inputs
        return inputs.untyped_storage().data_ptr(), int(inputs.storage_offset()), inputs.numel()


class Observer(TorchDispatchMode):
    """While active, reports each Call on one of `parameters` (2-D or 3-D, contiguous) before it is computed."""

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], callback: Callable[[Call], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own mode has no annotations
        self._known = {p.untyped_storage().data_ptr(): (name, p) for name, p in parameters if p.dim() in (2, 3)}
        self._callback = callback

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = _PRODUCTS.get(func)
        if found is not None and len(args) > found[1]:
            left, right, linear = args[found[0]], args[found[1]], found[2]
            for call in self._calls(left, right.transpose(-1, -2) if linear else right):
                self._callback(call)
        return func(*args, **(kwargs or {}))

    def _calls(self, left: Tensor, right: Tensor) -> Iterable[Call]:
        """The calls of one product left @ right. right: [..., d_in, d_out]. W @ X^T is treated as X @ W^T."""
        known = self._known.get(right.untyped_storage().data_ptr())
        if known is None:
            known = self._known.get(left.untyped_storage().data_ptr())
            if known is None:
                return
            left, right = right.transpose(-1, -2), left.transpose(-1, -2)
        name, parameter = known
        rows, cols = parameter.shape[-2:]
        # right = W^T of a stored [d_out, d_in]: the stored last dimension (stride 1) is right's second to last.
        for transposed, shape, strides in (
            (False, (cols, rows), (1, cols)),
            (True, (rows, cols), (cols, 1)),
        ):
            if tuple(right.shape[-2:]) == shape and tuple(right.stride()[-2:]) == strides:
                yield from _split(name, parameter, left, right, transposed=transposed)
                return


def _split(name: str, parameter: Tensor, left: Tensor, right: Tensor, *, transposed: bool) -> Iterable[Call]:
    matrix = parameter.shape[-2] * parameter.shape[-1]
    first, remainder = divmod(int(right.storage_offset() - parameter.storage_offset()), matrix)
    if remainder:
        return
    if parameter.dim() == 2:
        # A matmul that does not fold its batch dimensions expands W over them (stride 0); this is still one matrix.
        yield Call(name, (), transposed, left.reshape(-1, left.shape[-1]))
    elif right.dim() == 2:
        yield Call(name, (first,), transposed, left.reshape(-1, left.shape[-1]))
    elif right.dim() == 3 and left.dim() == 3 and right.stride(0) == matrix:
        for e in range(right.shape[0]):
            yield Call(name, (first + e,), transposed, left[e])


@dataclass(frozen=True, slots=True)
class RecordedPass:
    """The record of one pass: every call in order, its output (None if it was stopped), and the parameters whose calls
    hooks saw completely.
    """

    calls: list[Call]
    output: Tensor | None
    hooked: frozenset[str]


def discover(
    run: Callable[[], Tensor],
    parameters: Mapping[str, Tensor],
    owners: Mapping[str, nn.Module],
    *,
    to_the_end: bool = True,
) -> RecordedPass:
    """Run a pass under an Observer and with hooks. owners: the module of each parameter.

    to_the_end: False stops before the last parameter's product.
    """
    calls: list[Call] = []
    hooked: list[Call] = []
    missing = set(parameters)

    def see(call: Call) -> None:
        calls.append(call)
        missing.discard(call.parameter)
        if not missing and not to_the_end:
            raise StopForward

    plain = {
        name: owner for name, owner in owners.items() if type(owner) is nn.Linear and owner.weight is parameters[name]
    }
    output = None
    hooks = _Hooks(plain)
    with suppress(StopForward), hooks, hooks.reporting(hooked.append), Observer(parameters.items(), see):
        output = run()

    def sources(found: Iterable[Call], name: str) -> list[tuple[int, int, int]]:
        return [call.source for call in found if call.parameter == name]

    same = frozenset(name for name in plain if sources(calls, name) == sources(hooked, name))
    return RecordedPass(calls=calls, output=output, hooked=same)


class Watch:
    """Reports calls on some parameters to each thread that asks; uses hooks if they are known to see all calls."""

    def __init__(
        self, parameters: Mapping[str, Tensor], owners: Mapping[str, nn.Module], *, hooked: Collection[str]
    ) -> None:
        """hooked: `RecordedPass.hooked` of a model of the same architecture."""
        self._parameters = dict(parameters)
        self._hooks = _Hooks(owners) if set(parameters) <= set(hooked) else None

    def __enter__(self) -> Watch:
        if self._hooks is not None:
            self._hooks.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self._hooks is not None:
            self._hooks.__exit__()

    def reporting(self, see: Callable[[Call], None]) -> AbstractContextManager[Any]:
        """While active, `see` receives the calls of this thread."""
        return Observer(self._parameters.items(), see) if self._hooks is None else self._hooks.reporting(see)


class _Hooks:
    """Pre-forward hooks of nn.Linear layers, by the name of their weight; each thread has its own listener."""

    def __init__(self, owners: Mapping[str, nn.Module]) -> None:
        self._owners = dict(owners)
        self._local = threading.local()
        self._handles: list[Any] = []

    def __enter__(self) -> _Hooks:
        for name, owner in self._owners.items():
            self._handles.append(owner.register_forward_pre_hook(partial(self._report, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def reporting(self, see: Callable[[Call], None]) -> Iterator[None]:
        self._local.see = see
        try:
            yield
        finally:
            del self._local.see

    def _report(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        see = getattr(self._local, "see", None)
        if see is not None and args and isinstance(args[0], Tensor):
            see(Call(name, (), False, args[0].reshape(-1, args[0].shape[-1])))
