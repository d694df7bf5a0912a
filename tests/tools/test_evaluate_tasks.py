"""`eval --tasks` runs lm-eval on a task that is defined in a folder. Tests skip if lm-eval is not installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from peraxis_tools.compress import compress
from peraxis_tools.errors import ToolError
from peraxis_tools.evaluate import evaluate
from tests.tools.compress_pairs import llama_config, write_pair

pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'peraxis[tasks]')")
# lm-eval and its imports emit their own warnings.
pytestmark = pytest.mark.filterwarnings("default")

QUESTIONS = 12
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}\\nAnswer:"
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def write_task(folder: Path, name: str, data: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data))
    return folder


def test_a_task_scores_every_model_as_its_own_likelihoods_say(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, llama_config(), step=0.2)
    compress(base, tuned, tmp_path / "delta.pxd", fit="none", embeddings="full")
    data = tmp_path / "questions.jsonl"
    rows = [{"query": f"{a} {b}", "choices": ["red", "tree"], "gold": (a > b) * 1} for a in "rs" for b in "tuvwxy"]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(rows) == QUESTIONS
    (found,) = evaluate(
        base, tuned, tmp_path / "delta.pxd", {}, tasks=("homemade",),
        task_path=write_task(tmp_path / "tasks", "homemade", data), device="cpu",
    ).tasks  # fmt: skip
    assert (found.task, found.metric, found.samples) == ("homemade", "acc", QUESTIONS)
    assert set(found.scores) == {"fine-tuned", "base", "merged"}
    assert found.scores["fine-tuned"] == pytest.approx(accuracy(tuned, rows))
    assert found.scores["base"] == pytest.approx(accuracy(base, rows))


@torch.no_grad()
def accuracy(folder: Path, rows: list[dict[str, object]]) -> float:
    """Return the share of questions whose right answer is the likelier continuation, by transformers only."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def likelihood(context: str, choice: str) -> float:
        start = len(tokenizer(context)["input_ids"])
        ids = tokenizer(context + choice, return_tensors="pt")["input_ids"]
        chances = torch.log_softmax(model(input_ids=ids).logits[0, :-1].double(), -1)
        return float(chances.gather(1, ids[0, 1:, None])[start - 1 :].sum())

    right = 0
    for row in rows:
        scores = [likelihood(f"{row['query']}\nAnswer:", f" {choice}") for choice in row["choices"]]  # type: ignore[attr-defined]
        right += scores.index(max(scores)) == row["gold"]
    return right / len(rows)


def test_an_unknown_task_is_named(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, llama_config())
    compress(base, tuned, tmp_path / "delta.pxd", fit="none")
    with pytest.raises(ToolError, match="task nonesuch: not in lm-eval"):
        evaluate(base, tuned, tmp_path / "delta.pxd", {}, tasks=("nonesuch",), device="cpu")


def test_questions_of_the_shared_data_run(tmp_path: Path, shared: Path) -> None:
    base, tuned = shared / "pairs" / "stories260K", shared / "pairs" / "stories260K-shakespeare"
    compress(base, tuned, tmp_path / "delta.pxd", fit="none")
    (found,) = evaluate(
        base, tuned, tmp_path / "delta.pxd", {}, tasks=("local_arc_easy",), task_limit=8, device="cpu",
        task_path=write_task(tmp_path / "tasks", "local_arc_easy", shared / "eval" / "arc_easy.jsonl"),
    ).tasks  # fmt: skip
    assert found.samples == 8
    assert all(0.0 <= score <= 1.0 for score in found.scores.values())
    assert all(error is not None for error in found.errors.values())
