"""Laws of what PeraxisWorker replaces in vLLM's model runners. test_vllm.py runs both of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from peraxis_format.errors import LiveModelError

pytestmark = pytest.mark.vllm


def config(*, v2: bool = True, speculates: bool = False, shards: bool = False) -> Any:
    return SimpleNamespace(
        use_v2_model_runner=v2,
        speculative_config="ngram" if speculates else None,
        parallel_config=SimpleNamespace(enable_batch_sharded_sampling=shards),
    )


def runner(**parts: Any) -> Any:
    return SimpleNamespace(load_lora_model=None, **parts)


@pytest.mark.parametrize(
    ("options", "remedy"),
    [({"speculates": True}, "VLLM_USE_V2_MODEL_RUNNER=0"), ({"shards": True}, "--enable-batch-sharded-sampling")],
)
def test_v2_is_refused_where_its_rows_of_logits_are_not_one_for_each_request(
    options: dict[str, bool], remedy: str
) -> None:
    from peraxis_format.engines.vllm.runners import RunnerHooks

    with pytest.raises(LiveModelError, match=remedy):
        RunnerHooks(runner(lora_state=None), config(**options))
    RunnerHooks(runner(input_batch=None), config(v2=False, **options))


@pytest.mark.parametrize(("v2", "lacks"), [(True, "lora_state"), (False, "input_batch")])
def test_a_runner_without_a_needed_part_is_refused_and_the_part_is_named(v2: bool, lacks: str) -> None:
    from peraxis_format.engines.vllm.runners import RunnerHooks

    with pytest.raises(LiveModelError, match=f"SimpleNamespace of this vLLM has no {lacks}"):
        RunnerHooks(runner(), config(v2=v2))


def test_the_requests_of_an_adapter_are_found_in_both_runners() -> None:
    from peraxis_format.engines.vllm.runners import RunnerHooks

    requests = {"a": SimpleNamespace(lora_int_id=1), "b": SimpleNamespace(lora_int_id=2)}
    second = RunnerHooks(runner(lora_state=SimpleNamespace(lora_requests=requests)), config())
    first = RunnerHooks(runner(input_batch=SimpleNamespace(lora_id_to_request_ids={2: {"b"}})), config(v2=False))
    for hooks in (first, second):
        assert set(hooks.requests_of(2)) == {"b"}
        assert not set(hooks.requests_of(3))


def test_all_ranks_read_the_variants_of_a_step_in_one_order() -> None:
    from peraxis_format.engines.vllm.worker import VariantManager

    added: list[int] = []
    manager = object.__new__(VariantManager)
    manager._dummies, manager._permitted = set(), SimpleNamespace(source=str)  # type: ignore[assignment]
    manager.store = SimpleNamespace(  # type: ignore[assignment]
        touch=list, ids=lambda: set(added), add=lambda number, name, path: added.append(number)
    )
    # A set of vLLM's requests has another order in each process.
    requests: Any = [SimpleNamespace(lora_int_id=n, lora_name=f"v{n}", lora_path="") for n in (3, 1, 2)]
    manager.set_active_adapters(requests, None)
    assert added == [1, 2, 3]
