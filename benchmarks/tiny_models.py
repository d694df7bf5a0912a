"""Build tiny random models of every family in transformers from configurations that are shrunk by field names.

The sizes do not depend on a list of families. A field that is named for heads, layers, experts, widths or token ids
gets a small value of its kind. Per-layer lists keep one layer of each kind. All other fields keep their defaults.
`OVERRIDES` has the few fields whose names do not suffice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

__all__ = ["FURTHER", "VOCABULARY", "build", "families", "inputs", "logits", "tiny"]

VOCABULARY: Final = 64
MOST_PARAMETERS: Final = 8_000_000

# Pattern of a field's name -> its small value; 0 keeps the default. The first matching pattern applies.
SIZES: Final[tuple[tuple[str, int], ...]] = (
    (r"vocab_size|vocab_size_\w+|\w+_vocab_size", VOCABULARY),
    (r"num_hidden_layers|n_layers?|num_layers|\w*encoder_layers|\w*decoder_layers|num_blocks|depth", 2),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"(n|num)_(routed_|local_)?experts|moe_num_experts|num_experts_per_layer", 4),
    (r"num_experts_per_tok(en)?|num_selected_experts|moe_topk|moe_top_k|top_k_experts|moe_k|router_top_k", 2),
    (r"n_group|topk_group|num_expert_group|topk_groups|num_groups_topk", 1),
    (r"\w*(num_key_value_heads|num_kv_heads|n_kv_heads|n_head_kv|kv_n_heads)", 2),
    (r"linear_num_key_heads", 2),
    (r"mamba_(n|num)_heads", 8),
    (r"\w*(num_attention_heads|num_heads|n_heads?|attention_heads|num_query_heads|linear_num_value_heads)", 4),
    (r"mamba_expand|expand|mamba_d_conv|conv_kernel|\w*_kernel_(size|dim)|mamba_n_groups|n_groups", 0),
    (r"(q|kv|o)_lora_rank|\w*_lora_rank|\w*_low_rank_dim", 16),
    (r"mamba_d_ssm", 64),
    (r"qk_head_dim|swa_head_dim", 16),
    (r"rotary_dim", 8),
    (r"\w*head_dim|kv_channels|d_kv|(mamba_)?d_head|\w*head_size|\w*_dim_per_head", 8),
    (r"(\w*state_size|ssm_\w*d_state|mamba_d_state|d_state|time_step_rank|mamba_dt_rank)", 8),
    (r"(moe|expert|shared|router)\w*(intermediate|ffn|hidden)\w*_(size|dim)", 24),
    (r"\w*(intermediate_size|ffn_dim|ffn_hidden_size|n_inner|d_ff|d_inner|mlp_dim)", 48),
    (r"hidden_size_per_layer_input", 8),
    (
        r"\w*(hidden_size|d_model|n_embd|n_embed|hidden_dim|embedding_size|embedding_dim|embed_dim|emb_dim|proj_dim|model_dim)",
        32,
    ),
    (r"hidden|width|lru_width|conv_dim", 32),
    (r"\w*(max_\w*positions?|n_positions|max_\w*position_embeddings|n_ctx|max_seq_len|max_length)", 128),
    (r"\w*sliding_window\w*|attention_window_size|local_attention|window_size|sliding_window_size", 8),
    (r"\w*chunk_(size|length)", 8),
)
KEPT_OUT: Final = re.compile(r"rope_\w+|rotary_(pct|emb_base|fraction)|transformers_version|dtype|model_type|\w*_type")
TOKENS: Final = re.compile(r"\w*(token_id|token_index|_tok_id|tok_index|token_ids)|pad_id|bos_id|eos_id")

# Values of fields that are None by default although the model needs a number or every release has one.
MISSING: Final[Mapping[str, int]] = {
    "head_dim": 8, "num_key_value_heads": 2, "num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1,
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}  # fmt: skip

# Fields by model type whose names do not suffice.
OVERRIDES: Final[Mapping[str, Mapping[str, Any]]] = {
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "reformer": {"axial_pos_embds": False},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16, "mamba_headdim": 8, "hybrid_layer_ids": [1]},
    "xmod": {"default_language": "en_XX"},
}

# Models that are not decoders: model type -> class in transformers.
FURTHER: Final[Mapping[str, str]] = {
    "t5": "T5ForConditionalGeneration",
    "bert (masked)": "BertForMaskedLM",
    "llava": "LlavaForConditionalGeneration",
}


def families() -> dict[str, str]:
    """Return model type -> class name, for every decoder and the models of FURTHER."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return {**dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), **FURTHER}


def tiny(family: str) -> Any:
    """Return the small configuration of a family."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = family.split(" ")[0]
    kind = type(AutoConfig.for_model(model_type)) if model_type in CONFIG_MAPPING else CONFIG_MAPPING[model_type]
    fields = {**shrunk(kind().to_dict()), **OVERRIDES.get(family, {})}
    if "is_decoder" in fields and family not in FURTHER:
        fields["is_decoder"] = True
    return kind(**fields)


def shrunk(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a configuration with small values, including those of inner configurations."""
    small = {name: _small(name, value, fields) for name, value in fields.items() if not name.startswith("_")}
    _shrink_lists(small, fields)
    _shrink_tokens(small)
    heads, key_values = _heads(small)
    if heads and key_values and _same_heads(fields):
        small[key_values] = small[heads]
    if small.get("image_size") and isinstance(small.get("patch_size"), int):
        small["image_size"] = 2 * small["patch_size"]
    return small


def _small(name: str, value: Any, fields: Mapping[str, Any]) -> Any:
    if isinstance(value, Mapping) and name.endswith(("config", "decoder", "encoder")):
        return shrunk(value)
    if value is None:
        return MISSING.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or KEPT_OUT.fullmatch(name):
        return value
    for pattern, size in SIZES:
        if re.fullmatch(pattern, name):
            return min(value, size) if size and value > 0 else value
    return value


def _heads(fields: Mapping[str, Any]) -> tuple[str | None, str | None]:
    heads = next((n for n in ("num_attention_heads", "n_head", "n_heads") if n in fields), None)
    key_values = next((n for n in ("num_key_value_heads", "num_kv_heads") if fields.get(n)), None)
    return heads, key_values


def _same_heads(fields: Mapping[str, Any]) -> bool:
    heads, key_values = _heads(fields)
    return bool(heads and key_values and fields[heads] == fields[key_values])


def _shrink_lists(small: dict[str, Any], fields: Mapping[str, Any]) -> None:
    """Keep the first layer of each kind in per-layer lists and set the number of layers to match."""
    name = next((n for n in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if n in fields), None)
    count = fields.get(name) if name else None
    if not name or not isinstance(count, int):
        return
    lists = [n for n, v in fields.items() if isinstance(v, list) and len(v) == count and count > 1]
    if not lists:
        return
    rows = list(zip(*(map(str, fields[n]) for n in lists), strict=True))
    first = sorted({row: index for index, row in reversed(list(enumerate(rows)))}.values())[:4]
    first = first if len(first) > 1 else list(range(min(2, count)))
    for n in lists:
        small[n] = [_small(f"{n}", fields[n][index], fields) for index in first]
    if isinstance(fields.get("per_layer_config"), Mapping):
        given = {int(index): values for index, values in fields["per_layer_config"].items()}
        small["per_layer_config"] = {str(new): shrunk(given[old]) for new, old in enumerate(first) if old in given}
    small[name] = len(first)


def _shrink_tokens(small: dict[str, Any]) -> None:
    """Replace the ids of special tokens by ids of the small vocabulary."""
    fixed = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    left = VOCABULARY - 1
    for name, value in small.items():
        if not TOKENS.fullmatch(name) or value is None:
            continue
        if name in fixed:
            small[name] = fixed[name]
        elif isinstance(value, int) and value >= left:
            small[name] = left
            left -= 1


def make(family: str, config: Any, **options: Any) -> Any:
    """Return a random model of a configuration in its class of transformers."""
    import transformers

    if family in FURTHER:
        return getattr(transformers, FURTHER[family])._from_config(config, **options)
    if hasattr(config, "text_config"):  # the decoder of a larger model
        return transformers.AutoModelForCausalLM.from_config(config, **options)
    return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._from_config(config, **options)


@torch.no_grad()
def build(family: str, dtype: torch.dtype) -> nn.Module:
    """Return a random model of a family with finite tensors. Raises ValueError above MOST_PARAMETERS parameters."""
    config = tiny(family)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in make(family, config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{count:,} parameters, too many for a tiny model")
    torch.manual_seed(0)
    model: nn.Module = make(family, config, dtype=dtype).eval()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            tensor.copy_(0.02 * torch.randn(tensor.shape))
    return model


def inputs(model: Any, sequences: int, *, tokens: int = 7) -> dict[str, Tensor]:
    """Return the text inputs of a model: token ids [sequences, tokens] without special tokens, also for a decoder."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY // 2, (sequences, tokens), generator=generator)
    if getattr(model.config, "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    return {"input_ids": ids}


@torch.no_grad()
def logits(model: Any, given: Mapping[str, Tensor]) -> Tensor:
    """Return the logits [sequences, tokens, vocabulary] in F32."""
    try:
        found = model(**given, use_cache=False)
    except TypeError as error:
        if "use_cache" not in str(error):
            raise
        found = model(**given)
    out = found.logits if hasattr(found, "logits") and found.logits is not None else found[0]
    return (out[0] if isinstance(out, Sequence) else out).float()
