"""The model runners of vLLM 0.32: V2, which is the default on a GPU, and V1, the only one on a CPU.

Both call the same methods of a LoRA manager. They differ in where they keep the requests of an adapter and in what
computes the log-probabilities of prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from inspect import signature
from typing import Any, Final

from torch import nn

from peraxis_format.engines.vllm.names import is_v2_runner, samples_in_shards, speculates
from peraxis_format.errors import LiveModelError

__all__ = ["RunnerHooks"]

_HIDDEN: Final = "hidden_states"
_V1_PROMPTS: Final = ("_get_prompt_logprobs_dict",)
_V2_PROMPTS: Final = ("compute_prompt_logprobs", "compute_prompt_token_id_logprobs")


class RunnerHooks:
    """What PeraxisWorker replaces in a model runner. Raises LiveModelError for one that cannot serve variants."""

    def __init__(self, runner: Any, vllm_config: Any) -> None:
        self._runner = runner
        self._v2 = is_v2_runner(vllm_config)
        _method(runner, "load_lora_model")
        _method(runner, "lora_state" if self._v2 else "input_batch")
        if self._v2:
            _refuse_other_rows(vllm_config)

    def manage(self, make: Callable[..., Any]) -> None:
        """Let the runner call `make(model, config, device)` for its LoRA manager, and leave the model's layers."""

        def load_lora_model(model: nn.Module, vllm_config: Any, device: Any) -> nn.Module:
            self._runner.lora_manager = make(model, vllm_config, device)
            return model

        self._runner.load_lora_model = load_lora_model

    def requests_of(self, number: int) -> Iterable[str]:
        """The requests of an adapter that the runner knows."""
        if self._v2:
            known = self._runner.lora_state.lora_requests
            return [name for name, request in known.items() if request.lora_int_id == number]
        return list(self._runner.input_batch.lora_id_to_request_ids.get(number, ()))

    def watch_prompts(self) -> None:
        """Let lm_head know the rows of prompts. Call it when the model is loaded: V2 makes this part last."""
        owner = self._runner.prompt_logprobs_worker if self._v2 else self._runner
        if owner is None:  # a rank without lm_head
            return
        for name in _V2_PROMPTS if self._v2 else _V1_PROMPTS:
            setattr(owner, name, _PromptLogprobs(self._runner, _method(owner, name)))


def _method(owner: Any, name: str) -> Any:
    if not hasattr(owner, name):
        raise LiveModelError(f"{type(owner).__name__} of this vLLM has no {name}, which variants in one batch need")
    return getattr(owner, name)


def _refuse_other_rows(vllm_config: Any) -> None:
    """V2 tells a LoRA manager of one row of logits for each request, in the order of the requests."""
    if speculates(vllm_config):
        raise LiveModelError("variants in one batch with speculative decoding need VLLM_USE_V2_MODEL_RUNNER=0")
    if samples_in_shards(vllm_config):
        raise LiveModelError("variants in one batch do not support --enable-batch-sharded-sampling; omit it")


class _PromptLogprobs:
    """Replaces a method that computes logits of prompts, so that lm_head can identify the rows of its input."""

    def __init__(self, runner: Any, plain: Callable[..., Any]) -> None:
        self._runner = runner
        self._plain = plain
        self._signature = signature(plain)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        manager = getattr(self._runner, "lora_manager", None)
        if manager is None:
            return self._plain(*args, **kwargs)
        with manager.logits_of(self._signature.bind(*args, **kwargs).arguments[_HIDDEN]):
            return self._plain(*args, **kwargs)
