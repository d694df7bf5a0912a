"""Wires, the formats in which other systems send one training step; they are converted from and to exact updates.

    index-value   vLLM, verl, prime-rl, TRL    flat indices and new values of the weights that changed
    nemo-rl       NeMo-RL                      gaps between changed weights and XOR of old and new, or new values; zstd
    xor           slime, miles, SkyRL          XOR of whole tensors, zstd; a folder like a checkpoint's

They follow the published descriptions; each module names its source.
"""

from __future__ import annotations

from peraxis_tools.convert.wires.read import WIRES, Wire, WireName, from_wire, recognised
from peraxis_tools.convert.wires.write import ToWireResult, to_wire

__all__ = ["WIRES", "ToWireResult", "Wire", "WireName", "from_wire", "recognised", "to_wire"]
