"""Tensors that equal the base, or the base in another dtype, are exact and take no bytes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import peraxis_format as pxd
from peraxis_tools import apply
from peraxis_tools.compress import Plan, compress
from tests.factories import modules_of
from tests.tools.compress_pairs import FEW, llama_config, write_pair, write_text

KINDS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MATRIX = "model.layers.0.self_attn.q_proj.weight"


def checkpoint(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model.embed_tokens.weight": torch.randn(40, 32, generator=generator),
        MATRIX: torch.randn(48, 32, generator=generator),
        "model.norm.weight": torch.randn(32, generator=generator),
        "model.scale": torch.randn((), generator=generator),
    }


def applied(base: Path, delta: Path, folder: Path) -> dict[str, torch.Tensor]:
    apply(base, delta, folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("base_kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("options", [{}, {"target_ratio": 1.5}], ids=["plain", "target"])
def test_a_cast_of_the_base_is_exact_and_costs_no_byte(
    tmp_path: Path, base_kind: str, kind: str, options: dict[str, Any]
) -> None:
    before = {name: tensor.to(KINDS[base_kind]) for name, tensor in weights().items()}
    after = {name: tensor.to(KINDS[kind]) for name, tensor in before.items()}
    base, tuned = checkpoint(tmp_path / "base", before), checkpoint(tmp_path / "tuned", after)
    if options:  # the header is most of such a small file
        options = {"target_size": 1 << 16}
    plans: list[Plan] = []
    compress(base, tuned, tmp_path / "d.pxd", show_plan=plans.append, force=True, **options)
    assert base_kind == kind or plans[0].payload_bytes < 64 + 4  # a tensor of one number is stored whole
    assert {module.encoding for module in modules_of(tmp_path / "d.pxd").values()} == {pxd.Encoding.SAME}
    result = applied(base, tmp_path / "d.pxd", tmp_path / "applied")
    assert all(torch.equal(result[name], tensor) for name, tensor in after.items())


def test_each_tensor_is_asked_for_itself_and_new_rows_are_a_tail(tmp_path: Path) -> None:
    before = weights()
    after = {name: tensor.bfloat16() for name, tensor in before.items()}
    after[MATRIX] = (before[MATRIX] + 0.01 * torch.randn(48, 32)).bfloat16()
    table = "model.embed_tokens.weight"
    after[table] = torch.cat([after[table], torch.randn(3, 32).bfloat16()])
    base, tuned = checkpoint(tmp_path / "base", before), checkpoint(tmp_path / "tuned", after)
    compress(base, tuned, tmp_path / "d.pxd")
    modules = modules_of(tmp_path / "d.pxd")
    assert modules[MATRIX].encoding is pxd.Encoding.SIGN
    assert modules[table].encoding is pxd.Encoding.SAME
    with pxd.open(tmp_path / "d.pxd") as delta:
        tail = delta.load(table).tail
    assert tail is not None
    assert tail.shape == (3, 32)
    result = applied(base, tmp_path / "d.pxd", tmp_path / "applied")
    assert all(torch.equal(result[name], tensor) for name, tensor in after.items() if name != MATRIX)


def test_a_fit_leaves_what_is_only_cast_alone(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, llama_config())
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tuned))
    kept = [name for name in before if "layers.1." in name]
    changed = {name: (before if name in kept else after)[name].bfloat16() for name in after}
    save_file(changed, tuned / "model.safetensors", metadata={"format": "pt"})
    text = write_text(tmp_path / "text.jsonl")
    result = compress(base, tuned, tmp_path / "d.pxd", calibration=str(text), **FEW)
    modules = modules_of(tmp_path / "d.pxd")
    assert {name for name, module in modules.items() if module.encoding is pxd.Encoding.SAME} == set(kept)
    assert all(note == "unchanged" for name, note in result.notes.items() if name in kept)
    out = applied(base, tmp_path / "d.pxd", tmp_path / "applied")
    assert all(torch.equal(out[name], changed[name]) for name in kept)


def test_weights_near_the_limit_of_f16_stay_finite(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    edge = (1e5 * torch.randn(64, 96, generator=generator)).clamp(-65504, 65504)
    moved = (edge + 800 * torch.randn(64, 96, generator=generator)).clamp(-65504, 65504)
    other, plain = "model.layers.0.self_attn.k_proj.weight", weights()[MATRIX].half()
    base = checkpoint(tmp_path / "base", {MATRIX: edge.half(), other: plain})
    after = {MATRIX: moved.half(), other: plain + 0.1}
    tuned = checkpoint(tmp_path / "tuned", after)
    noted = compress(base, tuned, tmp_path / "d.pxd", masks=1, force=True).notes
    found = modules_of(tmp_path / "d.pxd")
    assert found[other].encoding is pxd.Encoding.SIGN
    assert found[MATRIX].encoding in (pxd.Encoding.EXACT, pxd.Encoding.FULL)
    assert "infinite in F16" in noted.pop(MATRIX)
    assert not noted
    assert torch.equal(applied(base, tmp_path / "d.pxd", tmp_path / "applied")[MATRIX], after[MATRIX])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in (10_000, 20_000):
            made = compress(base, tuned, tmp_path / f"{size}.pxd", target_size=size, force=True)
            assert made.bytes <= size
        priced = compress(base, tuned, tmp_path / "priced.pxd", force=True)
    assert priced.encodings.get("sign") == 1
