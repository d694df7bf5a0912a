"""A decoder of any architecture with one block in memory.

The model is built from its configuration with every parameter on the meta device (buffers such as rotary
frequencies are real). Parameters outside the decoder layers (embeddings, final norm, lm_head) are filled once; layers
are filled and emptied one at a time. The decoder layers are the longest nn.ModuleList that is in no other.

To run one layer, the model itself is run, and every other layer passes its input through. So masks (sliding or full),
rotary embeddings and position ids come from the model's own code for this layer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peraxis_tools.compress.fit.moments.recorder import StopForward
from peraxis_tools.compress.shared_sizes import LOGITS_BYTES
from peraxis_tools.errors import ToolError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["LayerwiseModel", "UnsupportedModelError"]


class UnsupportedModelError(ToolError):
    """The model has no sequence of decoder layers that can run one at a time."""


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules that are built inside this context get parameters on the meta device; buffers stay real."""
    from transformers import PreTrainedModel

    register = nn.Module.register_parameter
    initialize = PreTrainedModel.initialize_weights

    def register_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.detach().to("meta"), requires_grad=False)
        register(module, name, param)

    nn.Module.register_parameter = register_meta  # type: ignore[method-assign, assignment]
    # Initialization has no effect on meta tensors, and it takes time.
    PreTrainedModel.initialize_weights = lambda self: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
        PreTrainedModel.initialize_weights = initialize  # type: ignore[method-assign]


def _decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and list of the decoder layers: the longest nn.ModuleList that is not in another one."""
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        nested = any(name.startswith(outer + ".") for outer, _ in found)
        if isinstance(module, nn.ModuleList) and len(module) and not nested:
            found.append((name, module))
    if not found:
        raise UnsupportedModelError("no list of decoder layers in this model; use --fit none")
    return max(found, key=lambda item: len(item[1]))


class LayerwiseModel:
    """One model, run block by block. Parameters are set from a source: parameter name -> tensor."""

    def __init__(self, config: Any, *, dtype: torch.dtype, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM

        try:
            with _parameters_on_meta(), torch.random.fork_rng(devices=[]):
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        except Exception as error:  # a malformed configuration can raise any exception
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise UnsupportedModelError(
                f"config.json: transformers cannot build a causal language model ({reason}); "
                "correct it, or use --fit none"
            ) from None
        self.model: PreTrainedModel = model.eval().requires_grad_(False)
        setter = getattr(model, "set_experts_implementation", None)
        if setter is not None:
            setter("eager")  # one product for each expert, with its own tokens
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        self.dtype, self.device = dtype, device
        self.prefix, self.layers = _decoder_layers(model)
        self._returns_tuple: int | None = None  # length of the tuple that a layer returns; 0: a tensor

    def __len__(self) -> int:
        return len(self.layers)

    def layer_parameters(self, index: int) -> list[str]:
        """The names of the parameters and persistent buffers of a layer."""
        return [f"{self.prefix}.{index}.{name}" for name in self.layers[index].state_dict()]

    def outer_parameters(self) -> list[str]:
        """The names of parameters and buffers outside the layers; a tied parameter appears under each of its names."""
        return [name for name in self.model.state_dict() if not name.startswith(self.prefix + ".")]

    def set(self, name: str, value: Tensor) -> None:
        """Replace a parameter or buffer by this tensor, in the model's dtype and on its device."""
        module, leaf = self._owner(name)
        old = getattr(module, leaf)
        dtype = self.dtype if old.is_floating_point() and value.is_floating_point() else value.dtype
        if tuple(old.shape) != tuple(value.shape):
            raise UnsupportedModelError(f"{name}: {list(value.shape)}, but the configuration says {list(old.shape)}")
        new = value.to(device=self.device, dtype=dtype).contiguous()
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(new, requires_grad=False)
        else:
            setattr(module, leaf, new)

    def get(self, name: str) -> Tensor:
        """The tensor of this name."""
        module, leaf = self._owner(name)
        found: Tensor = getattr(module, leaf)
        return found

    def owner(self, name: str) -> nn.Module:
        """The module that has this parameter."""
        return self._owner(name)[0]

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return self.model.get_submodule(path), leaf

    def owners(self, name: str) -> list[tuple[nn.Module, str]]:
        """Every (module, attribute) with this parameter; several if it is tied."""
        value = self.get(name)
        return [
            (module, leaf)
            for module in self.model.modules()
            for leaf, parameter in module._parameters.items()
            if parameter is value
        ]

    def retie(self) -> None:
        """Tie the parameters that the architecture ties (lm_head to the embedding), if one of the two is filled."""
        tie = getattr(self.model, "tie_weights", None)
        if tie is not None:
            tie()

    def is_head(self, name: str) -> bool:
        """Whether this parameter is the output head; a tied embedding is the head too."""
        head = self.model.get_output_embeddings()
        return head is not None and getattr(head, "weight", None) is self.get(name)

    def is_embedding(self, name: str) -> bool:
        """Whether this parameter is the table of input embeddings."""
        return getattr(self.model.get_input_embeddings(), "weight", None) is self.get(name)

    def empty(self, index: int) -> None:
        """Free a layer's parameters."""
        _to_meta(self.layers[index])

    def empty_whole(self) -> None:
        """Free all parameters."""
        _to_meta(self.model)

    @property
    def is_tied(self) -> bool:
        """Whether the output head reads the table of input embeddings."""
        table, head = (getattr(self.model, f"get_{side}_embeddings")() for side in ("input", "output"))
        return getattr(head, "weight", None) is getattr(table, "weight", False)

    def free_embedding(self) -> None:
        """Free the table of input embeddings, with a head that is tied to it; zeros take the place of its rows.

        For layers that run on given hidden states. An embedding that does more than read rows is kept.
        """
        table: Any = self.model.get_input_embeddings()
        kind = type(table)
        if kind is not nn.Embedding:
            return
        name = next(name for name, value in self.model.named_parameters() if value is table.weight)
        empty = nn.Parameter(table.weight.to("meta"), requires_grad=False)
        for module, leaf in self.owners(name):
            module._parameters[leaf] = empty
        table.forward = self._zeros

    def _zeros(self, ids: Tensor) -> Tensor:
        """Zeros in place of the rows of the table of input embeddings, which takes no memory."""
        table: Any = self.model.get_input_embeddings()
        return torch.zeros((), dtype=self.dtype, device=self.device).expand(*ids.shape, table.embedding_dim)

    @contextmanager
    def _unread_embedding(self) -> Iterator[None]:
        """Passes inside this context, on given hidden states, do not read the table: it may have to be built first.

        An embedding that does more than read rows is read.
        """
        table: Any = self.model.get_input_embeddings()
        plain = isinstance(table, nn.Embedding) and type(table).forward is nn.Embedding.forward
        if not plain or "forward" in vars(table):
            yield
            return
        table.forward = self._zeros
        try:
            yield
        finally:
            del table.forward

    def write(self, name: str, value: Tensor) -> None:
        """Write values into a parameter's memory, so that running passes see them too."""
        self.get(name).copy_(value)

    @contextmanager
    def at_layer(self, index: int) -> Iterator[Callable[[Tensor, Tensor | None], Tensor]]:
        """Yield a function: (ids, input hidden states) -> one layer's output [batch, length, width].

        Several threads may call it at once. Hidden states None: the embedding's output. Layer 0 must be run before any
        other one, because it shows the return type of a layer.
        """
        given = threading.local()

        def run(ids: Tensor, hidden: Tensor | None) -> Tensor:
            given.hidden = hidden
            try:
                self.model(input_ids=ids, use_cache=False)
            except StopForward as stop:
                if stop.value is None:
                    raise
                output: Tensor = stop.value
                return output
            raise UnsupportedModelError(f"layer {index} is never called; use --fit none")

        with self._rerouted(index, given):
            yield run

    def run_layer(self, index: int, ids: Tensor, hidden: Tensor | None) -> Tensor:
        """Run one layer once and return its output; see `at_layer`."""
        with self.at_layer(index) as run:
            return run(ids, hidden)

    def embed(self, ids: Tensor) -> Tensor:
        """The input of the first layer."""

        def stop(*args: Any, **kwargs: Any) -> Any:
            raise StopForward(_hidden(args, kwargs))

        first = self.layers[0]
        first.forward = stop
        try:
            return self._stopped(ids, "first")
        finally:
            del first.forward

    def states(self, ids: Tensor) -> Tensor:
        """The output of the last layer."""

        def stop(_: nn.Module, __: Any, result: Any) -> None:
            self._returns_tuple = len(result) if isinstance(result, tuple) else 0
            raise StopForward(result[0] if isinstance(result, tuple) else result)

        handle = self.layers[-1].register_forward_hook(stop)
        try:
            return self._stopped(ids, "last")
        finally:
            handle.remove()

    def _stopped(self, ids: Tensor, layer: str) -> Tensor:
        """The hidden states at which a pass was stopped. Raises UnsupportedModelError if the layer did not stop it."""
        try:
            self.model(input_ids=ids, use_cache=False)
        except StopForward as reached:
            states: Tensor = reached.value
            return states
        raise UnsupportedModelError(f"the {layer} decoder layer is never called; use --fit none")

    def head(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """The logits for the output of the last layer, or for some of its tokens; ids: the tokens."""
        given = threading.local()
        given.hidden = hidden
        with self._rerouted(None, given), self._unread_embedding():
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
            return logits

    def token_ranges(self, ids: Tensor, states: Tensor) -> list[slice]:
        """Ranges of the tokens of ids [samples, length] whose logits take at most LOGITS_BYTES, as float32.

        One range, if the states that `head` wants are not [samples, length, width].
        """
        samples, length = ids.shape
        head = self.model.get_output_embeddings()
        vocabulary = getattr(head, "out_features", None) or self.model.config.vocab_size
        count = -(-4 * samples * length * vocabulary // LOGITS_BYTES) if states.shape[:-1] == ids.shape else 1
        step = -(-length // min(count, length))
        return [slice(first, first + step) for first in range(0, length, step)]

    @contextmanager
    def _rerouted(self, index: int | None, given: threading.local) -> Iterator[None]:
        """Let only layer `index` run, on given.hidden, and end the pass after it; None: end the pass before layer 0."""
        before = [layer.__dict__.get("forward") for layer in self.layers]
        for i, layer in enumerate(self.layers):
            layer.forward = self._forward(i, layer, index, given)
        try:
            yield
        finally:
            for layer, forward in zip(self.layers, before, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward

    def _forward(self, i: int, layer: nn.Module, index: int | None, given: threading.local) -> Callable[..., Any]:
        real = type(layer).forward

        def run(*args: Any, **kwargs: Any) -> Any:
            if given.hidden is not None:
                args, kwargs = _with_hidden(args, kwargs, given.hidden)
            result = real(layer, *args, **kwargs)
            if self._returns_tuple is None:
                self._returns_tuple = len(result) if isinstance(result, tuple) else 0
            raise StopForward(result[0] if isinstance(result, tuple) else result)

        def through(*args: Any, **kwargs: Any) -> Any:
            value = given.hidden if index is None and i == 0 else _hidden(args, kwargs)
            return (value, *[None] * (self._returns_tuple - 1)) if self._returns_tuple else value

        return run if i == index else through


def _to_meta(owner: nn.Module) -> None:
    """Replace the parameters of a module by ones on the meta device."""
    for module in owner.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})
