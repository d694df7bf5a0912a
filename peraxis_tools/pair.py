"""A small real pair, trained from files that every Python has: a Llama on English, fine-tuned on Python code.

The texts are Python's language reference (pydoc's topics) and the standard library's sources. Their last tenths are
held out. Nothing is downloaded.
"""

from __future__ import annotations

import json
import math
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from peraxis_tools.process.quiet import quiet_transformers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["PairFolders", "PairSize", "train_pair"]

_HELD_OUT: Final = 0.1
_PARAGRAPH: Final = "\n\n"
_CODE_MAX: Final = 1_500_000  # characters


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSize:
    """The size of the pair and its training. The MLP's width is not a multiple of 8, on purpose."""

    vocabulary: int = 1024
    width: int = 128
    mlp_width: int = 348
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    sequence_length: int = 128
    batch: int = 16
    base_steps: int = 320
    fine_tune_steps: int = 160
    base_lr: float = 3e-3
    fine_tune_lr: float = 5e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class PairFolders:
    """The files of `train_pair`: two checkpoints, the calibration text (English), and held-out text by domain."""

    base: Path
    fine_tuned: Path
    calibration: Path
    held_out: dict[str, Path]


def train_pair(
    folder: Path, *, size: PairSize | None = None, seed: int = 0, progress: Callable[[int], None] | None = None
) -> PairFolders:
    """Train base and fine-tuned model into `folder`, in BF16 with tokenizer; progress counts training steps."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    size = size or PairSize()
    step = progress or (lambda _: None)
    english, code = _split(_english()), _split(_python())
    calibration, held_out = _write_texts(folder, english, code)
    tokenizer = _train_tokenizer([english[0], code[0]], size.vocabulary)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.mlp_width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    for name, text, steps, rate in (
        ("base", english[0], size.base_steps, size.base_lr),
        ("fine-tuned", code[0], size.fine_tune_steps, size.fine_tune_lr),
    ):
        _train(model, _ids(tokenizer, text), size=size, steps=steps, rate=rate, seed=seed, progress=step)
        with quiet_transformers():
            _save(model, tokenizer, folder / name)
            # The saved base in BF16 is fine-tuned, as with published models.
            model = LlamaForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
    return PairFolders(
        base=folder / "base", fine_tuned=folder / "fine-tuned", calibration=calibration, held_out=held_out
    )


def _english() -> str:
    from pydoc_data.topics import topics

    return _PARAGRAPH.join(topics[key] for key in sorted(topics))


def _python() -> str:
    folder = Path(sysconfig.get_paths()["stdlib"])
    sources = (path.read_text("utf-8", errors="replace") for path in sorted(folder.glob("[a-z]*.py")))
    return _PARAGRAPH.join(sources)[:_CODE_MAX]


def _split(text: str) -> tuple[str, str]:
    cut = text.rindex(_PARAGRAPH, 0, int(len(text) * (1 - _HELD_OUT)))
    return text[:cut], text[cut:].lstrip()


def _write_texts(folder: Path, english: tuple[str, str], code: tuple[str, str]) -> tuple[Path, dict[str, Path]]:
    folder.mkdir(parents=True, exist_ok=True)
    calibration = folder / "calibration.jsonl"
    # Documents of a few paragraphs, as in a web corpus.
    paragraphs = english[0].split(_PARAGRAPH)
    documents = [_PARAGRAPH.join(paragraphs[i : i + 12]) for i in range(0, len(paragraphs), 12)]
    calibration.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    held_out = {"python": folder / "held-out-python.txt", "english": folder / "held-out-english.txt"}
    held_out["python"].write_text(code[1], "utf-8")
    held_out["english"].write_text(english[1], "utf-8")
    return calibration, held_out


def _train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text[:400_000] for text in texts), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>")


def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    import torch

    ids = tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def _train(
    model: PreTrainedModel,
    ids: torch.Tensor,
    *,
    size: PairSize,
    steps: int,
    rate: float,
    seed: int,
    progress: Callable[[int], None],
) -> None:
    """Train every parameter: AdamW, linear warm-up over a tenth of the steps, cosine to a tenth of the rate."""
    import torch

    def schedule(step: int) -> float:
        warm = max(1, steps // 10)
        if step < warm:
            return (step + 1) / warm
        return 0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, steps - warm))

    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(size.sequence_length)
    model.train()
    for _ in range(steps):
        starts = torch.randint(len(ids) - size.sequence_length, (size.batch, 1), generator=generator)
        batch = ids[starts + offsets]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        progress(1)


def _save(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    import copy

    import torch

    saved: Any = copy.deepcopy(model)
    saved.to(torch.bfloat16)
    saved.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
