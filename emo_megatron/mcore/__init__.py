"""EMO inside Megatron-Core: the only package, with bridge, that imports megatron."""
