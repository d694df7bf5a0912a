"""`--worker-cls peraxis_format.engines.vllm.worker.PeraxisWorker`: many fine-tunes in one batch, each from its .pxd.

    --enable-lora --enforce-eager --max-loras 8 --max-cpu-loras 32 --lora-modules legal=legal.pxd medical=medical.pxd

vLLM treats a .pxd as a LoRA adapter, so its requests, scheduler, prefix cache and OpenAI `model` field work unchanged.
Its LoRA layers are not used. --additional-config '{"peraxis": {"exact": true}}' always multiplies with rebuilt weights:
the outputs are those of the merged model, but slower.

If an evicted variant cannot be read again, only its own requests fail; scheduler.py ends them with an error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from peraxis_format.engines.vllm.batch import StepRows
from peraxis_format.engines.vllm.bridge import agree
from peraxis_format.engines.vllm.layers import LayerState, RankVariant, wrap_layers
from peraxis_format.engines.vllm.loader import assets_checked
from peraxis_format.engines.vllm.names import adapter_not_found, caches_prefixes, is_eager, tensor_group, worker_class
from peraxis_format.engines.vllm.permitted import Permitted
from peraxis_format.engines.vllm.runners import RunnerHooks
from peraxis_format.engines.vllm.scheduler import ends_failed, marked
from peraxis_format.engines.vllm.source import NAME_RULE, quoted, shown
from peraxis_format.engines.vllm.variants import VariantStore
from peraxis_format.errors import CheckpointError, LiveModelError, PxdError

__all__ = ["PeraxisWorker", "VariantManager"]

_WORKER: Final[Any] = worker_class()
_LONGEST_NAME: Final = 200
_LOG: Final = logging.getLogger("peraxis")
_FAILURES: Final = (PxdError, CheckpointError, LiveModelError, OSError)


class VariantManager:
    """The interface of a LoRA manager for vLLM's model runner and worker, on a VariantStore."""

    def __init__(
        self,
        model: nn.Module,
        vllm_config: Any,
        device: torch.device,
        *,
        requests_of: Callable[[int], Iterable[str]] | None = None,
    ) -> None:
        """requests_of: returns the requests of an adapter in the beginning step."""
        if not is_eager(vllm_config):
            raise LiveModelError("variants in one batch need --enforce-eager: their rows change at each step")
        options = dict((vllm_config.additional_config or {}).get("peraxis") or {})
        checks = assets_checked(options)
        exact = bool(options.pop("exact", False))
        if options:
            raise LiveModelError(f"additional_config: peraxis has no option {min(options)!r}; use assets or exact")
        lora = vllm_config.lora_config
        self._permitted = Permitted.of_environment(any_name=True)  # without a root, vLLM's own rules hold
        self._rows: StepRows[RankVariant] = StepRows(device)
        self.store = VariantStore(
            model,
            vllm_config.model_config,
            device,
            resident=lora.max_loras,
            host=lora.max_cpu_loras or lora.max_loras,
            checks_assets=checks,
            caches_prefixes=caches_prefixes(vllm_config),
        )
        self.failed: frozenset[str] = frozenset()
        self._requests_of = requests_of if ends_failed(vllm_config) else None
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
        """Set the adapters of the next step; mapping: the adapter of each row.

        Afterwards `failed` has the requests whose adapter is not available; their rows are the base's.
        """
        failures: dict[int, Exception] = {}
        # vLLM's set is ordered by hashes of names, which differ between processes; all ranks read in one order.
        ordered = sorted(requests, key=lambda request: request.lora_int_id)
        self.store.touch(request.lora_int_id for request in ordered)
        for request in ordered:
            if request.lora_int_id not in self._dummies | self.store.ids():
                try:
                    self.store.add(request.lora_int_id, request.lora_name, self._permitted.source(request.lora_path))
                except _FAILURES as error:
                    failures[request.lora_int_id] = error
        if mapping is not None:
            numbers = {int(number) for number in mapping.index_mapping} & self.store.ids()
            variants, unread = self.store.step(numbers)
            failures |= unread
            self._rows.begin(tuple(map(int, mapping.index_mapping)), tuple(map(int, mapping.prompt_mapping)), variants)
        self._fail(failures, {request.lora_int_id: request for request in requests})

    def _fail(self, failures: dict[int, Exception], requests: dict[int, Any]) -> None:
        """Record the requests of these adapters. Raises the first failure if no scheduler can end them."""
        self.failed = frozenset()
        if not failures:
            return
        if self._requests_of is None:
            raise next(iter(failures.values()))
        self.failed = frozenset(name for number in failures for name in self._requests_of(number))
        for number, error in failures.items():
            request = requests.get(number)
            name, path = ("?", "?") if request is None else (request.lora_name, shown(request.lora_path))
            _LOG.error("variant %s: %s cannot be read again, so its requests fail: %s", name, path, error)

    def add_adapter(self, request: Any) -> bool:
        """Load a variant. Raises the errors of VariantStore.add; LiveModelError for a name that would break a log."""
        if not request.lora_name.isprintable() or len(request.lora_name) > _LONGEST_NAME:
            raise LiveModelError(f"lora_name is {quoted(request.lora_name)}; {NAME_RULE.format(_LONGEST_NAME)}")
        try:
            path = self._permitted.source(request.lora_path)
            return self.store.add(request.lora_int_id, request.lora_name, path, replace=bool(request.load_inplace))
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
        self._hooks = RunnerHooks(self.model_runner, self.vllm_config)
        self._hooks.manage(partial(VariantManager, requests_of=self._hooks.requests_of))

    def load_model(self, **options: Any) -> None:
        """Load the model, and let lm_head know the rows of prompts."""
        super().load_model(**options)
        self._hooks.watch_prompts()

    def add_lora(self, lora_request: Any) -> bool:
        """Load a variant on all ranks or on none. On failure only the last rank raises, because vLLM 0.32 reads replies
        in order up to the first error, and then reads the remaining ones as those of the next call.
        """
        failure: Exception | None = None
        added = False
        try:
            added = bool(super().add_lora(lora_request))
        except Exception as error:
            failure = error
        failure = _shared(failure)
        if failure is not None and self.rank == self.parallel_config.world_size - 1:
            raise failure
        return added and failure is None

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        """Run a step; its output names the failed requests."""
        manager = getattr(self.model_runner, "lora_manager", None)
        if manager is not None:
            manager.failed = frozenset()
        return self._marked(super().execute_model(*args, **kwargs))

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """The tokens of the last step."""
        return self._marked(super().sample_tokens(*args, **kwargs))

    def _marked(self, output: Any) -> Any:
        manager = getattr(self.model_runner, "lora_manager", None)
        return output if manager is None else marked(output, manager.failed)


def _shared(failure: Exception | None) -> Exception | None:
    """The failure of this rank, or else of another one."""
    group, count = tensor_group()
    if count > 1:
        try:
            agree(None if failure is None else LiveModelError(str(failure)), group)
        except LiveModelError as error:
            return failure or error
    return failure
