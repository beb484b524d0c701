"""The command compose."""

from emo_megatron.commands.merge import ComposeOptions as Options
from emo_megatron.commands.merge import compose as run

__all__ = ["Options", "run"]
