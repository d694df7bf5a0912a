"""Optional packages: one table of the packages of each extra, and one error with the pip command.

A verb that needs more than numpy, click and rich calls `require` before any work and imports the packages afterwards.
A missing package gives one line: the feature that needs it, its name, and the command that installs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Final

from peraxis_tools.errors import NotVerifiableError

__all__ = ["DISTRIBUTIONS", "EXTRAS", "MissingPackageError", "missing", "require"]

# Import name -> the extra of pyproject.toml that installs it.
EXTRAS: Final[Mapping[str, str]] = {
    "torch": "torch",
    "numba": "torch",
    "transformers": "compress",
    "datasets": "compress",
    "safetensors": "compress",
    "yaml": "compress",
    "huggingface_hub": "hub",
    "fsspec": "hub",
    "aiohttp": "hub",
    "matplotlib": "plot",
    "model_signing": "sign",
    "OpenSSL": "sign",
    "lm_eval": "tasks",
}
# Import name -> the name for pip, if they differ.
DISTRIBUTIONS: Final[Mapping[str, str]] = {
    "yaml": "pyyaml",
    "model_signing": "model-signing",
    "OpenSSL": "pyopenssl",
    "lm_eval": "lm-eval",
}
_OURS: Final = ("peraxis", "peraxis_format", "peraxis_tools")


class MissingPackageError(NotVerifiableError, ImportError):
    """An optional package is not installed; the message has the pip command."""


def require(purpose: str, *packages: str, extra: str | None = None) -> None:
    """Raise MissingPackageError unless all these packages are installed. Imports none of them.

    purpose: the feature that needs them, as the subject of the message ("plots", "--calibration"). packages: import
    names. extra: the extra to install; None takes that of the missing package.
    """
    for package in packages:
        if not _installed(package):
            raise _error(purpose, package, extra)


def missing(purpose: str, error: ImportError) -> MissingPackageError:
    """The error for a failed import in a library. Raises `error` itself if the module is ours."""
    package = (error.name or "").partition(".")[0]
    if package in _OURS:
        raise error
    if package and not _installed(package):
        return _error(purpose, package, None)
    return MissingPackageError(f"{purpose}: a package is missing or too old: {' '.join(str(error).split())}")


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def _error(purpose: str, package: str, extra: str | None) -> MissingPackageError:
    extra = extra or EXTRAS.get(package)
    name = DISTRIBUTIONS.get(package, package)
    command = f"pip install {name}" if extra is None else f"pip install 'peraxis[{extra}]'"
    return MissingPackageError(f"{purpose} needs the package {name}, which is not installed: {command}")
