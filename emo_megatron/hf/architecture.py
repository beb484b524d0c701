"""The transformer that every format here describes: its sizes and switches.

A pre-norm decoder: RMSNorm, rotary positions, multi-head or grouped-query attention, gated SiLU MLPs; a layer's MLP is
dense or a softmax-routed mixture of experts with at most one always-on MLP beside it (several shared experts are one
of their summed width).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """Sizes and switches of a model; sizes that cannot be raise ValueError on construction."""

    vocab_size: int
    """Rows of the embedding, padding included."""
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    """Routed experts of every sparse layer, the shared one not counted."""
    top_k: int
    """Routed experts a token."""
    expert_hidden: int
    """Width of a routed expert."""
    shared_hidden: int = 0
    """Width of the MLP that every token runs through; 0 without."""
    dense_hidden: int = 0
    """Width of the MLP of dense layers; 0 without such layers."""
    dense_layers: tuple[int, ...] = ()
    """Layers without experts, from 0, ascending."""
    renormalise: bool = False
    """Whether a token's top-k probabilities are scaled to sum to 1."""
    rope_theta: float = 10000.0
    max_positions: int
    norm_eps: float
    tied: bool = False
    """Whether the output projection is the embedding."""
    qkv_bias: bool = False
    shared_gate: bool = False
    """Whether the shared expert's output is scaled by the sigmoid of a learned projection; otherwise by 1."""

    def __post_init__(self) -> None:
        checks = {
            f"top-k must be in [1, experts]; got {self.top_k} of {self.num_experts}": (
                1 <= self.top_k <= self.num_experts
            ),
            f"heads must be a multiple of key-value heads; got {self.num_heads} and {self.num_kv_heads}": (
                self.num_kv_heads >= 1 and self.num_heads % self.num_kv_heads == 0
            ),
            f"dense layers must be ascending numbers in [0, {self.num_layers}); got {self.dense_layers}": (
                list(self.dense_layers) == sorted(set(self.dense_layers) & set(range(self.num_layers)))
            ),
            "there must be a layer with experts": len(self.dense_layers) < self.num_layers,
            "dense layers need a width": not self.dense_layers or self.dense_hidden > 0,
            "a gate of the shared expert needs a shared expert": (not self.shared_gate or self.shared_hidden > 0),
        }
        problems = [problem for problem, holds in checks.items() if not holds]
        if problems:
            raise ValueError("no such model: " + "; ".join(problems))

    @property
    def untied(self) -> bool:
        """Whether the output projection is a weight of its own."""
        return not self.tied

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Layers with experts, from 0."""
        return tuple(layer for layer in range(self.num_layers) if layer not in self.dense_layers)
