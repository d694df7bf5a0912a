"""Experts that get rows in another order: the module around them runs for each variant instead."""

from __future__ import annotations

import inspect
import re

from torch import nn

__all__ = ["routers"]


def routers(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Module inside a list of experts -> the module with this list, which routes rows to the experts."""
    found: dict[nn.Module, nn.Module] = {}
    for holder in model.modules():
        for name, child in holder.named_children():
            if _sorts_by_expert(child) or (isinstance(child, nn.ModuleList) and "expert" in name):
                found.update((module, holder) for module in child.modules())
    return found


def _sorts_by_expert(module: nn.Module) -> bool:
    """Whether fused experts get rows sorted by expert, without the expert of each row."""
    if not type(module).__name__.endswith("Experts"):
        return False
    return not any(re.search("index|indices|top_k|rout", name) for name in inspect.signature(module.forward).parameters)
