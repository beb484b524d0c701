"""The layouts of the parity table, and the host features that are each tried in some of them."""

from __future__ import annotations

from typing import Any

from .training import Case

LAYOUTS: dict[str, dict[str, Any]] = {
    "DP2": {"dp": 2},
    "DP2, distributed optimizer": {"dp": 2, "distributed_optimizer": True},
    "TP2 + SP": {"tp": 2},
    "CP2 by sample": {"cp": 2},
    "CP2 by document": {"cp": 2, "cp_partition": "document"},
    "EP2": {"dp": 2, "ep": 2},
    "PP2": {"pp": 2},
    "PP2 x VPP2": {"pp": 2, "vpp": 2},
    "EP2 x ETP2": {"tp": 2, "dp": 2, "ep": 2, "etp": 2},
    "TP2 x EP2": {"tp": 2, "dp": 2, "ep": 2},
    "TP2 x CP2 by document": {"tp": 2, "cp": 2, "cp_partition": "document"},
    "TP2 x PP2": {"tp": 2, "pp": 2},
    "PP2 x EP2": {"pp": 2, "dp": 2, "ep": 2},
    "PP4": {"pp": 4},
    "EP2, dedup": {"dp": 2, "ep": 2, "dispatcher": "dedup"},
    "EP4, dedup": {"dp": 4, "ep": 4, "dispatcher": "dedup"},
    "EP2 x ETP2, dedup": {"tp": 2, "dp": 2, "ep": 2, "etp": 2, "dispatcher": "dedup"},
    "TP2 x EP2, dedup": {"tp": 2, "dp": 2, "ep": 2, "dispatcher": "dedup"},
}
# Megatron asks for bf16 with it, and here that is a mark only: weights and gradients stay float32
OVERLAP: dict[str, Any] = {"bf16": True, "overlap_moe_expert_parallel_comm": True}
DEEPSEEK: dict[str, Any] = {
    "pool": {"pool_score": "gate_with_bias", "pool_unrestricted": 0.2, "pool_skew": 0.5},
    "config": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.05,
        "moe_router_topk_scaling_factor": 2.5,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_router_load_balancing_type": ["seq_aux_loss", "global_aux_loss"],
        "moe_aux_loss_coeff": [0.1, 0.05],
    },
}
RANK_BY_RANK: dict[str, Any] = {
    "config": {
        "moe_router_score_function": "sqrtsoftplus",
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.05,
        # over all ranks, which is another population
        "moe_z_loss_coeff": None,
    }
}
GROUPED_POOLS: dict[str, Any] = {
    "pool": {"pool_group_scope": "document"},
    "config": {
        "moe_router_pre_softmax": True,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_router_load_balancing_type": "seq_aux_loss",
    },
}
LATE: dict[str, Any] = {"pool": {"pool_delay_samples": 1, "pool_min_decay_samples": 16}}
"""The first step trains the standard MoE, the next ones pools whose lower bound falls."""
MTP: dict[str, Any] = {"config": {"mtp_num_layers": 2, "mtp_loss_scaling_factor": 0.3}}
REPEATED_MTP: dict[str, Any] = {"config": {**MTP["config"], "mtp_use_repeated_layer": True}}
ONE_MTP: dict[str, Any] = {"config": {"mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.3}}
PADDED: dict[str, Any] = {"has_slots": False, "cp_partition": "document"}
"""Documents of any length side by side, which context parallelism pads and cuts as pretrain_emo.py does."""
FOUR = ["decoder"] * 4
LIKE_DEEPSEEK: dict[str, Any] = DEEPSEEK | {
    "config": DEEPSEEK["config"] | ONE_MTP["config"] | {"multi_latent_attention": True}
}
FEATURES: list[Case] = [
    Case(name="EP2, overlap", dp=2, ep=2, accumulation=4, per_token=True, features=OVERLAP),
    Case(
        name="EP2, dedup, overlap",
        **{"dp": 2, "ep": 2, "mbs": 2, "accumulation": 2, "balance": "running"},
        dispatcher="dedup",
        features=OVERLAP,
    ),
    Case(
        name="PP2 x VPP2 x EP2, overlap",
        **{"pp": 2, "vpp": 2, "dp": 2, "ep": 2, "accumulation": 4, "per_token": True},
        features=OVERLAP,
    ),
    Case(
        name="EP2, allgather",
        **{"dp": 2, "ep": 2, "mbs": 2, "accumulation": 2, "balance": "running"},
        features={"moe_token_dispatcher_type": "allgather"},
    ),
    *(
        Case(
            name=f"{name}, multi-latent attention",
            cp_partition="document",
            accumulation=2,
            per_token=True,
            config={"multi_latent_attention": True},
            **layout,
        )
        for name, layout in {
            "EP2, dedup": {"dp": 2, "ep": 2, "dispatcher": "dedup", "recompute": "moe"},
            "CP2 by document": {"cp": 2, "mbs": 2, "recompute": "full"},
            "TP2 + SP": {"tp": 2, "mbs": 2},
        }.items()
    ),
    *(
        Case(name=f"{name}, routers", documents="routers", per_token=True, **layout)
        for name, layout in {
            "DP2": {"dp": 2, "mbs": 2, "accumulation": 2, "balance": "running"},
            "TP2 + SP": {"tp": 2, "mbs": 2, "recompute": "moe"},
            "CP2 by sample": {"cp": 2, "mbs": 2, "recompute": "full"},
            "EP2, overlap": {"dp": 2, "ep": 2, "accumulation": 4, "features": OVERLAP},
            "PP2 x VPP2": {"pp": 2, "vpp": 2, "mbs": 2, "accumulation": 4, "recompute": "full"},
            "CP2 x EP2 x DP2": {"cp": 2, "dp": 2, "ep": 2, "mbs": 2, "dispatcher": "dedup"},
        }.items()
    ),
    *(
        Case(name=f"{name}, groups and biased pools", per_token=True, **layout, **DEEPSEEK)
        for name, layout in {
            "DP2": {"dp": 2, "mbs": 2, "accumulation": 2, "balance": "running"},
            "TP2 + SP": {"tp": 2, "accumulation": 2, "recompute": "moe"},
            "CP2 by document": {"cp": 2, "cp_partition": "document", "recompute": "full"},
            "EP2, dedup, overlap": {
                **{"dp": 2, "ep": 2, "accumulation": 4, "dispatcher": "dedup"},
                "features": OVERLAP,
            },
            "PP2 x VPP2": {"pp": 2, "vpp": 2, "accumulation": 4, "recompute": "full"},
            "TP2 x CP2 by sample": {"tp": 2, "cp": 2, "mbs": 2, "recompute": "moe"},
        }.items()
    ),
    *(
        Case(name=f"{name}, aux_loss of each rank", **layout, **RANK_BY_RANK)
        for name, layout in {
            "DP2": {"dp": 2, "mbs": 2, "accumulation": 2},
            "TP2 + SP": {"tp": 2, "accumulation": 2, "recompute": "full", "per_token": True},
            "CP2 by sample": {"cp": 2, "mbs": 2, "recompute": "moe", "per_token": True},
            "PP2": {"pp": 2, "mbs": 2, "accumulation": 4, "recompute": "full"},
            "TP2 x EP2": {"tp": 2, "dp": 2, "ep": 2, "accumulation": 2, "per_token": True},
        }.items()
    ),
    *(
        Case(name=f"{name}, pools inside groups", **layout, **GROUPED_POOLS)
        for name, layout in {
            "CP2 by document": {
                **{"cp": 2, "cp_partition": "document", "mbs": 2, "recompute": "moe"},
                "per_token": True,
            },
            "EP2": {"dp": 2, "ep": 2, "accumulation": 4, "recompute": "full"},
            "TP2 x PP2": {"tp": 2, "pp": 2, "mbs": 2, "accumulation": 4},
        }.items()
    ),
    *(
        Case(name=f"{name}, pools after the first step", **layout, **LATE)
        for name, layout in {
            "CP2 by document": {
                **{"cp": 2, "cp_partition": "document", "mbs": 2, "recompute": "full"},
                "per_token": True,
            },
            "PP2 x VPP2": {"pp": 2, "vpp": 2, "accumulation": 4, "recompute": "moe"},
        }.items()
    ),
    *(
        Case(name=f"{name}, documents padded", **layout, **PADDED)
        for name, layout in {
            "CP2": {"cp": 2, "mbs": 2, "accumulation": 2, "recompute": "full"},
            "CP2, one length": {
                **{"cp": 2, "accumulation": 4, "balance": "running", "per_token": True},
                "has_fixed_length": True,
            },
            "CP2 x EP2, dedup": {
                **{"cp": 2, "ep": 2, "mbs": 2, "accumulation": 2, "recompute": "moe"},
                "dispatcher": "dedup",
            },
            "CP2 x EP2, overlap": {"cp": 2, "ep": 2, "accumulation": 4, "features": OVERLAP},
            "CP2, running balance": {"cp": 2, "mbs": 1, "accumulation": 4, "balance": "running"},
            "CP4": {"cp": 4, "mbs": 2, "recompute": "moe"},
            "CP2 x PP2": {"cp": 2, "pp": 2, "mbs": 2, "accumulation": 4, "recompute": "full"},
            "CP2 x PP2, one length": {
                **{"cp": 2, "pp": 2, "mbs": 2, "accumulation": 4, "balance": "running"},
                "has_fixed_length": True,
            },
            "CP2 x PP2 x VPP2": {**{"cp": 2, "pp": 2, "vpp": 2, "mbs": 2, "accumulation": 4}, "recompute": "moe"},
            "CP2 x TP2 + SP": {"cp": 2, "tp": 2, "mbs": 2, "accumulation": 2, "recompute": "full"},
            "CP2 x EP2 x DP2": {"cp": 2, "ep": 2, "dp": 2, "mbs": 2, "accumulation": 2},
            "CP2 x EP2 x DP2, dedup": {
                **{"cp": 2, "ep": 2, "dp": 2, "mbs": 2, "accumulation": 2, "per_token": True},
                "dispatcher": "dedup",
            },
            "CP2 x EP2 x DP2, overlap": {**{"cp": 2, "ep": 2, "dp": 2, "accumulation": 4}, "features": OVERLAP},
            "CP2 x EP2 x DP2, allgather, one length": {
                **{"cp": 2, "ep": 2, "dp": 2, "accumulation": 2, "has_fixed_length": True},
                "features": {"moe_token_dispatcher_type": "allgather"},
            },
        }.items()
    ),
    *(
        Case(name=f"{name}, documents padded", **layout, **PADDED)
        for name, layout in {
            "CP2, aux_loss of each rank": {"cp": 2, "mbs": 2, "accumulation": 2, **RANK_BY_RANK},
            "CP2, pools inside groups": {"cp": 2, "mbs": 2, "recompute": "moe", **GROUPED_POOLS},
            "CP2, pools of samples": {"cp": 2, "mbs": 2, "pool": {"pool_scope": "sample"}},
            "CP2, end tokens open documents": {
                **{"cp": 2, "mbs": 2, "accumulation": 2, "config": MTP["config"]},
                "pool": {"pool_eos_starts_document": True},
            },
            "CP2, like DeepSeek-V3": {**{"cp": 2, "mbs": 2, "accumulation": 2, "recompute": "full", **LIKE_DEEPSEEK}},
            "CP2 x PP2 x EP2, like DeepSeek-V3": {
                **{"cp": 2, "pp": 2, "ep": 2, "accumulation": 4, "recompute": "moe"},
                **{"dispatcher": "dedup", **LIKE_DEEPSEEK},
            },
            "CP2 x PP2 x VPP2 x EP2, overlap": {
                **{"cp": 2, "pp": 2, "vpp": 2, "ep": 2, "accumulation": 4, "features": OVERLAP}
            },
        }.items()
    ),
    *(
        Case(name=f"{name}, multi-token prediction", **layout, **MTP, **PADDED)
        for name, layout in {
            "DP2": {"dp": 2, "accumulation": 2, "per_token": True},
            "EP2": {"dp": 2, "ep": 2, "accumulation": 2, "recompute": "moe", "balance": "running"},
            "PP2": {"pp": 2, "mbs": 2, "accumulation": 4, "recompute": "full", "per_token": True},
            "PP2, a stage of its own": {
                **{"pp": 2, "mbs": 2, "accumulation": 4},
                "features": {"pipeline_model_parallel_layout": [["embedding", *FOUR], ["mtp", "mtp", "loss"]]},
            },
            "PP4, a stage before the loss's": {
                **{"pp": 4, "mbs": 2, "accumulation": 4, "per_token": True},
                "features": {
                    "pipeline_model_parallel_layout": [*(["embedding", *FOUR[:2]], FOUR[2:], ["mtp", "mtp"], ["loss"])]
                },
            },
            "PP2 x VPP2": {"pp": 2, "vpp": 2, "accumulation": 4, "recompute": "full"},
            "TP2 + SP": {"tp": 2, "mbs": 2, "recompute": "full", "per_token": True},
            "CP2": {"cp": 2, "mbs": 2, "recompute": "full"},
            "CP2, loss over tokens": {"cp": 2, "accumulation": 2, "per_token": True},
            "CP2 x TP2 + SP": {"cp": 2, "tp": 2, "accumulation": 2, "recompute": "moe"},
            "CP2 x PP2": {"cp": 2, "pp": 2, "mbs": 2, "accumulation": 4},
            "CP2 x EP2 x DP2, dedup": {**{"cp": 2, "ep": 2, "dp": 2, "accumulation": 2, "dispatcher": "dedup"}},
        }.items()
    ),
    *(
        Case(name=f"{name}, one layer of multi-token prediction", **layout, **REPEATED_MTP, **PADDED)
        for name, layout in {
            "CP2": {"cp": 2, "mbs": 2, "accumulation": 2, "recompute": "full"},
            "PP2": {"pp": 2, "mbs": 2, "accumulation": 4, "recompute": "moe", "per_token": True},
            "EP2, dedup": {
                **{"dp": 2, "ep": 2, "accumulation": 2, "recompute": "moe", "balance": "running"},
                "dispatcher": "dedup",
            },
            "CP2 x PP2": {"cp": 2, "pp": 2, "mbs": 2, "accumulation": 4, "recompute": "full"},
        }.items()
    ),
    *(
        Case(name=f"{name}, routers, multi-token prediction", documents="routers", has_slots=False, **layout)
        for name, layout in {
            "DP2": {"dp": 2, "mbs": 2, "accumulation": 2, "per_token": True, **MTP},
            "CP2 by sample": {"cp": 2, "mbs": 2, "recompute": "full", **MTP},
            "PP2": {
                **{"pp": 2, "mbs": 2, "accumulation": 4, "recompute": "full", **MTP},
                # learned ones are on two stages, and Megatron does not sum their gradients
                "positions": "rope",
            },
            "EP2, overlap": {
                **{"dp": 2, "ep": 2, "accumulation": 4, "per_token": True, **ONE_MTP},
                "features": OVERLAP,
            },
        }.items()
    ),
]
"""Host features, each in a layout of its own; those of two processes run in `make test`, but for some."""
SLOW = {
    "EP2, dedup, overlap, groups and biased pools",
    "PP2 x VPP2, groups and biased pools",
    "TP2 + SP, aux_loss of each rank",
    "CP2 by sample, aux_loss of each rank",
    "PP2, aux_loss of each rank",
    "CP2 by document, pools inside groups",
    "DP2, groups and biased pools",
    "TP2 + SP, groups and biased pools",
    "EP2, dedup, multi-latent attention",
    "TP2 + SP, multi-latent attention",
    "CP2, multi-token prediction",
    "EP2, pools inside groups",
    "PP2 x VPP2, pools after the first step",
    "CP2, running balance, documents padded",
    "CP2 x EP2, dedup, documents padded",
    "CP2, one length, documents padded",
    "CP2, aux_loss of each rank, documents padded",
    "CP2, pools inside groups, documents padded",
    "CP2, pools of samples, documents padded",
    "CP2, end tokens open documents, documents padded",
    "CP2, like DeepSeek-V3, documents padded",
    "DP2, multi-token prediction",
    "EP2, multi-token prediction",
    "PP2, multi-token prediction",
    "PP2, a stage of its own, multi-token prediction",
    "PP2 x VPP2, multi-token prediction",
    "TP2 + SP, multi-token prediction",
    "CP2, loss over tokens, multi-token prediction",
    "PP2, one layer of multi-token prediction",
    "EP2, dedup, one layer of multi-token prediction",
    "DP2, routers, multi-token prediction",
    "CP2 by sample, routers, multi-token prediction",
    "PP2, routers, multi-token prediction",
}
