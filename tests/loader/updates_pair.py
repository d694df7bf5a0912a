"""A small trainer and its server, for the tests of updates."""

from __future__ import annotations

import torch
from torch import nn


class Small(nn.Module):
    """A tied pair, a vector, an integer buffer, and a matrix with slightly more weights than one block."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16, dtype=dtype)
        self.up = nn.Linear(16, 1025, dtype=dtype)
        self.head = nn.Linear(16, 40, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))


def trainer(seed: int = 0) -> Small:
    torch.manual_seed(seed)
    return Small(torch.float32)


def server(seed: int = 1) -> Small:
    torch.manual_seed(seed)
    return Small(torch.bfloat16)


@torch.no_grad()
def train(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(3e-5 * torch.randn(parameter.shape, generator=generator))
    model.get_buffer("seen").add_(1)


def published(model: nn.Module) -> dict[str, bytes]:
    return {
        name: (tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor)
        .contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes()
        for name, tensor in model.state_dict().items()
    }  # fmt: skip
