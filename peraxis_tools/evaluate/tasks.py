"""Zero-shot tasks through lm-eval: the fine-tuned model, the base, and base + delta as `apply` writes it.

lm-eval is an optional extra and is imported only here. Questions come from the hub or from task definitions in a
folder (task_path).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from peraxis_format.arguments import did_you_mean
from peraxis_tools.errors import ToolError, first_line
from peraxis_tools.evaluate.types import TaskResult
from peraxis_tools.process.optional import require

__all__ = ["run_tasks"]

_MODELS: Final = ("fine-tuned", "base", "merged")
# The reported metric of a task is the first of these that it has.
_METRICS: Final = ("acc_norm", "acc", "exact_match", "word_perplexity")


def run_tasks(
    load: Callable[[str], Any],
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None,
    path: Path | None,
    batch_size: int,
) -> tuple[TaskResult, ...]:
    """The metric of each task for each model, with one model in memory at a time.

    load: returns a model by name (fine-tuned, base, merged). limit: questions of each task. path: a folder of task
    definitions. Raises ToolError if lm-eval is missing, a task is unknown, or its data is not available.
    """
    manager = _manager(tasks, path)
    by_model: dict[str, Mapping[str, Any]] = {}
    with _quiet():
        for name in _MODELS:
            by_model[name] = _evaluate(load(name), tokenizer, tasks, manager, limit, batch_size)
    return tuple(_result(task, by_model) for task in by_model[_MODELS[0]]["results"])


def _manager(tasks: Sequence[str], path: Path | None) -> Any:
    require("--tasks", "lm_eval")
    from lm_eval.tasks import TaskManager

    if path is not None:
        own = TaskManager(include_path=str(path), include_defaults=False)
        if set(tasks) <= set(own.all_tasks):
            return own  # reading the thousands of definitions of lm-eval takes much longer
    manager = TaskManager(include_path=None if path is None else str(path))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        where = "" if path is None else f" or {path}"
        hint = did_you_mean(unknown[0], manager.all_tasks)
        raise ToolError(f"task {unknown[0]}: not in lm-eval{where}; `lm-eval ls tasks` lists them{hint}")
    return manager


def _evaluate(
    model: Any, tokenizer: Any, tasks: Sequence[str], manager: Any, limit: int | None, batch_size: int
) -> Mapping[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        found: Mapping[str, Any] | None = simple_evaluate(
            wrapped, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False, bootstrap_iters=100
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ToolError(f"tasks {','.join(tasks)}: lm-eval cannot run them: {first_line(error)}") from error
    if found is None:
        raise ToolError(f"tasks {','.join(tasks)}: lm-eval gave no result in this process")
    return found


def _result(task: str, by_model: Mapping[str, Mapping[str, Any]]) -> TaskResult:
    first = by_model[_MODELS[0]]
    # lm-eval's keys are "metric,filter".
    names = {key.split(",")[0]: key for key in first["results"][task] if "," in key and "_stderr" not in key}
    if not names:
        raise ToolError(f"task {task}: lm-eval reports no metric for it")
    metric = next((name for name in _METRICS if name in names), next(iter(names)))
    key = names[metric]
    error_key = key.replace(metric, f"{metric}_stderr", 1)
    rows = {model: found["results"][task] for model, found in by_model.items()}
    samples = first.get("n-samples", {}).get(task, {}).get("effective")
    return TaskResult(
        task=task,
        metric=metric,
        samples=samples,
        scores={model: float(row[key]) for model, row in rows.items()},
        errors={model: _number(row.get(error_key)) for model, row in rows.items()},
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None  # lm-eval writes "N/A"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence lm-eval, which logs its settings and draws bars."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
