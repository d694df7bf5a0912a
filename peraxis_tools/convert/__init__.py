"""From other projects' delta files to .pxd, and from .pxd to a LoRA adapter. Imports torch when called."""

from peraxis_tools.convert.layouts import LAYOUTS, Layout
from peraxis_tools.convert.lora import LeftOut, LoraModule, LoraResult, to_lora
from peraxis_tools.convert.to_pxd import ToPxdResult, to_pxd

__all__ = ["LAYOUTS", "Layout", "LeftOut", "LoraModule", "LoraResult", "ToPxdResult", "to_lora", "to_pxd"]
