"""The command demo."""

from emo_megatron.demo.run import DemoConfig as Options
from emo_megatron.demo.run import run_demo as run

__all__ = ["Options", "run"]
