"""A few optimizer steps of a small pool model under any parallel layout, through Megatron's own schedules.

Ranks import this file by its path, so it names its neighbours whole.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from support.micro_batches import SEQ, VOCAB, micro_batch, part_of
from support.recorder import Recorder

STEPS = 3
MARGIN = 1e-5
"""Smallest gap in probability a decision may be made by: a closer one could flip with the order of a sum."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layout, and what is trained under it."""

    name: str = "single"
    tp: int = 1
    cp: int = 1
    cp_partition: str = "sample"
    positions: str | None = None
    """Megatron's position_embedding_type; None: learned_absolute where samples are cut, of whose packed documents its
    rotary embedding knows nothing, else rope."""
    ep: int = 1
    etp: int | None = None
    pp: int = 1
    vpp: int | None = None
    dp: int = 1
    distributed_optimizer: bool = False
    recompute: str = "none"
    """none, moe or full."""
    mbs: int = 1
    accumulation: int = 1
    per_token: bool = False
    balance: str = "micro"
    dispatcher: str = "megatron"
    pools: bool = True
    documents: str = "attention"
    """attention or routers: who sees the boundaries."""
    has_slots: bool = True
    """Whether padding between documents leaves context parallelism nothing to pad; without, they are packed side by
    side, padded after that, and cut one by one, as pretrain_emo.py does."""
    has_fixed_length: bool = False
    """Whether every micro-batch that is padded is so to one length."""
    is_exact: bool = True
    """Whether the loss of multi-token prediction is a sum over all tokens, and not Megatron's mean of means."""
    pool: dict[str, Any] = field(default_factory=dict)
    """More of PoolConfig."""
    config: dict[str, Any] = field(default_factory=dict)
    """More of TransformerConfig."""
    features: dict[str, Any] = field(default_factory=dict)
    """More of it, which the single process does without."""

    @property
    def world_size(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    @property
    def reference(self) -> Case:
        """The single process that must train the same model: its micro-batch is that of all data-parallel ranks.

        Under `aux_loss`, which is defined rank by rank, it runs their micro-batches one after the other.
        """
        at_once = 1 if "aux_loss" in self.balance_kinds else self.dp
        return Case(
            mbs=self.mbs * at_once,
            accumulation=self.accumulation * self.dp // at_once,
            per_token=self.per_token,
            balance=self.balance,
            cp_partition=self.cp_partition,
            positions=self.positions,
            pools=self.pools,
            documents=self.documents,
            has_slots=self.has_slots,
            is_exact=self.is_exact,
            pool=self.pool,
            config=self.config,
        )

    @property
    def depths(self) -> dict[int, int]:
        """Layer number -> how many tokens further than the decoder it predicts, of all MoE layers."""
        options = _options(self)
        decoder = dict.fromkeys((layer for layer, is_moe in enumerate(options["moe_layer_freq"], 1) if is_moe), 0)
        further = range(1, options.get("mtp_num_layers", 0) + 1)
        return decoder | {options["num_layers"] + depth: depth for depth in further}

    @property
    def balance_kinds(self) -> list[str]:
        """Balance losses, as Megatron's configuration names them."""
        kinds = self.config.get("moe_router_load_balancing_type", "global_aux_loss")
        return [kinds] if isinstance(kinds, str) else kinds

    @property
    def logged_losses(self) -> list[str]:
        """Names under which Megatron logs the losses of the router."""
        names = [kind.replace("aux_loss", "load_balancing_loss") for kind in self.balance_kinds]
        return names if self.config.get("moe_z_loss_coeff", 1.0) is None else [*names, "z_loss"]

    @property
    def id(self) -> str:
        parts = [self.name, f"recompute-{self.recompute}", f"mbs{self.mbs}", f"ga{self.accumulation}"]
        return "-".join(parts + ["token"] * self.per_token + ["running"] * (self.balance == "running"))


def with_samples(case: Case, samples: int) -> Case:
    """The case with so many samples a step, one at a time (an interleaved pipeline needs a multiple of its stages)."""
    return dataclasses.replace(case, accumulation=samples // case.dp)


def train(case: Case, *, seed: int) -> dict[str, Any]:
    """Train on this rank.

    Returns:
        losses (on the last stage: sum and count of every step), gradients of step 1, weights at the end (shards.Parts),
        decisions of all steps: {(layer, "pools"): {(sample, offset): experts}, (layer, "experts"): {place: experts}},
        margin: smallest gap a decision was made by (only where one rank sees all),
        metrics: what Megatron would log of step 1, by name,
        further_losses: the same of multi-token prediction (on the stage that has it).
    """
    from emo_megatron.mcore.context import CLOCK
    from emo_megatron.mcore.metrics import install_metrics
    from support import shards

    if case.config.get("mtp_num_layers"):
        _choose_mtp_loss(case)
    chunks, optimizer = build(case, seed=seed)
    install_metrics(pool_config(case), chunks[0].config, has_documents=True)
    recorder = Recorder(chunks)
    answer: dict[str, Any] = {"losses": []}
    consumed = 0
    for step in range(STEPS):
        CLOCK.consumed_samples = consumed
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        loss = forward_backward(case, chunks, consumed=consumed, recorder=recorder)
        metrics, further_losses = report_metrics(case), _report_further_losses(case)
        if step == 0:
            answer |= {"metrics": metrics, "further_losses": further_losses}
            answer["gradients"] = shards.parts(_gathered(chunks, case), gradients=True)
        optimizer.step()
        consumed += case.accumulation * case.mbs * case.dp
        answer["losses"] += [] if loss is None else [loss]
    CLOCK.consumed_samples = None
    answer["weights"] = shards.parts([chunk.module for chunk in chunks])
    break_cycles(chunks)
    _forget_mtp_losses()
    return answer | {"decisions": recorder.decisions, "margin": recorder.margin}


def reference(run: Callable[..., list[dict[str, Any]]], case: Case, function: Any = train) -> tuple[int, Any]:
    """The first seed for which one process decides nothing by less than MARGIN, and what it trains then.

    Args:
        run: one process's `Ranks.run`.
        case: of which the process trains the reference.
        function: as `train`.
    """
    for seed in range(1, 50):
        (answer,) = run(function, case=case.reference, seed=seed)
        if answer["margin"] > MARGIN:
            return seed, answer
    raise AssertionError(f"no seed has every decision made by more than {MARGIN}")


def decisions_of(answers: list[dict[str, Any]]) -> dict[Any, dict[Any, Any]]:
    """All ranks' decisions; ranks that saw the same document or token must have decided alike."""
    decisions: dict[Any, dict[Any, Any]] = {}
    for answer in answers:
        for key, chosen in answer["decisions"].items():
            into = decisions.setdefault(key, {})
            for place, experts in chosen.items():
                assert into.setdefault(place, experts) == experts
    return decisions


def _choose_mtp_loss(case: Case) -> None:
    from megatron.core.models.gpt import gpt_model
    from megatron.core.models.hybrid import hybrid_model
    from megatron.core.transformer import multi_token_prediction

    from emo_megatron.mcore.mtp_loss import use_exact_mtp_loss

    if case.is_exact:
        use_exact_mtp_loss()
        return
    # this process may have trained a case that is
    host: Any = multi_token_prediction
    callers: tuple[Any, ...] = (gpt_model, hybrid_model)
    for module in callers:
        module.process_mtp_loss = host.process_mtp_loss


def forward_backward(case: Case, chunks: list[Any], *, consumed: int, recorder: Recorder | None = None) -> float | None:
    """One step's passes after `consumed` samples, through Megatron's schedule.

    Returns:
        Mean loss over all counted tokens of the step; None on stages that have no loss.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    iterators = [_batches(case, consumed) for _ in chunks]
    losses = get_forward_backward_func()(
        forward_step_func=functools.partial(_forward_step, case=case, recorder=recorder),
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=case.accumulation,
        seq_length=SEQ,
        micro_batch_size=case.mbs,
        forward_only=False,
    )
    if not losses:
        return None
    total = torch.stack([entry["lm loss"] for entry in losses]).sum(0)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    torch.distributed.all_reduce(total, group=group)
    return float(total[0] / total[1])


class Writer:
    """Stands for TensorBoard's."""

    def __init__(self) -> None:
        self.logged: dict[str, float] = {}

    def add_scalar(self, name: str, value: Any, _: int) -> None:
        self.logged[name] = float(value)


def report_metrics(case: Case) -> dict[str, float]:
    """What Megatron's training loop logs of a step, for which it asks by the losses' names."""
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    writer = Writer()
    options = _options(case)
    get_moe_metrics_tracker().report(
        loss_scale=1 / case.accumulation,
        iteration=1,
        writer=writer,
        force_initialize=True,
        track_names=case.logged_losses,
        num_layers=options["num_layers"],
        moe_layer_freq=options["moe_layer_freq"],
        mtp_num_layers=options.get("mtp_num_layers"),
    )
    return writer.logged


def _report_further_losses(case: Case) -> dict[str, float]:
    """The same of multi-token prediction, where this rank has it: losses, and how often a prediction is right."""
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    writer = Writer()
    MTPLossLoggingHelper.track_mtp_metrics(1 / case.accumulation, 1, writer)
    return writer.logged


def _forget_mtp_losses() -> None:
    """Megatron's record of them keeps groups and a shape of this run."""
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    MTPLossLoggingHelper.tracker = {}


def break_cycles(chunks: list[Any]) -> None:
    """Let the model be freed, and its process groups' threads with it.

    The dispatchers keep tensors of the last graph, which ends in the hooks of Megatron's data parallelism, which keep
    the model: a cycle through C++ that Python does not see.
    """
    for chunk in chunks:
        chunk.grad_accs.clear()
        for module in chunk.modules():
            if hasattr(module, "token_dispatcher"):
                vars(module.token_dispatcher).clear()


def build(case: Case, *, seed: int) -> tuple[list[Any], Any]:
    """Chunks in Megatron's data-parallel wrapper, and its optimizer."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from support import shards, tiny

    tiny.setup(
        tensor_model_parallel_size=case.tp,
        context_parallel_size=case.cp,
        pipeline_model_parallel_size=case.pp,
        virtual_pipeline_model_parallel_size=case.vpp,
        expert_model_parallel_size=case.ep,
        expert_tensor_parallel_size=case.etp or 1,
        **_embedding_groups(case),
    )
    config = tiny.transformer_config(**_options(case))
    models = [_model(case, config, stage) for stage in (range(case.vpp) if case.vpp else [None])]
    shards.initialise(models, seed=seed)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=case.distributed_optimizer, overlap_grad_reduce=False)
    chunks = [DistributedDataParallel(config=config, ddp_config=ddp, module=model) for model in models]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-2,
            # below it a gradient counts as noise: sums in another order change the last bits of those near zero
            adam_eps=1e-4,
            weight_decay=0.1,
            clip_grad=1.0,
            bf16=False,
            use_distributed_optimizer=case.distributed_optimizer,
        ),
        chunks,
    )
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    for chunk in chunks:
        chunk.train()
    return chunks, optimizer


def _options(case: Case) -> dict[str, Any]:
    options: dict[str, Any] = {
        "num_layers": 4,
        "moe_layer_freq": [0, 1, 1, 1],
        "context_parallel_size": case.cp,
        "virtual_pipeline_model_parallel_size": case.vpp,
        "calculate_per_token_loss": case.per_token,
        # as megatron.training sets it: in one batch, messages both ways between two stages would be mixed up
        "overlap_p2p_comm": case.vpp is not None,
        "deallocate_pipeline_outputs": True,
        "batch_p2p_comm": case.vpp is None,
        # padded micro-batches are as long as their documents need
        "variable_seq_lengths": not case.has_slots and case.cp > 1 and case.pp > 1,
    }
    if case.recompute == "moe":
        options |= {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    if case.recompute == "full":
        options |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return options | case.config | case.features


def pool_config(case: Case) -> Any:
    from emo_megatron.config import PoolConfig

    options: dict[str, Any] = {
        "pool_balance": case.balance,
        "pool_cp_partition": case.cp_partition,
        "pool_dispatcher": case.dispatcher,
        "pool_documents": case.documents,
    }
    return PoolConfig(**({"pool_min": 3} if case.pools else {}), **options, **case.pool)


def _model(case: Case, config: Any, vp_stage: int | None) -> Any:
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_model import GPTModel

    from emo_megatron.mcore.spec import pool_block_spec

    return GPTModel(
        config=config,
        transformer_layer_spec=pool_block_spec(config, pool=pool_config(case), vp_stage=vp_stage),
        mtp_block_spec=_mtp_spec(case, config, vp_stage),
        vocab_size=VOCAB,
        max_sequence_length=SEQ * 8,
        position_embedding_type=case.positions or ("learned_absolute" if case.cp_partition == "sample" else "rope"),
        share_embeddings_and_output_weights=False,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=case.vpp is None, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=case.vpp is None, vp_stage=vp_stage),
        vp_stage=vp_stage,
    )


def _embedding_groups(case: Case) -> dict[str, Any]:
    """Which stages of a pipeline share the embedding of tokens, as Megatron's script tells with such layers."""
    if not case.config.get("mtp_num_layers"):
        return {}
    stages = case.features.get("pipeline_model_parallel_layout") or [["mtp"]]
    (with_mtp,) = [stage - len(stages) for stage, layers in enumerate(stages) if "mtp" in layers]
    return {"get_embedding_ranks": lambda pp_ranks: sorted({pp_ranks[0], pp_ranks[with_mtp]})}


def _mtp_spec(case: Case, config: Any, vp_stage: int | None) -> Any:
    """Layers of multi-token prediction like the decoder's last, on the stage that has them."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_layer_specs, get_gpt_mtp_block_spec

    from emo_megatron.mcore.spec import with_pools

    if not config.mtp_num_layers:
        return None
    layers = get_gpt_decoder_layer_specs(
        config, use_transformer_engine=False, normalization=config.normalization, vp_stage=vp_stage
    )
    block = get_gpt_mtp_block_spec(config, layers[-1], use_transformer_engine=False, vp_stage=vp_stage)
    return None if block is None else with_pools(block, config=config, pool=pool_config(case))


def _batches(case: Case, consumed: int) -> Iterator[dict[str, Any]]:
    """This data-parallel rank's micro-batches of a step, whole: every rank of it gets all tokens."""
    from megatron.core import parallel_state

    rank = parallel_state.get_data_parallel_rank()
    for index in range(case.accumulation):
        first = consumed + (index * case.dp + rank) * case.mbs
        yield micro_batch(first, case.mbs, has_slots=case.has_slots)


def _forward_step(
    iterator: Any, model: Any, return_schedule_plan: bool = False, *, case: Case, recorder: Recorder | None
) -> Any:
    from emo_megatron.mcore.router_documents import forward_stage

    part = part_of(next(iterator), case)
    if recorder is not None:
        recorder.places_T = part.places_T
    batch = {"tokens": part.tokens, "position_ids": part.positions, "labels": part.labels, "loss_mask": part.loss_mask}
    output = forward_stage(
        model, batch, part.documents, part.packed, num_samples=part.num_flat, is_planned=return_schedule_plan
    )
    return output, functools.partial(_loss, part.loss_mask.flatten(), case=case)


def _loss(is_counted: Tensor, losses: Tensor, *, case: Case) -> Any:
    from megatron.core import parallel_state

    total = (losses.reshape(-1) * is_counted).sum()
    count = is_counted.sum()
    report = {"lm loss": torch.stack([total.detach(), count])}
    if case.per_token or case.cp == 1:
        return total, count.int(), report
    # Megatron averages the means of context-parallel ranks
    of_all_ranks = count.clone()
    torch.distributed.all_reduce(of_all_ranks, group=parallel_state.get_context_parallel_group())
    return total * case.cp, of_all_ranks.int(), report


def _gathered(chunks: list[Any], case: Case) -> list[Any]:
    """The model chunks with whole gradients: the distributed optimizer leaves a rank its own part."""
    if case.distributed_optimizer:
        for buffer in (b for c in chunks for b in c.buffers + c.expert_parallel_buffers):
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                pieces = bucket.grad_data.chunk(group.size())
                whole = torch.empty_like(bucket.grad_data)
                torch.distributed.all_gather_into_tensor(whole, pieces[group.rank()].clone(), group=group)
                bucket.grad_data.copy_(whole)
    return [chunk.module for chunk in chunks]
