"""The tables of reports fit a terminal of 80 columns with the longest usual figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import peraxis_format as pxd
from peraxis_tools.deltas.inspection import inspect
from peraxis_tools.evaluate.types import DomainResult, EvaluateResult, Fidelity, Tail
from peraxis_tools.report.console import plain_text
from peraxis_tools.report.evaluate import render_evaluate
from peraxis_tools.report.inspect import render_inspect
from tests.factories import random_storage, sign_module


def evaluated(kl: float, kl_error: float, top1: float, loss: float) -> EvaluateResult:
    """An evaluation whose candidates all have these figures."""
    tail = Tail(median=kl, percentile_99=kl, share_of_worst_1=0.5, worst=(), special=())
    its = Fidelity(tokens=512, kl=kl, kl_error=kl_error, top1=top1, loss=loss, loss_fine_tuned=loss, tail=tail)
    candidates = dict.fromkeys(("base", "merged", "on-the-fly"), its)
    domain = DomainResult(
        domain="chat",
        source="chat.jsonl",
        digest="sha256:0",
        samples=50,
        sequence_length=512,
        tokens=25600,
        perplexity_fine_tuned=its.perplexity,
        candidates=candidates,
        perplexity=dict.fromkeys(candidates, its.perplexity),
        recovered=dict.fromkeys(candidates, -12.345),
        seen=False,
    )
    return EvaluateResult(
        base="base",
        fine_tuned="tuned",
        delta="d.pxd",
        content_id="sha256:0",
        bytes=1,
        other_fine_tune=None,
        domains=(domain,),
        tasks=(),
    )


@pytest.mark.parametrize(
    ("kl", "kl_error", "top1", "loss"),
    [(0.000123, 1e-05, 1.0, 12.0), (1.23e-05, 0.0001, 0.123, 4.0), (12.3, 0.3, 0, 0)],
)
def test_the_table_of_eval_has_at_most_80_columns_and_no_broken_title(
    kl: float, kl_error: float, top1: float, loss: float
) -> None:
    shown = plain_text(evaluated(kl, kl_error, top1, loss), render_evaluate, width=120)
    assert max(map(len, shown.splitlines())) <= 80
    assert shown == plain_text(evaluated(kl, kl_error, top1, loss), render_evaluate, width=80)


def test_the_calibration_of_inspect_has_its_counts_on_a_line_of_their_own(tmp_path: Path) -> None:
    source = "calibration.jsonl; 16 samples of the fine-tuned model"
    made = pxd.Calibration(source=source, digest="sha256:" + "0" * 64, samples=66, sequence_length=512, seed=0)
    base, tuned = pxd.Identity(id="base"), pxd.Identity(id="tuned")
    with pxd.DeltaWriter(tmp_path / "d.pxd", base=base, fine_tuned=tuned, calibration=made) as writer:
        rng = np.random.default_rng(0)
        writer.add(sign_module(rng, "a.weight", random_storage(rng, (16, 24))))
        writer.finish()
    shown = plain_text(inspect(tmp_path / "d.pxd"), render_inspect, width=80)
    assert f"calibration  {source}\n             66 x 512 tokens, seed 0\n" in shown
