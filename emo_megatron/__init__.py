"""EMO (arXiv 2605.06663) for Megatron-Core: every document routes inside its own expert pool."""

from emo_megatron.processes import follow_parent

__version__ = "0.1.0"

# first, because the imports take seconds
follow_parent()
