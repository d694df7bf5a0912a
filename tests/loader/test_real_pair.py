"""The stories pair, compressed by the tools, works with every way of loading it."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peraxis_format.torch import VariantSwitch, apply_
from peraxis_format.torch.serve.api import serve
from tests.loader.support import bytes_of, expected_bytes, named_tensors, write_delta

transformers = pytest.importorskip("transformers")
TIED = {"lm_head.weight": "model.embed_tokens.weight"}


@pytest.fixture(scope="module")
def delta(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A delta of the fine-tune on Shakespeare with signs and scales, including embeddings."""
    path = tmp_path_factory.mktemp("pair") / "shakespeare.pxd"
    pair = [str(shared / "pairs" / name) for name in ("stories260K", "stories260K-shakespeare")]
    command = ["compress", *pair, "-o", str(path), "--fit", "none", "--embeddings", "sign"]
    done = subprocess.run(
        [sys.executable, "-m", "peraxis_tools", *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return path


def load(shared: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(shared / "pairs" / "stories260K", dtype=dtype).eval()


def test_a_compressed_fine_tune_is_applied_bit_for_bit(shared: Path, delta: Path) -> None:
    model = load(shared)
    base = {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()}
    apply_(model, delta)
    expected = expected_bytes(delta, base)
    found = bytes_of(named_tensors(model))
    assert {name: found[name] for name in expected} == expected
    assert found.keys() - expected.keys() <= {"lm_head.weight"}  # tied: the checkpoint has no tensor for it
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_swapping_between_generations_changes_who_writes(shared: Path, delta: Path) -> None:
    model = load(shared)
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared / "pairs" / "stories260K")
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with VariantSwitch(model) as switch:
        switch.add("shakespeare", delta, "file")
        first = model.generate(ids, **options)
        switch.use("shakespeare")
        other = model.generate(ids, **options)
        switch.use(None)
        assert torch.equal(model.generate(ids, **options), first)
        assert not torch.equal(other, first)


@torch.no_grad()
def test_a_batch_of_three_writers_is_what_each_would_have_written(shared: Path, delta: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared / "pairs" / "stories260K")
    model: nn.Module = load(shared)
    base = {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()}
    paths = {"shakespeare": delta, "noise": write_delta(tmp_path / "n.pxd", base, seed=3, components=2, tied=TIED)}
    # The prompts are so long that every linear uses the merged weights, so the logits are those of the merged models.
    ids = tokenizer(["Once upon a time, there was a little girl. " * 8] * 3, return_tensors="pt")["input_ids"][:, :80]
    wanted = ["shakespeare", None, "noise"]
    whole = []
    for name in wanted:
        one = copy.deepcopy(model)
        if name is not None:
            apply_(one, paths[name])
        whole.append(one(ids[:1]).logits[0])
    with serve(model, paths) as served, served.using(wanted):
        found = model(ids).logits
    for one, expected in zip(found, whole, strict=True):
        torch.testing.assert_close(one.float(), expected.float(), rtol=0.02, atol=0.15)
        assert (one.argmax(-1) == expected.argmax(-1)).float().mean() > 0.95
