"""The weights of a running model (teacher, student or base), assembled from the two checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

import peraxis_format as pxd
from peraxis_format import Encoding, Safetensors
from peraxis_format.ops.tensors import TORCH_DTYPES, from_storage
from peraxis_tools.checkpoints.parameter_names import NameMap
from peraxis_tools.compress.model.components import apply_components
from peraxis_tools.compress.model.layerwise_model import LayerwiseModel, UnsupportedModelError
from peraxis_tools.compress.plan.plan import Plan, PlannedModule
from peraxis_tools.compress.run.types import FittedModule

__all__ = ["Weights", "kept_rows"]

Source = Callable[[str], Tensor]


class Weights:
    """The pair's tensors by checkpoint name, and parameters by model name. `fitted` may grow during use."""

    def __init__(
        self,
        *,
        plan: Plan,
        base: Safetensors,
        fine_tuned: Safetensors,
        names: NameMap,
        fitted: Mapping[str, FittedModule],
        device: torch.device,
    ) -> None:
        self.base, self.fine_tuned, self.names, self.device = base, fine_tuned, names, device
        self.modules = {module.name: module for module in plan.modules}
        self._aliases = {alias: name for name, alias in plan.tied}
        self._fitted = fitted

    def read(self, tensors: Safetensors, name: str, rows: slice | None = None) -> Tensor:
        """A tensor of a checkpoint on the device, in its own dtype."""
        return from_storage(tensors.read(name, rows), tensors[name].dtype).to(self.device)

    def pair(self, module: PlannedModule) -> tuple[Tensor, Tensor]:
        """(base, fine-tuned) of the rows that both have, as stored; equal if one is a cast of the other."""
        rows = slice(0, kept_rows(module))
        base, tuned = self.read(self.base, module.name, rows), self.read(self.fine_tuned, module.name, rows)
        cast = base.dtype is not tuned.dtype and torch.equal(base.to(tuned.dtype), tuned)
        return tuned if cast else base, tuned

    def teacher(self, name: str) -> Tensor:
        """A tensor of the fine-tuned checkpoint."""
        return self.read(self.fine_tuned, name)

    def student(self, name: str) -> Tensor:
        """A tensor as apply will rebuild it: exact, or the base with the components that are fitted so far."""
        return self._student(name, self._fitted)

    def base_only(self, name: str) -> Tensor:
        """As `student`, without components: the base for modules with signs, unrounded."""
        module = self.modules[self._aliases.get(name, name)]
        return self._student(name, {}, unrounded=module.encoding is Encoding.SIGN)

    def _student(self, name: str, fitted: Mapping[str, FittedModule], *, unrounded: bool = False) -> Tensor:
        module = self.modules[self._aliases.get(name, name)]
        if module.encoding is Encoding.FULL or module.base_shape is None:
            return self.read(self.fine_tuned, module.name)
        kept = kept_rows(module)
        base = self.read(self.base, module.name, slice(0, kept))
        found = fitted.get(module.name)
        dtype = base.dtype if unrounded else TORCH_DTYPES[module.dtype]
        covered = apply_components(base, found.components if found else (), dtype)
        if kept == module.shape[0]:
            return covered
        return torch.cat([covered, self.read(self.fine_tuned, module.name, slice(kept, None)).to(dtype)])

    def parameter(self, name: str, source: Source, model: LayerwiseModel) -> Tensor | None:
        """A parameter's value, assembled from the checkpoint's tensors; None if the checkpoint has none of them."""
        pieces = self.names.by_parameter.get(name)
        if not pieces:
            return None
        if len(pieces) == 1 and pieces[0].index is None and pieces[0].rows is None:
            return source(pieces[0].tensor)
        value = torch.empty(model.get(name).shape, dtype=model.dtype, device=self.device)
        for piece in pieces:
            piece.select(value).copy_(source(piece.tensor))
        return value

    def fill(self, model: LayerwiseModel, source: Source, parameters: Iterable[str]) -> None:
        """Set parameters of a model. Raises UnsupportedModelError for one without a tensor and without a value."""
        for name in parameters:
            value = self.parameter(name, source, model)
            if value is not None:
                model.set(name, value)
            elif model.get(name).is_meta:
                raise UnsupportedModelError(f"{name}: the checkpoint has no tensor for it; use --fit none")

    def fill_outer(self, model: LayerwiseModel, source: Source) -> None:
        """Set all parameters outside the layers; those that the checkpoint lacks are tied to those it has."""
        outer = model.outer_parameters()
        held = [name for name in outer if name in self.names.by_parameter]
        self.fill(model, source, held)
        model.retie()
        self.fill(model, source, (name for name in outer if name not in held))

    def fill_whole(self, model: LayerwiseModel, source: Source) -> None:
        """Fill every layer too, so that the whole model is in memory."""
        self.fill_outer(model, source)
        for index in range(len(model)):
            self.fill(model, source, model.layer_parameters(index))


def kept_rows(module: PlannedModule) -> int:
    """The number of rows of the first dimension that the base has too (`kept` of SPEC 3.10)."""
    return pxd.kept_rows(module.shape, module.base_shape)
