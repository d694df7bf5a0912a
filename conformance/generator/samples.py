"""Small contents in which faults are planted."""

from __future__ import annotations

from .content import Asset, Content, full, sign
from .valid import simple

__all__ = ["ONE", "PADDED", "SIMPLE", "TEXT", "WHOLE"]

TEXT = "one line of text in the middle"
SIMPLE = simple(metadata={"text": TEXT})
WHOLE = Content(
    modules=(sign("model.embed_tokens.weight", (7, 9), base_rows=5), full("model.norm.weight", (9,))),
    assets=(Asset(path="config.json", data=b"{}"),),
    metadata={"licence": "Apache-2.0"},
    calibration={
        "digest": "sha256:" + "ab" * 32,
        "samples": 50,
        "seed": 0,
        "sequence_length": 128,
        "source": "wikitext",
    },
)
# Tensors: a.full, a pad of 61 bytes, b.full, a pad of 54, c.delta (a mask of 6 bytes at 0, rows at 64).
PADDED = Content(modules=(full("a", (3,), dtype="U8"), full("b", (5,)), sign("c", (3, 11))))
ONE = Content(modules=(full("w", (1,), dtype="U8"),))
