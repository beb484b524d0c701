"""Fingerprint of the stored weights of a Hugging Face folder, whatever files hold the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

FIELD = "weights_sha256"
"""Field of the record in config.json with the fingerprint that the weights had when the folder was written."""


def digest_of(name: str, tensor: Tensor) -> str:
    """Text that differs for another name, dtype, shape or bit of a stored tensor."""
    # flat, because a tensor without dimensions has no bytes to view
    bits = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return f"{name} {tensor.dtype} {list(tensor.shape)} {hashlib.sha256(bits).hexdigest()}"


def fingerprint_of(digests: Iterable[str]) -> str:
    """Sha256, in hex, of the `digest_of` all tensors of a folder, in any order."""
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()
