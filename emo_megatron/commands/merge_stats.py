"""The command merge_stats."""

from emo_megatron.commands.options import MergeStatsOptions as Options
from emo_megatron.commands.select import merge_files as run

__all__ = ["Options", "run"]
