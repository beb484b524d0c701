"""EMO (arXiv 2605.06663) for Megatron-Core: every document routes inside its own expert pool."""

__version__ = "0.1.0"
