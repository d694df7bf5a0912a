"""The version of the distribution, in one place without a metadata look-up."""

from typing import Final

__all__ = ["__version__"]

__version__: Final = "1.0.0"
