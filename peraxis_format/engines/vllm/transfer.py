"""`--weight-transfer-config '{"backend": "peraxis"}'`: live swaps through vLLM's own weight-transfer calls.

    init_weight_transfer_engine   {"add": {"legal": "legal.pxd"}, "remove": ["old"]}      stage and remove variants
    start_weight_update
    update_weights                {"variant": "legal"}, or {"variant": null} for the base
    finish_weight_update

The caller pauses the scheduler before, and resets the prefix cache and resumes afterwards, as routes.py and offline.py
do. An error on one rank is an error on all of them, and every rank keeps, or returns to, the previous variant.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peraxis_format.engines.vllm.layout import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from peraxis_format.engines.vllm.live import LiveModel
from peraxis_format.engines.vllm.loader import assets_checked

__all__ = ["PeraxisInitInfo", "PeraxisUpdateInfo", "PeraxisWeightTransferEngine"]


@dataclass
class PeraxisInitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """add: name -> delta to stage. remove: names to remove first."""

    add: dict[str, str] = field(default_factory=dict)
    remove: list[str] = field(default_factory=list)


@dataclass
class PeraxisUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """variant: the name of a staged variant; None: the base."""

    variant: str | None = None


class PeraxisWeightTransferEngine(WeightTransferEngine):  # type: ignore[misc]
    """vLLM's weight-transfer engine of one rank."""

    init_info_cls = PeraxisInitInfo
    update_info_cls = PeraxisUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: Any, model: Any) -> None:
        super().__init__(config, vllm_config, device, model)
        extra = dict(vllm_config.load_config.model_loader_extra_config or {})
        self._live = LiveModel(model, vllm_config.model_config, checks_assets=assets_checked(extra))

    def init_transfer_engine(self, init_info: PeraxisInitInfo) -> None:
        """Remove, then stage. Raises LiveModelError, PxdError, CheckpointError, OSError; the model is not changed."""
        for name in init_info.remove:
            self._live.remove(name)
        for name, source in init_info.add.items():
            self._live.add(name, source)

    def start_weight_update(self) -> None:
        """Do nothing, because variants are staged before."""

    def receive_weights(self, update_info: PeraxisUpdateInfo) -> None:
        """Swap. Raises SwapError; the model is then unchanged."""
        self._live.use(update_info.variant)

    def finish_weight_update(self) -> None:
        """Do nothing, because a swap is complete when it returns."""

    def shutdown(self) -> None:
        """Free the variants and the base copy."""
        self._live.close()
