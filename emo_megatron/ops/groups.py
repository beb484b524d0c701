"""Groups of experts, for instance the experts of one node: limits on the groups that a token or a document uses.

Expert e of E is in group e // (E / G). Source: DeepSeek-V3 (arXiv 2412.19437, section 2.1.2), which limits the groups
of each token. With pools of all experts, the limit per token equals Megatron's `group_limited_topk`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def open_experts(
    keys_TE: Tensor, is_allowed_TE: Tensor | None, *, num_groups: int, group_topk: int, top_k: int
) -> Tensor:
    """The experts that each token may choose after the choice of its groups.

    Let p = K // group_topk. n_g is the number of the pool's experts in group g, but at most p. s_g is the sum of the
    n_g best keys of these experts. Groups are ranked by (n_g, s_g), both descending; ties go to the lower group. The
    first group_topk groups are admitted. Further groups are admitted in this order until the admitted groups hold K
    experts of the pool.

    Args:
        keys_TE: [T, E] float, the keys that rank experts: probabilities, logits, or gates plus bias.
        is_allowed_TE: [T, E] bool, the token's pool; None: all experts.
        num_groups: G, a divisor of E.
        group_topk: number of groups that a token should use; this number of groups must hold at least K experts.
        top_k: K.

    Returns:
        [T, E] bool: in the pool and in an admitted group. At least K True per token if the pool holds K experts.
    """
    num_tokens, num_experts = keys_TE.shape
    if is_allowed_TE is None:
        is_allowed_TE = torch.ones_like(keys_TE, dtype=torch.bool)
    in_groups = (num_tokens, num_groups, num_experts // num_groups)
    is_allowed_TGM = is_allowed_TE.reshape(in_groups)
    keys_TGM = keys_TE.reshape(in_groups)
    wanted = top_k // group_topk
    # the first n_g values are of the pool's experts, or -inf of others, which equals a key of -inf in the pool
    order_TGM = keys_TGM.masked_fill(~is_allowed_TGM, float("-inf")).sort(dim=-1, descending=True, stable=True)
    size_TG = is_allowed_TGM.sum(dim=-1)
    counted_TG = size_TG.clamp(max=wanted)
    is_counted_TGM = torch.arange(wanted, device=keys_TE.device) < counted_TG[..., None]
    sums_TG = order_TGM.values[..., :wanted].masked_fill(~is_counted_TGM, 0.0).sum(dim=-1)
    # two stable sorts, by the second key first, rank by both keys
    by_sum_TG = sums_TG.sort(dim=-1, descending=True, stable=True).indices
    by_count_TG = counted_TG.gather(1, by_sum_TG).sort(dim=-1, descending=True, stable=True).indices
    order_TG = by_sum_TG.gather(1, by_count_TG)
    size_TG = size_TG.gather(1, order_TG)
    held_before_TG = size_TG.cumsum(dim=-1) - size_TG
    is_first_G = torch.arange(num_groups, device=keys_TE.device) < group_topk
    is_admitted_TG = torch.zeros_like(size_TG, dtype=torch.bool).scatter_(
        1, order_TG, is_first_G | (held_before_TG < top_k)
    )
    return (is_allowed_TGM & is_admitted_TG[..., None]).reshape(num_tokens, num_experts)


def groups_used(routing_map_TE: Tensor, num_groups: int) -> Tensor:
    """[T] int64, number of groups that hold the chosen experts of each token."""
    num_tokens, num_experts = routing_map_TE.shape
    in_groups = (num_tokens, num_groups, num_experts // num_groups)
    return routing_map_TE.reshape(in_groups).any(dim=-1).sum(dim=-1)


def limit_to_groups(
    scores_DE: Tensor, pool_sizes_D: Tensor, *, num_groups: int, group_topk: int, top_k: int
) -> tuple[Tensor, Tensor]:
    """Limit each document's pool to group_topk groups: those with the largest sums of K // group_topk best scores.

    Args:
        scores_DE: [D, E] int64 document scores, reduced over all ranks that hold a piece of the document.
        pool_sizes_D: [D] int64, pool sizes in experts; E or more means all experts, in all groups.
        num_groups, group_topk, top_k: see `open_experts`.

    Returns:
        [D, E] int64 scores, with the lowest int64 outside the document's groups; and [D] int64 sizes, limited to the
        number of experts in group_topk groups. Ties go to the lower group.
    """
    num_documents, num_experts = scores_DE.shape
    in_groups = (num_documents, num_groups, num_experts // num_groups)
    best_DGP = scores_DE.reshape(in_groups).topk(top_k // group_topk, dim=-1).values
    order_DG = best_DGP.sum(dim=-1).sort(dim=-1, descending=True, stable=True).indices
    is_kept_DG = torch.zeros_like(order_DG, dtype=torch.bool).scatter_(1, order_DG[:, :group_topk], True)
    is_unrestricted_D = pool_sizes_D >= num_experts
    is_open_DGM = (is_kept_DG | is_unrestricted_D[:, None])[..., None].expand(in_groups)
    lowest = torch.iinfo(scores_DE.dtype).min
    most = group_topk * in_groups[2]
    return (
        scores_DE.masked_fill(~is_open_DGM.reshape(scores_DE.shape), lowest),
        torch.where(is_unrestricted_D, pool_sizes_D, pool_sizes_D.clamp(max=most)),
    )
