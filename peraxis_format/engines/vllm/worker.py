"""`--worker-cls peraxis_format.engines.vllm.worker.PeraxisWorker`: many fine-tunes in one batch, each from its .pxd.

    --enable-lora --enforce-eager --max-loras 8 --max-cpu-loras 32 --lora-modules legal=legal.pxd medical=medical.pxd

vLLM treats a .pxd as a LoRA adapter, so its requests, scheduler, prefix cache and OpenAI `model` field work unchanged.
Its LoRA layers are not used. --additional-config '{"peraxis": {"exact": true}}' always multiplies with rebuilt weights:
the outputs are those of the merged model, but slower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, Final

import torch
from torch import Tensor, nn

from peraxis_format.engines.vllm.batch import StepRows
from peraxis_format.engines.vllm.layers import LayerState, Variant, wrap_layers
from peraxis_format.engines.vllm.layout import adapter_not_found, is_eager, worker_class
from peraxis_format.engines.vllm.loader import assets_checked
from peraxis_format.engines.vllm.variants import VariantStore
from peraxis_format.errors import LiveModelError

__all__ = ["PeraxisWorker", "VariantManager"]

_WORKER: Final[Any] = worker_class()


class VariantManager:
    """The interface of a LoRA manager for vLLM's model runner and worker, on a VariantStore."""

    def __init__(self, model: nn.Module, vllm_config: Any, device: torch.device) -> None:
        if not is_eager(vllm_config):
            raise LiveModelError("variants in one batch need --enforce-eager: their rows change at each step")
        options = dict((vllm_config.additional_config or {}).get("peraxis") or {})
        checks = assets_checked(options)
        exact = bool(options.pop("exact", False))
        if options:
            raise LiveModelError(f"additional_config: peraxis has no option {min(options)!r}; assets and exact")
        lora = vllm_config.lora_config
        self._rows: StepRows[Variant] = StepRows(device)
        self.store = VariantStore(
            model,
            vllm_config.model_config,
            device,
            resident=lora.max_loras,
            host=lora.max_cpu_loras or lora.max_loras,
            checks_assets=checks,
        )
        self._dummies: set[int] = set()
        wrap_layers(model, LayerState(self._rows, exact=exact))

    @contextmanager
    def logits_of(self, hidden: Tensor) -> Iterator[None]:
        """Within the block lm_head's input is a slice of these hidden states, one row for each token of the step."""
        self._rows.hidden = hidden
        try:
            yield
        finally:
            self._rows.hidden = None

    # --- called by vLLM ------------------------------------------------------------------------------

    def set_active_adapters(self, requests: set[Any], mapping: Any | None) -> None:
        """Set the adapters of the next step; mapping: the adapter of each row."""
        for request in requests:
            if request.lora_int_id not in self._dummies | self.store.ids():
                self.store.add(request.lora_int_id, request.lora_name, request.lora_path)
        if mapping is not None:
            numbers = {int(number) for number in mapping.index_mapping} & self.store.ids()
            variants = self.store.step(numbers)
            self._rows.begin(tuple(map(int, mapping.index_mapping)), tuple(map(int, mapping.prompt_mapping)), variants)

    def add_adapter(self, request: Any) -> bool:
        """Load a variant. Raises the errors of VariantStore.add."""
        try:
            return self.store.add(
                request.lora_int_id, request.lora_name, request.lora_path, replace=bool(request.load_inplace)
            )
        except FileNotFoundError:
            raise adapter_not_found(request.lora_name, request.lora_path) from None

    def remove_adapter(self, number: int) -> bool:
        """Remove a variant."""
        return self.store.remove(number)

    def remove_all_adapters(self) -> None:
        """Remove the adapters of warm-up runs, and all variants."""
        self._dummies.clear()
        self.store.close()

    def list_adapters(self) -> set[int]:
        """The ids of the known variants."""
        return self.store.ids()

    def pin_adapter(self, number: int) -> bool:
        """Never evict a variant."""
        return self.store.pin(number)

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        """Do nothing, because the adapters of warm-up runs are the base."""
        yield

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        """A rank for warm-up adapters, which have none."""
        return default_rank

    def add_dummy_lora(self, request: Any, rank: int) -> bool:
        """Add an adapter of a warm-up run, which is the base."""
        self._dummies.add(request.lora_int_id)
        return True

    def supports_tower_connector_lora(self) -> bool:
        """Adapters of vision towers are not supported."""
        return False


class PeraxisWorker(_WORKER):  # type: ignore[misc]
    """vLLM's worker with .pxd files as LoRA adapters."""

    def init_device(self) -> None:
        """Prepare the device, and keep the base's weights readable."""
        super().init_device()
        load = self.vllm_config.load_config
        if load.load_format == "auto":
            load.load_format = "peraxis"
        runner = self.model_runner
        for name in ("load_lora_model", "_get_prompt_logprobs_dict"):
            if not hasattr(runner, name):
                raise LiveModelError(f"{type(runner).__name__} of this vLLM has no {name}; use vLLM 0.32")
        runner.load_lora_model = MethodType(_load_variants, runner)
        runner._get_prompt_logprobs_dict = _PromptLogprobs(runner, runner._get_prompt_logprobs_dict)


def _load_variants(runner: Any, model: nn.Module, vllm_config: Any, device: torch.device) -> nn.Module:
    runner.lora_manager = VariantManager(model, vllm_config, device)
    return model


class _PromptLogprobs:
    """Replaces the model runner's method, so that lm_head can identify the rows of its input."""

    def __init__(self, runner: Any, plain: Callable[..., Any]) -> None:
        self._runner = runner
        self._plain = plain

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        manager = getattr(self._runner, "lora_manager", None)
        if manager is None:
            return self._plain(hidden_states, *args, **kwargs)
        with manager.logits_of(hidden_states):
            return self._plain(hidden_states, *args, **kwargs)
