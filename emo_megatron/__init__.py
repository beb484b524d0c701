"""EMO (arXiv 2605.06663) for Megatron-Core: every document routes inside its own expert pool."""

from emo_megatron.processes import follow_parent

__version__ = "0.1.0"

# before the seconds that imports take
follow_parent()
