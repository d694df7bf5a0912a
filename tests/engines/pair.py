"""A small model with head size 64 that vLLM serves, its deltas, and the folders that `apply` writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import peraxis_format as pf
import peraxis_tools
from peraxis_format.torch.updates import UpdateWriter
from tests.loader.support import random_module

__all__ = ["make_base", "make_chain", "make_delta", "make_pair"]

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def make_base(folder: Path, *, tied: bool, seed: int = 0, **sizes: int) -> Path:
    """Write a Llama of two layers with biases, random weights, and a tokenizer of the words w0, w1, ...

    sizes: fields of LlamaConfig that override the small ones here.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    small = {"vocab_size": 500, "hidden_size": 256, "intermediate_size": 344, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512}
    config = LlamaConfig(
        **{**small, **heads, **sizes},
        attention_bias=True,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.08,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif name.endswith("embed_tokens.weight"):
                parameter.mul_(2)
    model.save_pretrained(folder)
    _save_tokenizer(folder, config.vocab_size)
    return folder


def _save_tokenizer(folder: Path, size: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", bos_token="w1", eos_token="w2")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def make_delta(
    path: Path,
    base: Path,
    *,
    seed: int,
    same: Sequence[str] = (),
    assets: Sequence[Path] = (),
    base_id: str = "base",
    masks: int | None = None,
) -> Path:
    """Write a delta with signs in every matrix (axes in turn, some with two components) and exact norms and biases."""
    tensors = load_file(base / "model.safetensors")
    rng = np.random.default_rng(seed)
    axes = tuple(pf.Axis)
    with pf.DeltaWriter(path, base=pf.Identity(id=base_id), fine_tuned=pf.Identity(id=f"variant-{seed}")) as writer:
        for i, (name, tensor) in enumerate(sorted(tensors.items())):
            encoding = pf.Encoding.SIGN if tensor.ndim == 2 else pf.Encoding.FULL
            if name in same:
                encoding = pf.Encoding.SAME
            chosen = [axes[(i + seed + k) % len(axes)] for k in range(masks or 1 + i % 2)]
            writer.add(random_module(name, tensor, rng, chosen, encoding))
        for asset in assets:
            writer.add_asset(asset.name, asset.read_bytes())
        writer.finish()
    return path


def make_pair(folder: Path, *, tied: bool, seeds: Sequence[int]) -> dict[str, str]:
    """Write base, and for each seed N a delta vN.pxd and its applied folder vN. Returns these names -> paths."""
    base = make_base(folder / "base", tied=tied)
    paths = {"base": str(base)}
    for seed in seeds:
        delta = make_delta(folder / f"v{seed}.pxd", base, seed=seed)
        peraxis_tools.apply(base, delta, folder / f"v{seed}")
        paths |= {f"v{seed}.pxd": str(delta), f"v{seed}": str(folder / f"v{seed}")}
    (folder / "paths.json").write_text(json.dumps(paths))
    return paths


def make_chain(folder: Path, base: Path, *, steps: int) -> dict[str, str]:
    """Write a chain of exact updates that begins at a base, and a folder with the weights of each step.

    chain: the folder with anchor-00000000.pxd, step-00000001.pxd, ...; step1, step2, ...: ordinary checkpoints.
    """
    live = load_file(base / "model.safetensors")
    folder.mkdir(parents=True, exist_ok=True)
    writer = UpdateWriter(live, folder / "chain")
    writer.step()
    paths = {"chain": str(folder / "chain")}
    for step in range(1, steps + 1):
        generator = torch.Generator().manual_seed(step)
        for name, tensor in sorted(live.items()):
            if step % 2 and name.endswith("norm.weight"):
                continue  # does not change, so it is `same`
            chosen = torch.rand(tensor.shape, generator=generator) < 0.1
            tensor[chosen] = (tensor[chosen] * 1.5 + 0.05).to(tensor.dtype)
        writer.step()
        state = Path(shutil.copytree(base, folder / f"step{step}"))
        save_file(live, state / "model.safetensors", metadata={"format": "pt"})
        paths[f"step{step}"] = str(state)
    return paths
