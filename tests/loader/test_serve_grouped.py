"""In a mixed batch the results of modules of any kind are joined by rows, or refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from peraxis_format.torch import LiveModelError, apply_, serve
from tests.loader.support import named_tensors, write_delta

ROWS, TOKENS, WIDTH = 4, 6, 8


class Result(NamedTuple):
    first: Tensor
    second: Any


class Scaled(nn.Module):
    """A module with its own weight, whose result the test chooses."""

    def __init__(self, returned: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(WIDTH))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.returned = returned

    def forward(self, x: Tensor) -> Any:
        return self.returned(self, x * self.weight * self.scale)


class Positions(nn.Embedding):
    """A table of positions for all sequences, as in Bart and similar models."""

    def __init__(self, form: str) -> None:
        super().__init__(16, WIDTH)
        self.form = form

    def forward(self, shape: torch.Size, ids: Tensor | None = None) -> Tensor:
        found = super().forward(torch.arange(shape[1]))
        return {"matrix": found, "one": found[None]}[self.form]


class Positioned(nn.Module):
    def __init__(self, form: str, ids_given: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.ids_given = ids_given
        self.tokens = nn.Embedding(16, WIDTH)
        self.positions = Positions(form)

    def get_input_embeddings(self) -> nn.Module:
        return self.tokens

    def forward(self, ids: Tensor) -> Tensor:
        return self.tokens(ids) + self.positions(ids.shape, ids if self.ids_given else None)


@torch.no_grad()
def mixed_and_wanted(model: nn.Module, given: Tensor, folder: Path) -> tuple[Any, Any, Any]:
    """Return the results of a batch of variant, base, base, variant; of the base; and of the merged model."""
    base = {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()}
    path = write_delta(folder / "d.pxd", base)
    tuned = copy.deepcopy(model)
    apply_(tuned, path)
    with serve(model, {"v": path}) as served, served.using(["v", None, None, "v"]):
        mixed = model(given)
    return mixed, model(given), tuned(given)


def chosen(base: Tensor, tuned: Tensor) -> Tensor:
    return torch.stack([tuned[0], base[1], base[2], tuned[3]])


def test_a_result_with_none_a_named_tuple_and_a_dictionary_is_joined(tmp_path: Path) -> None:
    model = Scaled(lambda _, y: Result(y, {"none": None, "sum": y.sum(-1)}))
    mixed, base, tuned = mixed_and_wanted(model, torch.randn(ROWS, TOKENS, WIDTH), tmp_path)
    assert isinstance(mixed, Result)
    assert mixed.second["none"] is None
    assert torch.equal(mixed.first, chosen(base.first, tuned.first))
    assert torch.equal(mixed.second["sum"], chosen(base.second["sum"], tuned.second["sum"]))


def test_a_module_may_flatten_its_tokens(tmp_path: Path) -> None:
    model = Scaled(lambda _, y: y.reshape(-1, WIDTH))
    mixed, base, tuned = mixed_and_wanted(model, torch.randn(ROWS, TOKENS, WIDTH), tmp_path)
    shape = (ROWS, TOKENS, WIDTH)
    assert torch.equal(mixed.view(shape), chosen(base.view(shape), tuned.view(shape)))


@pytest.mark.parametrize("returned", [lambda self, y: self.weight, lambda self, y: y[:1], lambda self, y: y.sum()])
def test_a_result_that_has_no_rows_is_refused(tmp_path: Path, returned: Any) -> None:
    with pytest.raises(LiveModelError, match=r"^Scaled: returned \d+ rows for a batch of 4; serve one variant"):
        mixed_and_wanted(Scaled(returned), torch.randn(ROWS, TOKENS, WIDTH), tmp_path)


@pytest.mark.parametrize("ids_given", [False, True])
def test_a_table_of_positions_becomes_one_a_sequence(tmp_path: Path, ids_given: bool) -> None:
    ids = torch.randint(0, 16, (ROWS, TOKENS))
    mixed, base, tuned = mixed_and_wanted(Positioned("one", ids_given), ids, tmp_path)
    assert torch.equal(mixed, chosen(base, tuned))


def test_a_table_of_positions_without_a_dimension_for_sequences_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LiveModelError, match=r"^Positions: returned 12 rows for a batch of 4"):
        mixed_and_wanted(Positioned("matrix", True), torch.randint(0, 16, (ROWS, TOKENS)), tmp_path)


def test_rows_in_an_order_of_experts_are_refused(tmp_path: Path) -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Scaled(lambda _, y: y)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(torch.cat([x, x]).reshape(-1, WIDTH))

    with pytest.raises(LiveModelError, match=r"^Scaled: no argument has the batch"):
        mixed_and_wanted(Doubled(), torch.randn(ROWS, TOKENS, WIDTH), tmp_path)
