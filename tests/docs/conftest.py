"""A folder with the files that the documents name: a small random pair, its texts, and deltas of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("torch")


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, fine-tuned, calibration.jsonl, held-out texts, and deltas legal.pxd, medical.pxd, local.pxd, delta.pxd."""
    import torch

    import peraxis
    from tests.tools.compress_pairs import llama_config, write_pair, write_text

    folder = tmp_path_factory.mktemp("workspace")
    config = llama_config(num_hidden_layers=4, hidden_size=64, intermediate_size=96, max_position_embeddings=1024)
    base, tuned = write_pair(folder, config, dtype=torch.bfloat16)
    tuned.rename(folder / "fine-tuned")
    for path in (base, folder / "fine-tuned"):
        # As in the demo's tokenizer, the only special token ends each document.
        settings = json.loads((path / "tokenizer_config.json").read_text("utf-8"))
        (path / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "</s>"}))
    write_text(folder / "calibration.jsonl", documents=160)
    for i, name in enumerate(("python", "english")):
        lines = write_text(folder / "words.jsonl", documents=40, seed=i + 1).read_text("utf-8").splitlines()
        documents = [json.loads(line)["text"] for line in lines]
        (folder / f"held-out-{name}.txt").write_text("\n\n".join(documents), "utf-8")
    peraxis.compress(base, folder / "fine-tuned", folder / "delta.pxd", fit="none")
    for name in ("legal", "medical"):
        shutil.copy(folder / "delta.pxd", folder / f"{name}.pxd")
    return folder
