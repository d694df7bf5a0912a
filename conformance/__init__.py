"""The conformance kit of the PXD format: a corpus, and a runner that holds any loader to it.

Standard library only; it shares no code with the reference library.
"""

from __future__ import annotations

from .cases import Case, Corpus
from .run import Outcome, run_cases

__all__ = ["Case", "Corpus", "Outcome", "run_cases"]
