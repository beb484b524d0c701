"""Groups of experts, such as those of one node: how many of them a token, or a document, may use.

Expert e of E lies in group e // (E / G). Source: DeepSeek-V3 (arXiv 2412.19437, section 2.1.2), which limits tokens;
Megatron's `group_limited_topk` is the case of a pool that holds all experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def open_experts(
    keys_TE: Tensor, is_allowed_TE: Tensor | None, *, num_groups: int, group_topk: int, top_k: int
) -> Tensor:
    """Which experts each token may choose from once its groups are chosen.

    With p = K // group_topk, n_g the experts that the pool holds in group g, at most p, and s_g the sum of the n_g
    best keys among them, groups rank by (n_g, s_g), both descending; ties go to the lower group. The first group_topk
    are admitted, and further ones in this order while those admitted hold fewer than K experts of the pool.

    Args:
        keys_TE: [T, E] float, what experts are ranked by: probabilities, logits, or gates with their bias.
        is_allowed_TE: [T, E] bool, the token's pool; None: all experts.
        num_groups: G, which divides E.
        group_topk: groups a token shall use; so many groups hold K experts or more.
        top_k: K.

    Returns:
        [T, E] bool: in the pool and in an admitted group. At least K a token where the pool has as many.
    """
    num_tokens, num_experts = keys_TE.shape
    if is_allowed_TE is None:
        is_allowed_TE = torch.ones_like(keys_TE, dtype=torch.bool)
    in_groups = (num_tokens, num_groups, num_experts // num_groups)
    is_allowed_TGM = is_allowed_TE.reshape(in_groups)
    keys_TGM = keys_TE.reshape(in_groups)
    wanted = top_k // group_topk
    # n_g of them are the pool's: another's -inf is worth no less than that of an expert in the pool
    order_TGM = keys_TGM.masked_fill(~is_allowed_TGM, float("-inf")).sort(dim=-1, descending=True, stable=True)
    size_TG = is_allowed_TGM.sum(dim=-1)
    counted_TG = size_TG.clamp(max=wanted)
    is_counted_TGM = torch.arange(wanted, device=keys_TE.device) < counted_TG[..., None]
    sums_TG = order_TGM.values[..., :wanted].masked_fill(~is_counted_TGM, 0.0).sum(dim=-1)
    # two stable sorts rank by the second key first
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
    """[T] int64, in how many groups the chosen experts of each token lie."""
    num_tokens, num_experts = routing_map_TE.shape
    in_groups = (num_tokens, num_groups, num_experts // num_groups)
    return routing_map_TE.reshape(in_groups).any(dim=-1).sum(dim=-1)


def limit_to_groups(
    scores_DE: Tensor, pool_sizes_D: Tensor, *, num_groups: int, group_topk: int, top_k: int
) -> tuple[Tensor, Tensor]:
    """Put each document's pool inside group_topk groups, those with the best sums of their K // group_topk best scores.

    Args:
        scores_DE: [D, E] int64 document scores, reduced over every rank that holds a piece of the document.
        pool_sizes_D: [D] int64, experts wanted; E and more means all, whatever their groups.
        num_groups, group_topk, top_k: as in `open_experts`.

    Returns:
        [D, E] int64 scores, the lowest there are outside the document's groups, and [D] int64 sizes, at most what
        group_topk groups hold. Ties go to the lower group.
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
