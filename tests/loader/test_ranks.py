"""The error of a rank that goes on after a failure: an interrupt is never lost behind another error."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from peraxis_format.errors import BindingError
from peraxis_format.torch.place import binding
from peraxis_format.torch.place.ranks import KeptError, sendable


class UnpicklableInterrupt(BaseException):
    """An interrupt that another process cannot make from its arguments."""

    def __init__(self, message: str, *, required: int) -> None:
        super().__init__(message)


def raised(error: BaseException) -> Any:
    """A function that raises this error, whatever its arguments."""

    def function(*_: Any, **__: Any) -> Any:
        raise error

    return function


@pytest.mark.parametrize(
    ("errors", "kept"),
    [
        ((BindingError("E404"), KeyboardInterrupt()), 1),
        ((BindingError("E404"), MemoryError(), KeyboardInterrupt()), 2),
        ((KeyboardInterrupt(), MemoryError()), 0),
        ((MemoryError(), BindingError("E404")), 0),
        ((MemoryError("one"), MemoryError("two")), 0),
    ],
)
def test_the_gravest_error_of_a_rank_is_kept(errors: tuple[BaseException, ...], kept: int) -> None:
    failure = KeptError()
    for error in errors:
        with failure:
            raise error
    with failure:
        pass
    assert failure.error is errors[kept]


def test_an_interrupt_of_the_check_of_pieces_is_not_lost_after_another_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "digests", raised(BindingError("E404")))
    monkeypatch.setattr(binding, "sharded_anywhere", lambda **_: True)
    monkeypatch.setattr(binding, "_check_pieces", raised(KeyboardInterrupt()))
    manifest: Any = SimpleNamespace(modules=(), previous=None, base=SimpleNamespace(id="base", revision=None))
    ring: Any = SimpleNamespace(device=None)
    with pytest.raises(KeyboardInterrupt):
        binding.check_live(manifest, {}, ring=ring)


def test_an_interrupt_while_pieces_are_hashed_is_not_lost_when_copies_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> None:
        with arguments[-1]:
            raise KeyboardInterrupt

    monkeypatch.setattr(binding, "assembled_digest", interrupted)
    monkeypatch.setattr(binding, "check_replicas", raised(BindingError("E404")))
    monkeypatch.setattr(binding, "whole", lambda _: ())  # so that this rank has a piece
    entry: Any = SimpleNamespace(name="one", shape=(2,), dtype=None)
    part: Any = SimpleNamespace(box=((0, 2),))
    with pytest.raises(KeyboardInterrupt):
        binding._check_pieces([entry], {"one": (part,)}, None)


def test_an_interrupt_that_cannot_be_pickled_is_sent_as_an_interrupt() -> None:
    sent = sendable(UnpicklableInterrupt("stopped", required=1))
    assert (type(sent), str(sent)) == (KeyboardInterrupt, "stopped")
    given = KeyboardInterrupt()
    assert sendable(given) is given
