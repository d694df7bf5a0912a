"""The pairing of two checkpoints: bad pairs are refused, and renames are reported, before any work."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from peraxis_tools import apply
from peraxis_tools.compress import compress
from peraxis_tools.errors import ToolError
from tests.factories import modules_of
from tests.tools.compress_pairs import FEW, SMALL, llama_config, write_pair, write_text

Q = "model.layers.0.self_attn.q_proj.weight"


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "model.embed_tokens.weight": (64, 32),
        Q: (64, 64),
        "model.norm.weight": (32,),
        "lm_head.weight": (64, 32),
    }
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


def moved(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {n: (t.float() + 0.01 * torch.randn(t.shape, generator=generator)).bfloat16() for n, t in tensors.items()}


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", "_orig_mod."),
        ("", "module."),
        ("", "module._orig_mod."),
        ("", "base_model.model."),
        ("model.", "model.language_model."),
        ("model.", "language_model.model."),
        ("model.", ""),
    ],
)
@pytest.mark.parametrize("wrapped", ["tuned", "base"])
def test_a_prefix_is_mapped_to_the_bases_names_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, old: str, new: str, wrapped: str
) -> None:
    plain = weights()
    other = {new + name.removeprefix(old) if name.startswith(old) else name: name for name in plain}
    tuned = moved(plain)
    sides = {"base": plain, "tuned": tuned}
    sides[wrapped] = {name: sides[wrapped][source] for name, source in other.items()}
    base, fine_tuned = (write(tmp_path / side, tensors) for side, tensors in sides.items())
    with caplog.at_level(logging.WARNING, "peraxis"):
        compress(base, fine_tuned, tmp_path / "d.pxd")
    assert set(modules_of(tmp_path / "d.pxd")) == set(sides["base"])
    assert all(module.base is not None for module in modules_of(tmp_path / "d.pxd").values())
    assert "tensors take the base's names" in caplog.text
    apply(base, tmp_path / "d.pxd", tmp_path / "applied")
    applied = load_file(tmp_path / "applied" / "model.safetensors")
    norm = next(name for name in applied if name.endswith("norm.weight"))
    assert torch.equal(applied[norm], tuned["model.norm.weight"])


def test_a_wrapped_fine_tune_is_fitted_as_the_plain_one(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, llama_config())
    text = write_text(tmp_path / "text.jsonl")
    few = {**FEW, "calibration_samples": 4}
    compress(base, tuned, tmp_path / "plain.pxd", calibration=str(text), **few)
    tensors = load_file(tuned / "model.safetensors")
    write(tuned, {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()})
    compress(base, tuned, tmp_path / "wrapped.pxd", calibration=str(text), **few)
    assert (tmp_path / "plain.pxd").read_bytes() == (tmp_path / "wrapped.pxd").read_bytes()


def test_names_that_are_there_are_not_renamed(tmp_path: Path) -> None:
    base = write(tmp_path / "base", weights())
    tuned = moved(weights()) | {
        "module.extra.weight": torch.ones(3, 3),
        "layers.0.self_attn.q_proj.weight": weights()[Q],
    }
    compress(base, write(tmp_path / "tuned", tuned), tmp_path / "d.pxd")
    found = modules_of(tmp_path / "d.pxd")
    assert {"extra.weight", "layers.0.self_attn.q_proj.weight", Q} <= set(found)
    assert found["layers.0.self_attn.q_proj.weight"].base is None


def quantised(kind: str) -> dict[str, torch.Tensor]:
    """Return the base with its largest matrix quantized as by the given method."""
    plain = weights()
    rest = {name: tensor for name, tensor in plain.items() if name != Q}
    stem = Q.removesuffix(".weight")
    changed: dict[str, dict[str, torch.Tensor]] = {
        "bitsandbytes": {Q: torch.zeros(2048, 1, dtype=torch.uint8), f"{Q}.absmax": torch.rand(64)},
        "GPTQ": {f"{stem}.qweight": torch.zeros(8, 64, dtype=torch.int32), f"{stem}.scales": torch.rand(1, 64).half()},
        "FP8": {Q: plain[Q].to(torch.float8_e4m3fn), f"{Q}_scale_inv": torch.ones(1, 1)},
        "MXFP4": {
            f"{stem}_blocks": torch.zeros(64, 2, 16, dtype=torch.uint8),
            f"{stem}_scales": torch.zeros(64, 2, dtype=torch.uint8),
        },
    }
    return rest | changed[kind]


@pytest.mark.parametrize("kind", ["bitsandbytes", "GPTQ", "FP8", "MXFP4"])
@pytest.mark.parametrize("side", ["base", "fine-tune"])
def test_a_quantised_side_is_named_with_what_to_pass_instead(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, side: str
) -> None:
    plain, small = weights() | {"model.big": torch.ones(4)}, quantised(kind)
    base, tuned = (plain, small) if side == "fine-tune" else (small, moved(plain))
    said = rf"the {side} is quantised \({kind}.*pass the unquantised {side}"
    folders = write(tmp_path / "base", base), write(tmp_path / "tuned", tuned)
    with caplog.at_level(logging.WARNING, "peraxis"):
        try:
            compress(*folders, tmp_path / "d.pxd")
        except ToolError as error:
            caplog.records.clear()
            logging.getLogger("peraxis").warning(str(error))
    assert re.search(said, " ".join(record.getMessage() for record in caplog.records))


def test_a_delta_that_saves_little_needs_force(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = write(
        tmp_path / "base", {f"other.{name}": tensor for name, tensor in weights().items()} | {"a": torch.ones(2)}
    )
    tuned = write(tmp_path / "tuned", moved(weights()) | {"a": torch.ones(2)})
    with pytest.raises(ToolError, match=r"would take \d+ of \d+ bytes: .*not in the base.*--force"):
        compress(base, tuned, tmp_path / "d.pxd")
    assert not (tmp_path / "d.pxd").exists()
    with caplog.at_level(logging.WARNING, "peraxis"):
        compress(base, tuned, tmp_path / "d.pxd", force=True)
    assert "lacks 4 of the base's tensors" in caplog.text
    assert "would take" in caplog.text


@pytest.mark.parametrize(
    ("value", "said"), [(float("nan"), "NaN"), (float("inf"), "infinity"), (float("-inf"), "infinity")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_a_weight_that_is_no_number_is_named_with_its_index(
    tmp_path: Path, value: float, said: str, dtype: torch.dtype, side: str
) -> None:
    sides = {"base": weights(), "tuned": moved(weights())}
    sides = {name: {n: t.to(dtype) for n, t in tensors.items()} for name, tensors in sides.items()}
    sides[side][Q][3, 5] = value
    folders = [write(tmp_path / name, tensors) for name, tensors in sides.items()]
    expected = rf"{side}: {Q} holds {said} at \[3, 5\] \(1 of 4096"
    with pytest.raises(ToolError, match=expected):
        compress(*folders, tmp_path / "d.pxd")
    with pytest.raises(ToolError, match=expected):
        compress(*folders, tmp_path / "d.pxd", target_size=1 << 16)
    assert not list(tmp_path.glob("*.pxd*"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_no_scale_reaches_is_named_and_can_be_stored_exactly(
    tmp_path: Path, dtype: torch.dtype, recwarn: pytest.WarningsRecorder
) -> None:
    before, after = ({n: t.to(dtype) for n, t in tensors.items()} for tensors in (weights(), moved(weights())))
    after[Q][3, 5] = 1e30
    base, tuned = write(tmp_path / "base", before), write(tmp_path / "tuned", after)
    with pytest.raises(ToolError, match=rf"tuned: {Q} holds 1e\+30 at \[3, 5\] \(1 of 4096 .*--exact"):
        compress(base, tuned, tmp_path / "d.pxd")
    assert not recwarn.list
    compress(base, tuned, tmp_path / "d.pxd", exact=re.escape(Q))
    apply(base, tmp_path / "d.pxd", tmp_path / "applied")
    assert torch.equal(load_file(tmp_path / "applied" / "model.safetensors")[Q], after[Q])


def test_what_is_exact_may_hold_anything(tmp_path: Path) -> None:
    before, after = weights(), moved(weights())
    after["model.norm.weight"][3] = float("-inf")
    before[Q][0, 0] = after[Q][0, 0] = float("nan")
    after[Q] = before[Q].clone()
    base, tuned = write(tmp_path / "base", before), write(tmp_path / "tuned", after)
    compress(base, tuned, tmp_path / "d.pxd")
    apply(base, tmp_path / "d.pxd", tmp_path / "applied")
    applied = load_file(tmp_path / "applied" / "model.safetensors")
    for name in (Q, "model.norm.weight"):
        assert torch.equal(applied[name].view(torch.int16), after[name].view(torch.int16))


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"model.empty": torch.zeros(0)}, r"'model\.empty' has no elements \(shape \[0\]\)"),
        ({"model.wide": torch.zeros(3, 0, 2)}, r"shape \[3, 0, 2\]"),
        ({"mod\u00e8le.weight": torch.zeros(2)}, "a name that PXD does not allow"),
        ({"a/b": torch.zeros(2)}, "a name that PXD does not allow"),
        ({"model.deep": torch.zeros((1,) * 9)}, "has 9 dimensions"),
        ({f"{Q[:-7]}.lora_A.default.weight": torch.zeros(4, 64)}, "merge_and_unload"),
    ],
)
def test_what_no_delta_can_hold_is_named_before_the_work(tmp_path: Path, extra: dict[str, Any], said: str) -> None:
    base, tuned = write(tmp_path / "base", weights()), write(tmp_path / "tuned", moved(weights()) | extra)
    with pytest.raises(ToolError, match=said):
        compress(base, tuned, tmp_path / "d.pxd")


def resized_models() -> dict[str, tuple[Any, Any]]:
    t5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return {
        "phi": (hf.PhiConfig(**SMALL), hf.AutoModelForCausalLM),
        "t5": (hf.T5Config(**t5, decoder_start_token_id=0), hf.AutoModelForSeq2SeqLM),
        "mamba": (
            hf.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8),
            hf.AutoModelForCausalLM,
        ),
        "bert": (hf.BertConfig(**{**SMALL, "pad_token_id": 0}), hf.AutoModelForMaskedLM),
        "gpt2": (hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64), hf.AutoModelForCausalLM),
    }


@pytest.mark.parametrize("name", resized_models())
@pytest.mark.parametrize("rows", [72, 60])
def test_a_resized_vocabulary_keeps_what_both_have_and_stores_the_new_exactly(
    tmp_path: Path, name: str, rows: int
) -> None:
    config, kind = resized_models()[name]
    torch.manual_seed(0)
    model = kind.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape)
    model.resize_token_embeddings(rows, mean_resizing=False)
    model.save_pretrained(tmp_path / "tuned")
    compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "d.pxd")
    apply(tmp_path / "base", tmp_path / "d.pxd", tmp_path / "applied")
    expected, applied = (load_file(tmp_path / f / "model.safetensors") for f in ("tuned", "applied"))
    changed = [n for n, m in modules_of(tmp_path / "d.pxd").items() if m.base is not None and m.base.shape != m.shape]
    assert changed
    for tensor in changed:
        assert torch.equal(applied[tensor][64:], expected[tensor][64:])
        assert applied[tensor].shape == expected[tensor].shape
        if expected[tensor].dim() == 1:
            assert torch.equal(applied[tensor], expected[tensor])
    assert kind.from_pretrained(tmp_path / "applied").get_input_embeddings().weight.shape[0] == rows
