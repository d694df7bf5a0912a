"""`--load-format peraxis`: load base + delta through vLLM's own loaders, and allow live swaps afterwards.

    --load-format peraxis                                                              the base, ready for live swaps
    --load-format peraxis --model-loader-extra-config '{"delta": "legal.pxd"}'         the fine-tune

Each rank streams the base's files as vLLM does, rebuilds one tensor at a time, and passes it to the model's own
`load_weights`. So fused and split layers equal those of the applied folder, bit for bit.

Keys of the extra configuration, beside vLLM's own: delta (a path, URL, hf:// name or repository); assets ("check", the
default, refuses a fine-tune whose small files differ from those the server reads; "ignore"); packed (true: linears on
the CPU multiply with packed weights, which is faster, and cannot be swapped).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from peraxis_format.engines.vllm.assets import asset_folders, refuse_other_assets
from peraxis_format.engines.vllm.bridge import fine_tuned
from peraxis_format.engines.vllm.names import DefaultModelLoader, keep_unpacked
from peraxis_format.engines.vllm.source import open_delta
from peraxis_format.errors import LiveModelError

__all__ = ["PeraxisModelLoader", "assets_checked", "check_assets"]


def assets_checked(extra: dict[str, Any]) -> bool:
    """Whether different small files are refused. Raises LiveModelError for a word other than check and ignore."""
    asked = extra.pop("assets", os.environ.get("VLLM_PERAXIS_ASSETS", "check"))
    if asked not in ("check", "ignore"):
        raise LiveModelError(f'assets is {asked!r}; it can be "check" or "ignore"')
    return bool(asked == "check")


def check_assets(delta: Any, model_config: Any) -> None:
    """Raise LiveModelError if the fine-tune's small files differ from those that a server with this config reads."""
    refuse_other_assets(
        delta,
        asset_folders(
            model_config.model, model_config.tokenizer, model_config.hf_config_path, model_config.generation_config
        ),
    )


class PeraxisModelLoader(DefaultModelLoader):  # type: ignore[misc]
    """vLLM's default loader, with a delta applied to the tensors that it reads."""

    def __init__(self, load_config: Any) -> None:
        extra = dict(load_config.model_loader_extra_config or {})
        self._delta: str | None = extra.pop("delta", None)
        self._packed = bool(extra.pop("packed", False))
        self._checks_assets = assets_checked(extra)
        # The parent class refuses unknown formats and keys.
        super().__init__(dataclasses.replace(load_config, load_format="auto", model_loader_extra_config=extra))

    def get_all_weights(self, model_config: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) of the checkpoint to load. Raises PxdError, CheckpointError, OSError."""
        base = super().get_all_weights(model_config, model)
        if self._delta is None:
            yield from base
            return
        with open_delta(self._delta) as delta:
            if self._checks_assets:
                check_assets(delta, model_config)
            yield from fine_tuned(base, delta)

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Load into a model. Its linears keep writable weights unless `packed` is set."""
        if not self._packed:
            keep_unpacked(model)
        super().load_weights(model, model_config)
