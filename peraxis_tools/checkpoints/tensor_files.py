"""Write torch tensors to a safetensors file, and turn errors of the library into OSError."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["save_tensors"]

_SYSTEM_ERROR: Final = re.compile(r"\(os error (\d+)\)")


def save_tensors(tensors: Mapping[str, Tensor], path: Path, shown: Path) -> None:
    """Write tensors by name to `path`. Raises OSError with `shown`, the output that the file belongs to."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:
        found = _SYSTEM_ERROR.search(str(error))
        number = int(found[1]) if found else getattr(error, "errno", None) or errno.EIO
        size = sum(tensor.nbytes for tensor in tensors.values())
        raise OSError(number, f"{os.strerror(number)} while writing {size} bytes", str(shown)) from None
