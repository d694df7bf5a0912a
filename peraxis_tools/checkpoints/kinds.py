"""Classify a tensor by its name: kind and group for reports and plans, and the execution order.

Names are conventions of checkpoints, so nothing here changes the meaning of a file: a wrong guess can give a wrong line
in a table or another order in the file, but never a wrong weight.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from typing import Final

__all__ = ["KINDS", "axes_text", "execution_key", "kind_of", "layer_of", "group_of"]

KINDS: Final = ("embedding", "attention", "mlp", "norm", "bias", "lm_head", "other")

_EMBEDDINGS: Final = frozenset({"embed_tokens", "wte", "wpe", "word_embeddings", "embed_in", "embed_positions"})
_HEADS: Final = frozenset({"lm_head", "embed_out"})
_ATTENTION: Final = frozenset({"self_attn", "attn", "attention", "self_attention", "cross_attn"})
_MLP: Final = frozenset({"mlp", "feed_forward", "ffn", "block_sparse_moe", "experts", "shared_expert"})
_NORM: Final = re.compile(r"norm|^ln_|_ln$|layernorm")
# Within a layer: inputs before outputs, in forward order. Names that are not listed come after, by name.
_FLOW: Final = (
    *("input_layernorm", "ln_1", "q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn"),
    *("q_norm", "k_norm", "o_proj", "dense", "post_attention_layernorm", "pre_feedforward_layernorm", "ln_2"),
    *("gate", "router", "gate_proj", "up_proj", "gate_up_proj", "c_fc", "w1", "w3", "down_proj", "w2"),
    *("post_feedforward_layernorm",),
)
_FLOW_RANK: Final = {name: i for i, name in enumerate(_FLOW)}


def _tokens(name: str) -> list[str]:
    return name.split(".")


def layer_of(name: str) -> int | None:
    """The index of the layer that a tensor belongs to: the first number in its name."""
    return next((int(token) for token in _tokens(name) if token.isdigit()), None)


def group_of(name: str) -> str:
    """The name of the projection or layer: `q_proj` of `model.layers.0.self_attn.q_proj.weight`."""
    tokens = [token for token in _tokens(name) if not token.isdigit() and token not in ("weight", "bias")]
    return tokens[-1] if tokens else name


def kind_of(name: str, shape: tuple[int, ...]) -> str:
    """One of KINDS."""
    tokens = set(_tokens(name))
    if name.endswith((".bias", "_bias")):
        return "bias"
    if tokens & _EMBEDDINGS:
        return "embedding"
    if tokens & _HEADS:
        return "lm_head"
    if len(shape) < 2:
        return "norm" if _NORM.search(group_of(name)) else "other"
    if tokens & _ATTENTION:
        return "attention"
    return "mlp" if tokens & _MLP else "other"


def axes_text(names: Iterable[str]) -> str:
    """The axes of a module's components, equal neighbours counted: `2x row+col, tensor`."""
    runs = [(name, len(list(run))) for name, run in itertools.groupby(names)]
    return ", ".join(name if count == 1 else f"{count}x {name}" for name, count in runs)


def execution_key(name: str) -> tuple[int, int, int, str]:
    """The sort key of SPEC 3.7's execution order: embeddings, layers by number and data flow, the rest, lm_head."""
    tokens = set(_tokens(name))
    layer = layer_of(name)
    if layer is not None:
        stage = 1
    elif tokens & _EMBEDDINGS:
        stage = 0
    else:
        stage = 3 if tokens & _HEADS else 2
    return stage, layer or 0, _FLOW_RANK.get(group_of(name), len(_FLOW)), name
