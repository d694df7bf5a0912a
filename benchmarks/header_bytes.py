"""Print the header bytes per module for the tensor names of large models: `python benchmarks/header_bytes.py`.

Names and shapes follow from the published configurations, which are written down here. Every matrix has row+col scales,
the other tensors are full, and the fine-tune is BF16 on a BF16 base. No weights are needed, because the header follows
from names, shapes and encodings (SPEC 4). `header before` is the size in the first draft of the format, which had an
object with hex digests for every module and a header record for each mask, scale and pad.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import peraxis_format as pxd

NONE = "0" * 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The fields of a configuration that decide the names and shapes of tensors. experts 0: a dense model."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    experts: int = 0
    expert_intermediate: int = 0
    dense_layers: int = 0
    q_rank: int = 0
    norms_of_heads: bool = False


MODELS = (
    Model(
        name="Llama-3.1-8B", layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128,
        vocabulary=128256,
    ),
    Model(
        name="Qwen3-30B-A3B", layers=48, hidden=2048, intermediate=6144, heads=32, kv_heads=4, head_dim=128,
        vocabulary=151936, experts=128, expert_intermediate=768, norms_of_heads=True,
    ),
    Model(
        name="Qwen3-235B-A22B", layers=94, hidden=4096, intermediate=12288, heads=64, kv_heads=4, head_dim=128,
        vocabulary=151936, experts=128, expert_intermediate=1536, norms_of_heads=True,
    ),
    Model(
        name="DeepSeek-V3", layers=61, hidden=7168, intermediate=18432, heads=128, kv_heads=128, head_dim=128,
        vocabulary=129280, experts=256, expert_intermediate=2048, dense_layers=3, q_rank=1536,
    ),
    Model(
        name="Kimi-K2", layers=61, hidden=7168, intermediate=18432, heads=64, kv_heads=64, head_dim=128,
        vocabulary=163840, experts=384, expert_intermediate=2048, dense_layers=1, q_rank=1536,
    ),
)  # fmt: skip


def tensors(model: Model) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and the shape of every tensor, layer after layer."""
    h = model.hidden
    yield "model.embed_tokens.weight", (model.vocabulary, h)
    for i in range(model.layers):
        at = f"model.layers.{i}"
        yield from ((f"{at}.self_attn.{name}", shape) for name, shape in attention(model))
        if model.experts and i >= model.dense_layers:
            yield f"{at}.mlp.gate.weight", (model.experts, h)
            if model.q_rank:  # DeepSeek-V3 and its relatives
                yield f"{at}.mlp.gate.e_score_correction_bias", (model.experts,)
                yield from mlp(f"{at}.mlp.shared_experts", h, model.expert_intermediate)
            for k in range(model.experts):
                yield from mlp(f"{at}.mlp.experts.{k}", h, model.expert_intermediate)
        else:
            yield from mlp(f"{at}.mlp", h, model.intermediate)
        yield f"{at}.input_layernorm.weight", (h,)
        yield f"{at}.post_attention_layernorm.weight", (h,)
    yield "model.norm.weight", (h,)
    yield "lm_head.weight", (model.vocabulary, h)


def attention(model: Model) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the tensors of latent attention if q_rank is given, else those of grouped-query attention."""
    h, d = model.hidden, model.head_dim
    if model.q_rank:
        yield "q_a_proj.weight", (model.q_rank, h)
        yield "q_a_layernorm.weight", (model.q_rank,)
        yield "q_b_proj.weight", (model.heads * (d + 64), model.q_rank)
        yield "kv_a_proj_with_mqa.weight", (512 + 64, h)
        yield "kv_a_layernorm.weight", (512,)
        yield "kv_b_proj.weight", (model.heads * 2 * d, 512)
        yield "o_proj.weight", (h, model.heads * d)
        return
    yield "q_proj.weight", (model.heads * d, h)
    yield "k_proj.weight", (model.kv_heads * d, h)
    yield "v_proj.weight", (model.kv_heads * d, h)
    yield "o_proj.weight", (h, model.heads * d)
    if model.norms_of_heads:
        yield "q_norm.weight", (d,)
        yield "k_norm.weight", (d,)


def mlp(at: str, hidden: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the tensors of one MLP under the name `at`."""
    yield f"{at}.gate_proj.weight", (inner, hidden)
    yield f"{at}.up_proj.weight", (inner, hidden)
    yield f"{at}.down_proj.weight", (hidden, inner)


def manifest(model: Model, masks: int) -> pxd.Manifest:
    """Return a manifest with `masks` sign components for every matrix and all other tensors full."""
    modules = []
    for name, shape in tensors(model):
        signed = len(shape) == 2
        modules.append(
            pxd.ModuleEntry(
                name=name,
                shape=shape,
                dtype=pxd.DType.BF16,
                encoding=pxd.Encoding.SIGN if signed else pxd.Encoding.FULL,
                components=(pxd.ComponentEntry(axis=pxd.Axis.ROW_COL, exponent=-20),) * (masks if signed else 0),
                sha256=NONE,
                base=pxd.BaseRef(dtype=pxd.DType.BF16, shape=shape, sha256=NONE),
            )
        )
    return pxd.Manifest(
        base=pxd.BaseIdentity(digest=f"sha256:{NONE}", id=f"org/{model.name}"),
        fine_tuned=pxd.Identity(id=f"org/{model.name}-tuned"),
        producer=pxd.Producer(name="peraxis", version="1.0.0"),
        modules=tuple(modules),
    )


def before(held: pxd.Manifest) -> int:
    """Return the bytes of the header in the first draft of the format."""
    made = json.loads(held.to_bytes())
    del made["digests"]
    made["modules"] = [
        {
            "base": {"dtype": "BF16", "sha256": NONE, "shape": list(m.shape)},
            "components": [{"axis": c.axis.value, "exponent": c.exponent} for c in m.components],
            "dtype": "BF16",
            "encoding": m.encoding.value,
            "name": m.name,
            "sha256": NONE,
            "shape": list(m.shape),
        }
        for m in held.modules
    ]
    text = pxd.canonical_json(made).decode()
    return len(json.dumps(text)) + sum(map(len, records_before(held.modules)))


def records_before(modules: Iterable[pxd.ModuleEntry]) -> Iterator[str]:
    """Yield the header records of all parts and pads in the first draft of the format."""
    end = pads = 0
    for module in modules:
        for suffix, dtype, shape in module.parts():
            gap = pxd.aligned(end) - end
            if gap:
                yield f',"__pad__.{pads}":{{"dtype":"U8","shape":[{gap}],"data_offsets":[{end},{end + gap}]}}'
                end, pads = end + gap, pads + 1
            size = dtype.size_of(shape)
            dims = ",".join(map(str, shape))
            yield (
                f',"{module.name}.{suffix}":{{"dtype":"{dtype.value}","shape":[{dims}],'
                f'"data_offsets":[{end},{end + size}]}}'
            )
            end += size


def main() -> int:
    """Print the table."""
    write = sys.stdout.write
    write("| model | modules | masks | header before | a module | header now | a module | of 2^26 |\n")
    write("|---|---:|---:|---:|---:|---:|---:|---:|\n")
    for model in MODELS:
        for masks in (1, 2):
            held = manifest(model, masks)
            count = len(held.modules)
            old = before(held)
            new = len(pxd.header_bytes(held.to_bytes(), pxd.layout(held.modules, [])))
            write(
                f"| {model.name} | {count:,} | {masks} | {old / 1e6:.2f} MB | {old / count:.0f} B "
                f"| {new / 1e6:.2f} MB | {new / count:.0f} B | {new / 2**26:.0%} |\n"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
