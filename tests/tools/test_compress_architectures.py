"""The same code finds, fits and rebuilds small random models of many families, without a list of architectures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import peraxis_format as pxd
from peraxis_tools.checkpoints.parameter_names import map_names
from peraxis_tools.compress import CompressOptions, compress
from peraxis_tools.compress.distill.distill import checkpoint_layers
from peraxis_tools.compress.distill.losses import TeacherStates
from peraxis_tools.compress.fit.moments.recorder import Call, Observer
from peraxis_tools.compress.model.layerwise_model import LayerwiseModel
from peraxis_tools.compress.run.work_folder import WorkFolder
from tests.tools.compress_pairs import VOCABULARY, write_pair, write_text

COMMON = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True),
    "mistral": lambda: transformers.MistralConfig(**COMMON, sliding_window=8),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON, head_dim=8),
    "phi3": lambda: transformers.Phi3Config(**COMMON),
    "gemma": lambda: transformers.GemmaConfig(**COMMON, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(**COMMON, head_dim=8, sliding_window=8),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=32, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=1
    ),
    "mixtral": lambda: transformers.MixtralConfig(**COMMON, num_local_experts=4),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(**COMMON, **MIXTURE),
    "granite-moe": lambda: transformers.GraniteMoeConfig(**COMMON, num_local_experts=4),
    "gpt-oss": lambda: transformers.GptOssConfig(**COMMON, num_local_experts=4, head_dim=8, sliding_window=8),
}
TRANSPOSED = {"gpt2", "gpt-oss"}
FUSED = {"granite-moe", "gpt-oss"}


def model_of(folder: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_run_block_by_block_gives_the_logits_of_the_whole(family: str) -> None:
    torch.manual_seed(0)
    config = FAMILIES[family]()
    whole = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = whole.state_dict()
    model = LayerwiseModel(config, dtype=torch.float32, device=torch.device("cpu"))
    for name in model.outer_parameters():
        model.set(name, state[name])
    ids = torch.randint(0, 32, (2, 24))
    calls: list[Call] = []
    with torch.no_grad():
        hidden = model.embed(ids)
        for index in range(len(model)):
            names = model.layer_parameters(index)
            for name in names:
                model.set(name, state[name])
            with Observer([(name, model.get(name)) for name in names], calls.append):
                hidden = model.run_layer(index, ids, hidden)
            model.empty(index)
        logits = model.head(ids, hidden)
        expected = whole(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    seen = {call.parameter for call in calls}
    matrices = {n for n in state if n.startswith(model.prefix) and state[n].dim() > 1 and "bias" not in n}
    assert seen == matrices
    assert any(call.transposed for call in calls) == (family in TRANSPOSED)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_of_a_freed_teacher_gives_the_logits_of_the_whole(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = FAMILIES[family]()
    whole = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    teacher = LayerwiseModel(config, dtype=torch.float32, device=torch.device("cpu"))
    for name, value in whole.state_dict().items():
        teacher.set(name, value)
    teacher.retie()
    ids = torch.randint(0, 32, (3, 24))
    states = TeacherStates(teacher, WorkFolder(tmp_path / "d.pxd", "digest", resume=False), 1 << 20)
    states.keep({"fit": ids}, lambda done, total: None)
    assert all(parameter.is_meta for parameter in teacher.layers.parameters())
    kept = states.of(ids, "fit", range(3))
    parts = [states.logits(ids, kept, part) for part in (slice(0, 7), slice(7, 24))]
    with torch.no_grad():
        expected = whole(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_saved_tensor_is_found_in_the_model(family: str, tmp_path: Path) -> None:
    base, _ = write_pair(tmp_path, FAMILIES[family]())
    state = model_of(base).state_dict()
    with pxd.Safetensors.open(base) as tensors:
        names = map_names(
            LayerwiseModel(FAMILIES[family](), dtype=torch.float32, device=torch.device("cpu")).model, tensors
        )
        assert names.unmapped == ()
        for tensor, piece in names.by_tensor.items():
            stored = torch.from_numpy(tensors.read(tensor))
            assert torch.equal(piece.select(state[piece.parameter]), stored), tensor


@pytest.mark.parametrize("family", FAMILIES)
def test_calibration_beats_mean_magnitudes_and_every_matrix_is_fitted(family: str, tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, FAMILIES[family]())
    text = write_text(tmp_path / "text.jsonl")
    common = {"embeddings": "full"}
    fitted_options = CompressOptions(
        calibration=str(text), calibration_samples=16, sequence_length=24, batch_size=4, **common
    )
    errors = {}
    for name, options in {"none": CompressOptions(**common), "refined": fitted_options}.items():
        output = tmp_path / f"{name}.pxd"
        result = compress(base, tuned, output, options=options)
        assert not [note for note in result.notes.values() if "not seen" in note or "not a parameter" in note]
        errors[name] = divergence(base, tuned, output, tmp_path / name)
    assert errors["refined"] < 0.8 * errors["none"], errors


def divergence(base: Path, tuned: Path, delta: Path, folder: Path) -> float:
    """Return the mean KL(fine-tuned || applied) on random ids. The applied model is loaded from the folder of apply."""
    from peraxis_tools import apply

    apply(base, delta, folder)
    ids = torch.randint(3, len(VOCABULARY), (8, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        p, q = (torch.log_softmax(model_of(path)(input_ids=ids).logits, -1) for path in (tuned, folder))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_recomputed_activations_bring_no_dropout_and_the_same_gradients() -> None:
    config = FAMILIES["gpt2"]()
    assert config.resid_pdrop > 0
    torch.manual_seed(0)
    state = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).state_dict()
    ids = torch.randint(0, 32, (2, 24))
    gradients = []
    for prepare in (lambda model: None, checkpoint_layers, checkpoint_layers):
        model = LayerwiseModel(config, dtype=torch.float32, device=torch.device("cpu"))
        for name in [*model.outer_parameters(), *(n for i in range(2) for n in model.layer_parameters(i))]:
            model.set(name, state[name])
        prepare(model)
        counted: list[int] = []
        product = model.model.transformer.h[0].mlp.c_fc
        product.register_forward_hook(lambda *_, counted=counted: counted.append(1))
        product.weight.requires_grad_(True)
        model.model(input_ids=ids, use_cache=False).logits.square().mean().backward()
        gradients.append(product.weight.grad)
        assert len(counted) == (1 if len(gradients) == 1 else 2)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[1], gradients[2])
