"""`--weight-transfer-config '{"backend": "peraxis"}'`: swaps and exact updates, by vLLM's weight-transfer calls.

    init_weight_transfer_engine   {"add": {"legal": "legal.pxd"}, "remove": ["old"]}      stage and remove variants
                                  {"update": "step-00000007.pxd"}                         check and stage an update
    start_weight_update
    update_weights                {"variant": "legal"}, or {"variant": null} for the base
                                  {"update": "sha256:..."}, its content ID
    finish_weight_update

`call_worker` makes these calls on every rank and returns the first error as text. vLLM 0.32 reads the replies of ranks
in order and raises at the first error, and then reads the remaining replies as those of the next call. So no worker may
raise, and control.py and offline.py make their calls this way.

The caller pauses the scheduler before, and resets the prefix cache and resumes afterwards, as control.py and offline.py
do. An error on one rank is an error on all of them, and every rank keeps, or returns to, the previous weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from peraxis_format.engines.vllm.live import LiveModel
from peraxis_format.engines.vllm.loader import assets_checked
from peraxis_format.engines.vllm.names import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo

__all__ = ["CALL_WORKER", "Calls", "PeraxisWeightTransferEngine", "call_worker", "changing", "staging"]

CALL_WORKER: Final = "peraxis_call_worker"  # the name of call_worker among the methods of vLLM's workers

Calls = list[tuple[str, dict[str, Any]]]
"""Methods of a worker and their arguments, in order."""


def staging(info: dict[str, Any]) -> Calls:
    """The calls that stage the files of a PeraxisInitInfo."""
    return [("init_weight_transfer_engine", {"init_info": info})]


def changing(info: dict[str, Any]) -> Calls:
    """The calls that change the weights by a PeraxisUpdateInfo. The scheduler has to be paused."""
    return [("start_weight_update", {}), ("update_weights", {"update_info": info}), ("finish_weight_update", {})]


def call_worker(worker: Any, calls: Calls) -> str | None:
    """Make calls on a worker until one fails. Returns its error in one line, None if all succeeded."""
    for method, arguments in calls:
        try:
            getattr(worker, method)(**arguments)
        except Exception as error:
            return " ".join(str(error).split()) or type(error).__name__
    return None


@dataclass
class PeraxisInitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """add: name -> delta to stage. content_ids: name -> the content ID that it must have, if it is known. remove: names
    to remove first. update: a file to check last.
    """

    add: dict[str, str] = field(default_factory=dict)
    content_ids: dict[str, str] = field(default_factory=dict)
    remove: list[str] = field(default_factory=list)
    update: str | None = None


@dataclass
class PeraxisUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """variant: the name of a staged variant; None: the base. update: instead, the content ID of a staged update."""

    variant: str | None = None
    update: str | None = None


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
        """Remove, stage, check. Raises LiveModelError, PxdError, CheckpointError, OSError; the model is not changed."""
        for name in init_info.remove:
            self._live.remove(name)
        for name, source in init_info.add.items():
            self._live.add(name, source, content_id=init_info.content_ids.get(name))
        if init_info.update is not None:
            self._live.stage_update(init_info.update)

    def start_weight_update(self) -> None:
        """Do nothing, because variants and updates are staged before."""

    def receive_weights(self, update_info: PeraxisUpdateInfo) -> None:
        """Swap, or write the update. Raises SwapError, LiveModelError; the model is then unchanged."""
        if update_info.update is not None:
            self._live.write_update(update_info.update)
        else:
            self._live.use(update_info.variant)

    def finish_weight_update(self) -> None:
        """Do nothing, because weights are complete when `receive_weights` returns."""

    def shutdown(self) -> None:
        """Free the variants and the base copy."""
        self._live.close()
