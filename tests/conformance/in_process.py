"""The small reader with the interface of an adapter, without a process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peraxis_conformance import Adapter, Case
from peraxis_conformance.process import Reply
from peraxis_conformance.run import Caps

__all__ = ["InProcess"]


class InProcess(Adapter):
    """module: the loaded adapter of the small reader. switch: its mistake, empty for none."""

    def __init__(self, module: Any, switch: str = "") -> None:
        self.module, self.switch = module, switch
        said: dict[str, Any] = module.caps(switch)
        self.caps = Caps(
            implementation=switch or "small reader",
            version="1",
            spec=("1.0",),
            features=frozenset(said["features"]),
            operations=frozenset(said["operations"]),
        )

    def ask(self, case: Case, arguments: Sequence[str]) -> Reply:
        try:
            status, result = self.module.answer(self.switch, list(arguments))
        except Exception as error:
            return Reply(problem=f"crashed: {error!r}")
        return Reply(exit=status, result=result)

    def close(self) -> None:
        """Do nothing, because there is no process."""
