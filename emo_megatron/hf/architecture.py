"""The transformer that every format here describes, and one set of names for its weights.

A pre-norm decoder: RMSNorm, rotary positions, multi-head or grouped-query attention, gated SiLU MLPs; a layer's MLP is
dense or a softmax-routed mixture of experts with at most one always-on MLP beside it (several shared experts are one
of their summed width). Megatron, Qwen2-MoE and the authors' format hold the same weights under other names and cut
other ways; `weight_shapes` is what they are translated through.

Layers and experts are counted from 0 in names: `layers.3.experts.5.gate` [f, h], `layers.3.router` [E, h],
`layers.3.q` [heads * head_dim, h], `layers.3.shared.down` [h, s], `layers.0.dense.up`, `embedding` [V, h].
"""

from __future__ import annotations

from dataclasses import dataclass

MLP = ("gate", "up", "down")
"""The projections of a gated MLP: down(silu(gate x) * up x)."""
ATTENTION = ("q", "k", "v")


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """Sizes and switches of a model.

    Raises:
        ValueError: on construction, naming every size that cannot be.
    """

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
    def moe_layers(self) -> tuple[int, ...]:
        """Layers with experts, from 0."""
        return tuple(layer for layer in range(self.num_layers) if layer not in self.dense_layers)


def weight_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Every weight's name and shape, in the order of the model."""
    a = architecture
    found: dict[str, tuple[int, ...]] = {"embedding": (a.vocab_size, a.hidden_size)}
    for layer in range(a.num_layers):
        p = f"layers.{layer}."
        found[p + "attention_norm"] = (a.hidden_size,)
        for name, heads in zip(ATTENTION, (a.num_heads, a.num_kv_heads, a.num_kv_heads), strict=True):
            found[p + name] = (heads * a.head_dim, a.hidden_size)
            if a.qkv_bias:
                found[f"{p}{name}_bias"] = (heads * a.head_dim,)
        found[p + "o"] = (a.hidden_size, a.num_heads * a.head_dim)
        found[p + "mlp_norm"] = (a.hidden_size,)
        if layer in a.dense_layers:
            found |= _mlp(p + "dense.", hidden=a.hidden_size, width=a.dense_hidden)
            continue
        found[p + "router"] = (a.num_experts, a.hidden_size)
        for expert in range(a.num_experts):
            found |= _mlp(f"{p}experts.{expert}.", hidden=a.hidden_size, width=a.expert_hidden)
        if a.shared_hidden:
            found |= _mlp(p + "shared.", hidden=a.hidden_size, width=a.shared_hidden)
        if a.shared_gate:
            found[p + "shared_gate"] = (1, a.hidden_size)
    found["final_norm"] = (a.hidden_size,)
    if not a.tied:
        found["output"] = (a.vocab_size, a.hidden_size)
    return found


def _mlp(prefix: str, *, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    shapes = ((width, hidden), (width, hidden), (hidden, width))
    return {prefix + name: shape for name, shape in zip(MLP, shapes, strict=True)}
