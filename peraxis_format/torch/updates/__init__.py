"""Exact updates of live models: a trainer publishes a chain into a folder, and servers follow it.

updates = UpdateWriter(model, "chain")        follower = follow(model, "chain")
updates.step()                                follower.poll()
"""

from peraxis_format.torch.updates.apply import apply_update
from peraxis_format.torch.updates.errors import UpdateError
from peraxis_format.torch.updates.follower import Follower, Poll, follow
from peraxis_format.torch.updates.listing import OtherFile, UpdateFile, list_updates
from peraxis_format.torch.updates.publish import UpdateWriter
from peraxis_format.torch.updates.publish_sharded import ShardedUpdateWriter
from peraxis_format.torch.updates.published import Published
from peraxis_format.torch.updates.source import next_update, other_chain, reached_step, standing

__all__ = [
    "Follower",
    "OtherFile",
    "Poll",
    "Published",
    "ShardedUpdateWriter",
    "UpdateError",
    "UpdateFile",
    "UpdateWriter",
    "apply_update",
    "follow",
    "list_updates",
    "next_update",
    "other_chain",
    "reached_step",
    "standing",
]
