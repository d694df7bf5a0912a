"""The conformance kit of the PXD format: a corpus, and a runner that tests any loader with it.

Standard library only; it shares no code with the reference library.
"""

from __future__ import annotations

from .cases import Case, Corpus
from .run import Adapter, Outcome, Summary, laid_out, run_case, run_cases

__all__ = ["Adapter", "Case", "Corpus", "Outcome", "Summary", "laid_out", "run_case", "run_cases"]
