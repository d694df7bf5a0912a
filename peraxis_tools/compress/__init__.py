"""The compressor turns a checkpoint pair into one .pxd. Its entry point is `compress`; run/run.py lists the steps."""

from peraxis_tools.compress.api import compress
from peraxis_tools.compress.options import CompressOptions, OptionError
from peraxis_tools.compress.plan.plan import Plan, PlannedModule, plan
from peraxis_tools.compress.run.run import CompressResult

__all__ = ["CompressOptions", "CompressResult", "OptionError", "Plan", "PlannedModule", "compress", "plan"]
