"""A stand-in for nvidia-resiliency-ext, as far as Megatron's in-process restart names it."""
