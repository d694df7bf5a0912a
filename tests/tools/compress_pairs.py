"""Small random checkpoint pairs with a tokenizer and a text, for the tests of the compressor."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

# Options for a short text, and for pairs so small that the header takes more bytes than the delta saves.
FEW = {"calibration_samples": 8, "sequence_length": 16, "batch_size": 3, "generated_samples": 0, "force": True}
WORDS = "one two red blue sun moon tree stone walks sings under over the a and".split()
# Letters, and the space of byte-level tokenizers, because some families need a byte-level BPE.
VOCABULARY = {token: i for i, token in enumerate(["<s>", "</s>", "<unk>", "Ġ", *sorted(set("".join(WORDS)))])}


def write_text(path: Path, *, documents: int = 60, words: int = 40, seed: int = 0) -> Path:
    """Write a jsonl file of documents of random words."""
    import json

    draw = random.Random(seed)
    lines = [json.dumps({"text": " ".join(draw.choices(WORDS, k=words))}) for _ in range(documents)]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of letters."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(VOCABULARY, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def write_pair(
    folder: Path, config: Any, *, dtype: torch.dtype = torch.float32, step: float = 0.02, seed: int = 0
) -> tuple[Path, Path]:
    """Write a random model and a copy with every float parameter changed a little. Returns (base, fine-tuned)."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    base, tuned = folder / "base", folder / "tuned"
    model.save_pretrained(base)
    with torch.no_grad():
        for parameter in model.parameters():
            low_rank = torch.randn(parameter.shape[-1]) * torch.rand(*parameter.shape[:-1], 1)
            parameter += (step * (torch.randn(parameter.shape) + low_rank)).to(parameter.dtype)
    model.save_pretrained(tuned)
    for path in (base, tuned):
        write_tokenizer(path)
    return base, tuned


# Configuration fields that most decoders accept.
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}


def llama_config(**changes: Any) -> Any:
    """Return a Llama configuration of three layers, width 24 and MLP width 44, neither a power of two."""
    from transformers import LlamaConfig

    values = {
        "vocab_size": 32,
        "hidden_size": 24,
        "intermediate_size": 44,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return LlamaConfig(**{**values, **changes})


def llama_pair(folder: Path) -> tuple[Path, Path, Path]:
    """Write a Llama of three layers in BF16. Returns (base, fine-tuned, text)."""
    base, tuned = write_pair(folder, llama_config(), dtype=torch.bfloat16)
    return base, tuned, write_text(folder / "text.jsonl")
