"""Chains of updates: their order, the state after them, and the verbs update, compact and log."""

from peraxis_tools.chain.log import ChainLog, LogEntry, log
from peraxis_tools.chain.opened import opened_all, opened_deltas
from peraxis_tools.chain.order import Link, chain_order, link_of
from peraxis_tools.chain.state import ChainState, state_before
from peraxis_tools.chain.write import UpdateResult, compact, update

__all__ = [
    "ChainLog",
    "ChainState",
    "Link",
    "LogEntry",
    "UpdateResult",
    "chain_order",
    "compact",
    "link_of",
    "log",
    "opened_all",
    "opened_deltas",
    "state_before",
    "update",
]
