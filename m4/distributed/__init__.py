"""The processes of a run, called ranks: which one this is, what they tell each other, and what ends them together."""

from m4.distributed.world import World, count_from_environment, leave, speaks

__all__ = ["World", "count_from_environment", "leave", "speaks"]
