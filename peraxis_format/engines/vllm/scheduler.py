"""vLLM's scheduler, which ends requests with an error where a worker could not read their variant again.

A variant that was evicted is read from its file when a request wants it. Where that fails (the file was overwritten in
place, or its disk fails), the worker runs the step without it, gives no token to its requests, and names them in the
step's output. Here they end with the finish reason `error`, and their blocks leave the prefix cache, since they hold
keys and values of the base. All others go on.

The plug-in puts it in the place of the scheduler that vLLM would take, whichever that is, where the worker is
PeraxisWorker; all other engines have their own. Where it cannot (VLLM_PLUGINS leaves peraxis out), such a failure ends
the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final

from peraxis_format.engines.vllm.layout import (
    AsyncModelRunnerOutput,
    EngineCoreOutput,
    EngineCoreOutputs,
    RequestStatus,
    Scheduler,
    planned_scheduler,
)

__all__ = ["ends_failed", "marked", "maker"]

_FAILED: Final = -1  # in num_nans_in_logits, the one field that an output has for each request: no number of NaNs
_WORKER: Final = "peraxis_format.engines.vllm.worker.PeraxisWorker"


def maker(planned: Any) -> Callable[..., Any]:
    """What is called in the place of the scheduler class that vLLM planned."""
    return partial(_made, planned)


def _made(planned: Any, **options: Any) -> Any:
    if not ends_failed(options["vllm_config"]):
        return planned(**options)
    return type(f"Peraxis{planned.__name__}", (_EndsFailed, planned), {})(**options)


def ends_failed(vllm_config: Any) -> bool:
    """Whether the engine of this configuration ends failed requests by themselves."""
    planned = planned_scheduler(vllm_config.scheduler_config)
    known = isinstance(planned, type) and issubclass(planned, Scheduler)
    return known and vllm_config.parallel_config.worker_cls == _WORKER


# --- the worker's side -----------------------------------------------------------------------------------


def marked(output: Any, failed: Iterable[str]) -> Any:
    """A step's output, in which these requests have failed: no token, no log-probabilities of their prompts."""
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
    """An output that is still on its way from the device."""

    def __init__(self, output: Any, failed: frozenset[str]) -> None:
        self._output = output
        self._failed = failed

    def get_output(self) -> Any:
        return marked(self._output.get_output(), self._failed)


# --- the engine's side -----------------------------------------------------------------------------------


class _EndsFailed:
    """Goes before a class derived from vLLM's Scheduler."""

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Take in a step's output. Returns client -> its outputs, those of failed requests among them."""
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
