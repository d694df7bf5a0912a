"""A folder of small inputs, and for each verb that writes a command line that writes `{out}` from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import peraxis_format as pxd
from tests.factories import random_storage, sign_module, write_checkpoint, write_delta

__all__ = ["FILE_VERBS", "FOLDER_VERBS", "INPUTS", "make_inputs", "snapshot"]

NAMES = ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight")
# Verb (or one of its options) -> command line and a suitable name for its output.
FILE_VERBS = {
    "compress": ("compress base tuned --fit none -q -o {out}", "new.pxd"),
    "merge": ("merge a.pxd b.pxd --weights 1,1 -q -o {out}", "new.pxd"),
    "join": ("merge part-1.pxd part-2.pxd -q -o {out}", "new.pxd"),
    "convert": ("convert old.pt --base base -q -o {out}", "new.pxd"),
    "sign": ("sign a.pxd --private-key key.pem -q --bundle {out}", "new.sig"),
    "report": ("verify a.pxd --base base -q --report json={out}", "new.json"),
    "output": ("verify a.pxd --base base -q --format sarif -o {out}", "new.sarif"),
    "html": ("inspect a.pxd -q --html {out}", "new.html"),
    "plot": ("inspect a.pxd -q --plot {out}", "new.svg"),
}
# Inputs of each command line that its output could overwrite.
INPUTS = {
    "compress": ("base/model.safetensors", "tuned/config.json"),
    "merge": ("a.pxd", "b.pxd"),
    "join": ("part-1.pxd", "part-2.pxd"),
    "convert": ("old.pt", "base/model.safetensors"),
    "sign": ("a.pxd", "key.pem"),
    "report": ("a.pxd", "base/model.safetensors"),
    "output": ("a.pxd", "base/config.json"),
    "html": ("a.pxd",),
    "plot": ("a.pxd",),
}
FOLDER_VERBS = {
    "apply": "apply base a.pxd -q -o {out}",
    "split": "split a.pxd --parts 2 -q -o {out}",
    "lora": "convert a.pxd --to lora --rank 4 -q -o {out}",
    "checkpoint": "convert a.pxd --to checkpoint --base base -q -o {out}",
    "publish": "publish me/delta a.pxd -q --dry-run {out}",
}


def make_inputs(folder: Path) -> None:
    """Write base, tuned, a.pxd and b.pxd of that base, the parts of a.pxd, a BitDelta file, and a key."""
    import torch

    from peraxis_tools.deltas.parts import split
    from tests.tools.test_sign import write_key

    rng = np.random.default_rng(0)
    base = {name: random_storage(rng, (64, 64)) for name in NAMES}
    for which in ("base", "tuned"):
        tensors = {name: (array ^ np.uint16(which == "tuned"), pxd.DType.BF16) for name, array in base.items()}
        write_checkpoint(folder / which, tensors)
    for which in ("a", "b"):
        modules = [sign_module(rng, name, base[name], axes=(pxd.Axis.ROW_COL,)) for name in NAMES]
        write_delta(folder / f"{which}.pxd", modules, assets={"config.json": b'{"model_type": "llama"}'})
    with pxd.open(folder / "a.pxd") as delta:
        split(delta, [NAMES[:1], NAMES[1:]], [folder / "part-1.pxd", folder / "part-2.pxd"])
    name = NAMES[1].removesuffix(".weight")
    mask = torch.randint(-(2**31), 2**31 - 1, (2, 64), dtype=torch.int32)
    torch.save({f"{name}.mask": mask, f"{name}.coeff": torch.tensor(0.01)}, folder / "old.pt")
    write_key(folder, "key")


def snapshot(folder: Path) -> dict[str, bytes]:
    """Return relative path -> content of every file in a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
