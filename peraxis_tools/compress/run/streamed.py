"""A fit without text: the components of a tensor pair are computed when it is written. It needs no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from peraxis_tools.checkpoints.checkpoint import Checkpoint
from peraxis_tools.compress.options import CompressOptions
from peraxis_tools.compress.plan.budget import is_open
from peraxis_tools.compress.plan.plan import Plan
from peraxis_tools.compress.plan.price import prices
from peraxis_tools.compress.run.types import RunFit
from peraxis_tools.errors import OptionError

__all__ = ["StreamedFit"]


class StreamedFit:
    """`--fit none` as a Fitting (types.py). It saves no state: run.py fits each module when it writes it."""

    writes = True

    def __init__(self, base: Checkpoint, fine_tuned: Checkpoint, options: CompressOptions) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise OptionError("fit none gains nothing from several processes; run it without torchrun")
        self._base, self._fine_tuned, self._options = base, fine_tuned, options

    def open(self) -> None:
        """The pair is all that is read."""

    def errors(self, plan: Plan) -> Mapping[str, Sequence[float]]:
        """The error that each number of components leaves (price.py)."""
        modules = [module for module in plan.modules if is_open(module, self._options)]
        return prices(modules, self._base.tensors, self._fine_tuned.tensors)

    def fit(self, plan: Plan) -> RunFit:
        return RunFit(plan=plan)

    def __enter__(self) -> StreamedFit:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        return None
