"""The tools of peraxis as a library: what the command line does, as functions with typed results.

    import peraxis_tools

    peraxis_tools.compress("base", "fine-tuned", "delta.pxd", calibration="c4")
    model = peraxis_tools.load_model("base", "delta.pxd")

Verbs share their names with the modules that hold them; the imports below bind the functions. None of these
modules imports torch before it needs it.
"""

from peraxis_format import __version__
from peraxis_tools.apply import apply, load_model
from peraxis_tools.compress import compress
from peraxis_tools.diff import diff
from peraxis_tools.evaluate import evaluate
from peraxis_tools.inspect import inspect
from peraxis_tools.merge import merge
from peraxis_tools.verify import verify

__all__ = ["__version__", "apply", "compress", "diff", "evaluate", "inspect", "load_model", "merge", "verify"]
