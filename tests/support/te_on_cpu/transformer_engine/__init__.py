"""A stand-in for Transformer Engine that computes on a CPU: the layers that Megatron's specs and ModelOpt name.

For processes of their own that have this package's folder on their path before Megatron is imported. Megatron then
builds its Transformer Engine spec with layers in plain PyTorch. In float32 and one process these layers compute what
Transformer Engine's compute; there are no kernels, no FP8 and no parallelism. An argument that would change the result
and is not implemented is an error.
"""

from . import common, pytorch

__all__ = ["common", "pytorch"]
__version__ = "1.12.0"
