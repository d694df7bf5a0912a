"""A live vLLM model on one rank: stage, use and remove variants; stage and write exact updates. An error on one rank is
an error on all.

A swap rebuilds weights into the layers' storage, from a pristine copy of the base. The caller must pause the scheduler
and reset the prefix cache (transfer.py, control.py). An exact update changes the weights permanently and needs no copy
of them, so there is none while it is staged.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from peraxis_format.engines.vllm.bridge import StagedUpdate, place, stage
from peraxis_format.engines.vllm.layout import plain_tensors, refuse_uncovered, views
from peraxis_format.engines.vllm.loader import check_assets
from peraxis_format.engines.vllm.names import drop_packed, tensor_group
from peraxis_format.engines.vllm.source import open_delta, shown
from peraxis_format.errors import LiveModelError
from peraxis_format.manifest import Manifest
from peraxis_format.torch import Swap, Variant, VariantSwitch

__all__ = ["LiveModel"]


class LiveModel:
    """The variants of one rank's model. checks_assets: refuse a fine-tune with another tokenizer or configuration."""

    def __init__(self, model: nn.Module, model_config: Any, *, checks_assets: bool = True) -> None:
        self._model = model
        self._model_config = model_config
        self._checks_assets = checks_assets
        group, count = tensor_group()
        self._group = group if count > 1 else None
        self._switch: VariantSwitch | None = None
        self._names: tuple[str, ...] = ()
        self._update: StagedUpdate | None = None

    @property
    def current(self) -> str | None:
        """The name of the current variant; None: the base."""
        return None if self._switch is None else self._switch.current

    def add(self, name: str, source: str, *, content_id: str | None = None) -> Variant:
        """Check a delta and its base, and stage it. The model is not changed. content_id: the one that it must have.

        The first call copies the weights that variants change. Raises LiveModelError, PxdError, OSError.
        """
        with open_delta(source, group=self._group) as file:
            if content_id not in (None, file.content_id):
                raise LiveModelError(f"{shown(source)}: was replaced by another file meanwhile; stage it again")
            if self._checks_assets:
                check_assets(file, self._model_config)
            refuse_uncovered(self._model, file.manifest)
            self._update = None  # the weights may be a variant's by the time it is written
            switch = self._switch_for(file.manifest)
            try:
                return switch.add(name, file)
            except BaseException:
                if not switch.variants():
                    self._release()  # a refused file must not constrain later ones
                raise

    def use(self, name: str | None) -> Swap | None:
        """Swap the model to a variant, or to the base. Returns None if no variant was ever staged.

        Raises SwapError, the model is then unchanged; LiveModelError for an unknown name.
        """
        if self._switch is None:
            if name is not None:
                raise LiveModelError(f"no variant {name!r} is staged; add it first")
            return None
        try:
            return self._switch.use(name)
        finally:
            drop_packed(self._model)

    def remove(self, name: str) -> None:
        """Remove a variant; the copy of the base is freed with the last one. Raises LiveModelError for the one in use,
        and for an unknown one.
        """
        if self._switch is None:
            raise LiveModelError(f"no variant {name!r} is staged")
        self._switch.remove(name)
        if not self._switch.variants():
            self._release()

    # --- exact updates -------------------------------------------------------------------------------

    def stage_update(self, source: str) -> None:
        """Check an exact update, or an anchor, against the weights, and keep its changes. No weight is written.

        Raises LiveModelError, PxdError, OSError, on all ranks.
        """
        self._update = None
        if self._switch is not None:
            raise LiveModelError("variants of the present weights are staged; remove them before an update")
        with open_delta(source, group=self._group) as file:
            if self._checks_assets:
                check_assets(file, self._model_config)
            refuse_uncovered(self._model, file.manifest)
            placement = place(plain_tensors(self._model), file.manifest, views=views(self._model, file.manifest))
            self._update = stage(file, placement, group=self._group)

    def write_update(self, content_id: str) -> None:
        """Write the staged update. Raises LiveModelError if it is another one.

        An error on one rank is raised on all, and all keep the old weights.
        """
        update, self._update = self._update, None
        if update is None or update.content_id != content_id:
            raise LiveModelError(f"update {content_id} is not staged")
        try:
            update.write()
        finally:
            drop_packed(self._model)

    def close(self) -> None:
        """Free everything; the weights are unchanged."""
        self._update = None
        self._release()

    def _release(self) -> None:
        if self._switch is not None:
            self._switch.close()
            self._switch = None

    def _switch_for(self, manifest: Manifest) -> VariantSwitch:
        names = tuple(entry.name for entry in manifest.modules)
        if self._switch is None:
            self._switch = VariantSwitch(
                plain_tensors(self._model), guard=False, views=views(self._model, manifest), group=self._group
            )
            self._names = names
        elif not set(names) <= set(self._names):
            extra = next(name for name in names if name not in self._names)
            raise LiveModelError(f"{extra}: the staged variants do not have this tensor; restart the server")
        return self._switch
