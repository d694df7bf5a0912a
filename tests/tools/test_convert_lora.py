"""PEFT loads the LoRA adapters of many architectures and gives the logits of the tensors reported as carried."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from peraxis_tools import apply
from peraxis_tools.commands.convert import command
from peraxis_tools.compress import compress
from peraxis_tools.convert import LoraResult, to_lora
from peraxis_tools.errors import ToolError
from tests.tools.compress_pairs import SMALL

peft = pytest.importorskip("peft")

GROUPED = {**SMALL, "num_key_value_heads": 2}
EXPERTS = {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

STATE_SPACE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
WHOLE = ("llama", "qwen2", "mixtral", "qwen3-moe", "qwen2-moe", "olmoe", "deepseek", "gpt2-untied", "phi")


def configurations() -> dict[str, Any]:
    gpt2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "eos_token_id": 1}
    return {
        "llama": hf.LlamaConfig(**GROUPED),
        "llama-tied": hf.LlamaConfig(**GROUPED, tie_word_embeddings=True),
        "qwen2": hf.Qwen2Config(**GROUPED),
        "gpt2": hf.GPT2Config(**gpt2),
        "gpt2-untied": hf.GPT2Config(**gpt2, tie_word_embeddings=False),
        "gpt-neox": hf.GPTNeoXConfig(**SMALL),
        "opt": hf.OPTConfig(**{**SMALL, "pad_token_id": 2}, ffn_dim=44, word_embed_proj_dim=32),
        "phi": hf.PhiConfig(**GROUPED),
        "mixtral": hf.MixtralConfig(**GROUPED, num_local_experts=4),
        "qwen3-moe": hf.Qwen3MoeConfig(**EXPERTS, head_dim=8),
        "qwen3-moe-with-a-dense-layer": hf.Qwen3MoeConfig(**EXPERTS, head_dim=8, mlp_only_layers=[0]),
        "qwen2-moe": hf.Qwen2MoeConfig(**EXPERTS, shared_expert_intermediate_size=24),
        "olmoe": hf.OlmoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2),
        "gpt-oss": hf.GptOssConfig(**GROUPED, num_local_experts=4, head_dim=8),
        "deepseek": hf.DeepseekV3Config(**SMALL, **DEEPSEEK),
        "falcon": hf.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
        "gemma2": hf.Gemma2Config(**{**GROUPED, "pad_token_id": 0}, head_dim=8),
        "mamba": hf.MambaConfig(**STATE_SPACE),
        "mamba2": hf.Mamba2Config(**STATE_SPACE, num_heads=8, head_dim=8, n_groups=1),
    }


def pair(folder: Path, config: Any) -> tuple[Path, Path]:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    model.save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned"


def carried(base: Path, applied: Path, result: LoraResult, folder: Path) -> Path:
    """Return the applied checkpoint with the base's tensors for those that the adapter does not carry."""
    before, after = (load_file(source / "model.safetensors") for source in (base, applied))
    lost = {item.name for item in result.left_out}
    folder.mkdir()
    mixed = {name: before[name] if name in lost else tensor for name, tensor in after.items()}
    save_file(mixed, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    return folder


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def adapted(base: Path, adapter: Path) -> Any:
    model = hf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, adapter)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", configurations())
def test_peft_gives_the_logits_of_what_the_adapter_carries(tmp_path: Path, name: str) -> None:
    base, tuned = pair(tmp_path, configurations()[name])
    compress(base, tuned, tmp_path / "d.pxd")
    result = to_lora(tmp_path / "d.pxd", tmp_path / "adapter", rank=64, base=base)
    apply(base, tmp_path / "d.pxd", tmp_path / "applied")
    expected = carried(base, tmp_path / "applied", result, tmp_path / "expected")
    ours = logits(adapted(base, tmp_path / "adapter"))
    theirs = logits(hf.AutoModelForCausalLM.from_pretrained(expected, dtype=torch.float32))
    before = logits(hf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    scale = float((theirs - before).abs().max())
    assert float((ours - theirs).abs().max()) < 2e-3 * scale
    moved = {*result.saved_whole, *result.biases, *(module.name for module in result.modules)}
    original, changed = (load_file(folder / "model.safetensors") for folder in (base, tuned))
    names = {tensor for tensor in changed if not torch.equal(original[tensor], changed[tensor])}
    assert moved | {item.name for item in result.left_out} == names
    if name in WHOLE:
        assert result.left_out == ()
        assert result.error < 1e-4


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_what_is_kept_counts_every_tensor_where_the_base_is_given(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, configurations()["gpt2"])
    compress(base, tuned, tmp_path / "d.pxd")
    result = to_lora(tmp_path / "d.pxd", tmp_path / "adapter", rank=64, base=base)
    apply(base, tmp_path / "d.pxd", tmp_path / "applied")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "applied"))
    change = {name: float((after[name] - before[name]).double().square().sum()) for name in after}
    lost = sum(change[item.name] for item in result.left_out)
    assert {"transformer.wte.weight"} == {item.name for item in result.left_out}
    assert result.error == pytest.approx((lost / sum(change.values())) ** 0.5, rel=1e-3)
    assert result.uncounted == 0


def test_a_norm_whose_bias_did_not_change_needs_the_base(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, configurations()["gpt2-untied"])
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tuned))
    bias = next(name for name in after if name.endswith("h.0.ln_1.bias"))
    after[bias] = before[bias]
    save_file(after, tuned / "model.safetensors", metadata={"format": "pt"})
    compress(base, tuned, tmp_path / "d.pxd")
    without = to_lora(tmp_path / "d.pxd", tmp_path / "without", rank=4)
    weight = bias.replace("bias", "weight")
    assert {item.name: item.reason for item in without.left_out}[weight].endswith("pass --base")
    assert without.uncounted == 1
    given = to_lora(tmp_path / "d.pxd", tmp_path / "with", rank=4, base=base)
    assert weight in given.saved_whole


def test_a_delta_with_nothing_to_adapt_says_why(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, configurations()["llama"])
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tuned))
    kept = {name: after[name] if "norm" in name else before[name] for name in after}
    save_file(kept, tuned / "model.safetensors", metadata={"format": "pt"})
    compress(base, tuned, tmp_path / "d.pxd")
    with pytest.raises(ToolError, match="has no matrix"):
        to_lora(tmp_path / "d.pxd", tmp_path / "adapter", rank=4)


def test_the_command_takes_the_base_and_says_what_is_left_out(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, configurations()["gpt2"])
    compress(base, tuned, tmp_path / "d.pxd")
    arguments = [
        str(tmp_path / "d.pxd"),
        "--to",
        "lora",
        "--rank",
        "64",
        "-o",
        str(tmp_path / "a"),
        "--base",
        str(base),
    ]
    done = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert "left out" in done.stdout
    assert "transformer.wte.weight: is tied" in done.stdout
    assert re.search(r"\(\d+\.\d% of the square norm kept\)", done.stdout)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("vocabulary", [56, 72])
def test_an_adapter_of_another_vocabulary_loads_on_the_base_and_leaves_the_tables_out(
    tmp_path: Path, vocabulary: int
) -> None:
    base, tuned = pair(tmp_path, hf.LlamaConfig(**{**SMALL, "vocab_size": 64}))
    model = hf.AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32)
    model.resize_token_embeddings(vocabulary)
    model.save_pretrained(tuned)
    compress(base, tuned, tmp_path / "d.pxd", force=True)
    result = to_lora(tmp_path / "d.pxd", tmp_path / "adapter", rank=64, base=base)
    assert {item.name for item in result.left_out} == {"lm_head.weight", "model.embed_tokens.weight"}
    adapted(base, tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("vocabulary", "given"), [(64, False), (64, True), (72, True), (72, False)])
def test_a_tensor_in_no_figure_has_its_own_reason(tmp_path: Path, vocabulary: int, given: bool) -> None:
    base, tuned = pair(tmp_path, hf.LlamaConfig(**{**SMALL, "vocab_size": 64}, tie_word_embeddings=True))
    model = hf.AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32)
    model.resize_token_embeddings(vocabulary)
    model.save_pretrained(tuned)
    compress(base, tuned, tmp_path / "d.pxd", embeddings="full", force=True)
    arguments = ["d.pxd", "--to", "lora", "--rank", "4", "-o", "a", *(["--base", "base"] if given else [])]
    words = [str(tmp_path / word) if word in ("d.pxd", "a", "base") else word for word in arguments]
    done = CliRunner().invoke(command, words, catch_exceptions=False)
    (line,) = [line for line in done.stdout.splitlines() if "uncounted" in line] or [""]
    shown = " ".join(done.stdout.split())
    if vocabulary == 72:
        assert "in no figure: 1 of another shape than in the base" in shown
    elif given:
        assert line == ""
    else:
        assert "in no figure: 1 known only with --base" in shown
