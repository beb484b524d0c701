"""Flags of context parallelism and multi-token prediction that do not go together, one by one."""

from __future__ import annotations

import pytest
from mcore.test_args import host_options

from emo_megatron.config import PoolConfig
from emo_megatron.mcore.combinations import problems_with_long_context

FINE = {"micro_batch_size": 1, "mtp_exact_loss": False}
CP2 = {"context_parallel_size": 2}
CP4 = {"context_parallel_size": 4, "hierarchical_context_parallel_sizes": [2, 2]}
TE = {"transformer_impl": "transformer_engine"}
MTP = {"mtp_num_layers": 1}
GATHERED = {"moe_token_dispatcher_type": "allgather", "expert_model_parallel_size": 2}
HYBRIDEP = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "hybridep"}
SP4 = {"tensor_model_parallel_size": 4, "sequence_parallel": True}
ROUTERS = {"pool_documents": "routers"}


def _problems(change):
    """Of a run with this change, whose documents are for the attention if it does not say otherwise."""
    change = {"pool_documents": "attention"} | change
    kind = change.pop("pool_documents")
    packed = {"dataloader_inter_document_masking": kind == "attention"}
    pool = PoolConfig(pool_min=3, pool_documents=kind)
    return problems_with_long_context(pool, host_options(**FINE | packed | change))


@pytest.mark.parametrize(
    ("flag", "change"),
    [
        ("--max-documents", {"max_documents": 4}),
        ("--max-documents", CP2 | ROUTERS | {"max_documents": 4}),
        ("--max-documents", CP2 | {"max_documents": 0}),
        ("--max-documents", CP2 | GATHERED),
        ("--max-documents", CP2 | HYBRIDEP),
        ("--cp-comm-type", CP2 | {"cp_comm_type": ["a2a"]}),
        ("--cp-comm-type", CP2 | {"cp_comm_type": ["p2p", "all_gather"]}),
        ("--cp-comm-type", CP2 | ROUTERS | {"cp_comm_type": ["all_gather"]}),
        ("--cp-comm-type", CP4 | TE | {"cp_comm_type": ["a2a+p2p"]}),
        ("--hierarchical-context-parallel-sizes", CP4),
        ("--hierarchical-context-parallel-sizes", CP4 | TE | {"cp_comm_type": ["a2a"]}),
        ("--mtp-exact-loss", {"mtp_exact_loss": True}),
        ("--mtp-num-layers", MTP | {"overlap_moe_expert_parallel_comm": True}),
        (
            "--position-embedding-type",
            MTP | {"position_embedding_type": "learned_absolute", "pipeline_model_parallel_size": 2},
        ),
        # 62 tokens; 10 of 20; 3 samples of 62; 2 of them, which stages send side by side
        ("--seq-length", SP4 | {"seq_length": 62}),
        ("--seq-length", SP4 | CP2 | ROUTERS | {"seq_length": 20}),
        ("--seq-length", SP4 | {"seq_length": 62, "micro_batch_size": 3}),
        ("--seq-length", SP4 | {"seq_length": 62, "micro_batch_size": 2, "pipeline_model_parallel_size": 2}),
    ],
)
def test_what_does_not_go_together_is_named(flag, change):
    (problem,) = _problems(change)
    assert problem.startswith(f"{flag} must")


@pytest.mark.parametrize(
    "change",
    [
        {},
        CP2,
        CP2 | {"max_documents": 4},
        CP2 | GATHERED | {"max_documents": 4},
        CP2 | GATHERED | ROUTERS,
        CP2 | HYBRIDEP | {"moe_hybridep_pad_uneven_dispatch_inputs": True},
        {"cp_comm_type": ["a2a"]},
        CP2 | TE | {"cp_comm_type": ["a2a"]},
        CP4 | TE | ROUTERS | {"cp_comm_type": ["a2a+p2p"]},
        MTP | CP2 | {"mtp_exact_loss": True},
        MTP | ROUTERS | {"overlap_moe_expert_parallel_comm": True},
        MTP | {"position_embedding_type": "learned_absolute"},
        # documents are padded to what sequence parallelism can cut
        SP4 | CP2 | {"seq_length": 20},
        # two samples of 62 one after the other
        SP4 | {"seq_length": 62, "micro_batch_size": 2},
    ],
)
def test_what_goes_together_is_taken(change):
    assert _problems(change) == []
