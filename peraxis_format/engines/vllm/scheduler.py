"""vLLM's scheduler, changed so that requests end with an error if a worker could not read their variant again.

An evicted variant is read from its file when a request needs it. If that fails (the file was overwritten in place, or
its disk fails), the worker runs the step without it, gives no token to its requests, and names them in the step's
output. Here they end with the finish reason `error`, and their blocks leave the prefix cache, because these have keys
and values of the base. All other requests continue.

The plug-in replaces vLLM's scheduler, whichever it is, if the worker is PeraxisWorker; other engines keep their own. If
it cannot (VLLM_PLUGINS omits peraxis), such a failure ends the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final

from peraxis_format.engines.vllm.names import (
    AsyncModelRunnerOutput,
    EngineCoreOutput,
    EngineCoreOutputs,
    RequestStatus,
    Scheduler,
    planned_scheduler,
)

__all__ = ["ends_failed", "marked", "maker"]

_FAILED: Final = -1  # in num_nans_in_logits, the only field for each request; it is not a valid count
_WORKER: Final = "peraxis_format.engines.vllm.worker.PeraxisWorker"


def maker(planned: Any) -> Callable[..., Any]:
    """The function that is called instead of the scheduler class that vLLM planned."""
    return partial(_made, planned)


def _made(planned: Any, **options: Any) -> Any:
    if not ends_failed(options["vllm_config"]):
        return planned(**options)
    return type(f"Peraxis{planned.__name__}", (_EndsFailed, planned), {})(**options)


def ends_failed(vllm_config: Any) -> bool:
    """Whether the engine of this configuration ends only the failed requests."""
    planned = planned_scheduler(vllm_config.scheduler_config)
    known = isinstance(planned, type) and issubclass(planned, Scheduler)
    return known and vllm_config.parallel_config.worker_cls == _WORKER


# --- the worker's side -----------------------------------------------------------------------------------


def marked(output: Any, failed: Iterable[str]) -> Any:
    """A step's output with these requests marked as failed: without tokens and without prompt log-probabilities."""
    names = frozenset(failed)
    if output is None or not names:
        return output
    if isinstance(output, AsyncModelRunnerOutput):
        return _Marked(output, names)
    names &= set(output.req_id_to_index)
    for name in names:
        if output.sampled_token_ids:
            output.sampled_token_ids[output.req_id_to_index[name]] = []
        output.prompt_logprobs_dict.pop(name, None)
        output.prompt_token_id_logprobs_dict.pop(name, None)
    if names:
        output.num_nans_in_logits = {**(output.num_nans_in_logits or {}), **dict.fromkeys(names, _FAILED)}
    return output


class _Marked(AsyncModelRunnerOutput):  # type: ignore[misc]
    """An output that is still being copied from the device."""

    def __init__(self, output: Any, failed: frozenset[str]) -> None:
        self._output = output
        self._failed = failed

    def get_output(self) -> Any:
        return marked(self._output.get_output(), self._failed)


# --- the engine's side -----------------------------------------------------------------------------------


class _EndsFailed:
    """A base class before a class derived from vLLM's Scheduler."""

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Process a step's output. Returns client -> its outputs, with those of failed requests."""
        counts = model_runner_output.num_nans_in_logits or {}
        failed = {name for name, count in counts.items() if count == _FAILED}
        found = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        if failed:
            self._end(failed, found)
        return found

    def _end(self: Any, failed: set[str], found: dict[int, Any]) -> None:
        known = [self.requests[name] for name in failed if name in self.requests]
        for request in known:
            groups = self.kv_cache_manager.get_block_ids(request.request_id)
            self.kv_cache_manager.evict_blocks({block for group in groups for block in group})
        for request in self.finish_requests([each.request_id for each in known], RequestStatus.FINISHED_ERROR):
            output = EngineCoreOutput(
                request_id=request.request_id,
                new_token_ids=[],
                finish_reason=request.get_finished_reason(),
                events=request.take_events(),
                trace_headers=request.trace_headers,
            )
            found.setdefault(request.client_index, EngineCoreOutputs(outputs=[])).outputs.append(output)
