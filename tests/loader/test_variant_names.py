"""The name of a variant is a text: None is the base, and numbers are indices of served variants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peraxis_format.torch import LiveModelError, VariantSwitch, serve
from tests.loader.support import Small, base_of, write_delta


@pytest.mark.parametrize("name", [None, "", 1, -1, b"a"])
def test_what_is_no_text_is_refused_as_a_name(name: Any, tmp_path: Path) -> None:
    model = Small()
    path = write_delta(tmp_path / "d.pxd", base_of(model))
    with pytest.raises(LiveModelError, match=r"must be a text that is not empty"):
        serve(model, {"a": path, name: path})
    with VariantSwitch(model) as switch, pytest.raises(LiveModelError, match=r"must be a text that is not empty"):
        switch.add(name, path)
