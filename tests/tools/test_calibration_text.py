"""Every report shows the weights of calibration texts that differ, and leaves the file as it is."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import peraxis_format as pxd
from peraxis_tools.card import CardDelta, card_text
from peraxis_tools.commands.inspect import command
from peraxis_tools.deltas.calibration_text import calibration_text
from peraxis_tools.inspect import inspect
from peraxis_tools.inspect_details import details
from peraxis_tools.report.html import page
from tests.factories import random_storage, sign_module

OWN = "; 4 samples of the fine-tuned model"


def said(source: str, options: object) -> str:
    config = options if isinstance(options, str) else json.dumps({"calibration": options})
    manifest: Any = SimpleNamespace(calibration=SimpleNamespace(source=source), metadata={"peraxis.config": config})
    return calibration_text(manifest)


@pytest.mark.parametrize(
    ("source", "texts", "shown"),
    [
        ("a.jsonl; b.jsonl", ["a.jsonl:2", "b.jsonl:1"], "a.jsonl (weight 2); b.jsonl (weight 1)"),
        (f"a.jsonl; c4{OWN}", ["a.jsonl", "c4:0.5"], f"a.jsonl (weight 1); c4 (weight 0.5){OWN}"),
        ("a; b.jsonl; org/d:en", ["a; b.jsonl:3", "org/d:en"], "a; b.jsonl (weight 3); org/d:en (weight 1)"),
        ("cal:2; b.jsonl", ["cal:2", "b.jsonl:2"], "cal:2 (weight 1); b.jsonl (weight 2)"),
    ],
)
def test_weights_that_differ_are_shown(source: str, texts: list[str], shown: str) -> None:
    assert said(source, texts) == shown


@pytest.mark.parametrize(
    "options",
    [
        "a.jsonl:2",
        ["a.jsonl:2", "b.jsonl:2"],
        ["a.jsonl", "b.jsonl"],
        ["x.jsonl:2", "b.jsonl"],
        ["a.jsonl:x", "b.jsonl"],
        ["a.json", "l; b.jsonl:2"],
        [1, 2],
        None,
        "[" * 100_000,
        "{",
        "[]",
    ],
)
def test_a_source_stays_as_it_is_where_no_weights_differ_or_the_options_do_not_fit(options: object) -> None:
    assert said(f"a.jsonl; b.jsonl{OWN}", options) == f"a.jsonl; b.jsonl{OWN}"


def test_the_reports_of_a_file_show_its_weights(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "delta.pxd"
    calibration = pxd.Calibration(
        digest="sha256:" + "0" * 64, samples=6, seed=0, sequence_length=512, source="a.jsonl; b.jsonl"
    )
    metadata = {"peraxis.config": json.dumps({"calibration": ["a.jsonl:2", "b.jsonl"]})}
    base, tuned = pxd.Identity(id="org/base"), pxd.Identity(id="org/tuned")
    with pxd.DeltaWriter(path, base=base, fine_tuned=tuned, calibration=calibration, metadata=metadata) as writer:
        writer.add(sign_module(rng, "model.layers.0.mlp.up_proj.weight", random_storage(rng, (8, 16))))
        writer.finish()
    shown = "a.jsonl (weight 2); b.jsonl (weight 1)"
    printed = CliRunner().invoke(command, [str(path)])
    assert f"{shown} 6 x 512 tokens" in " ".join(printed.output.split())
    assert f"{shown}, 6 x 512 tokens" in page(inspect(path), details(path))
    pytest.importorskip("huggingface_hub")
    card = card_text("org/delta", [CardDelta(file="delta.pxd", found=inspect(path))])
    assert shown in card.replace("\\", "")
