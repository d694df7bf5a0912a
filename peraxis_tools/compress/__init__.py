"""The compressor: a checkpoint pair in, one .pxd out. The way in is `compress`; run.py says what happens when."""

from peraxis_tools.compress.api import compress
from peraxis_tools.compress.options import CompressOptions, OptionError
from peraxis_tools.compress.plan.plan import Plan, PlannedModule, plan
from peraxis_tools.compress.run.run import CompressResult

__all__ = ["CompressOptions", "CompressResult", "OptionError", "Plan", "PlannedModule", "compress", "plan"]
