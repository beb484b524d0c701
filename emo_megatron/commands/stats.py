"""The command stats."""

from emo_megatron.commands.options import StatsOptions as Options
from emo_megatron.runners.launch import run_stats as run

__all__ = ["Options", "run"]
