"""A few optimizer steps of a small pool model under any parallel layout, through Megatron's own schedules."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

SEQ = 32
VOCAB = 64
STEPS = 3
NOISE = 1e-4
"""Of logits, under which no decision may change that is to be compared."""
SLOT = 4
"""Documents lie in slots of a multiple of so many tokens, so that two context-parallel ranks can cut each."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layout, and what is trained under it."""

    name: str = "single"
    tp: int = 1
    cp: int = 1
    cp_partition: str = "sample"
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
            pools=self.pools,
            documents=self.documents,
            pool=self.pool,
            config=self.config,
        )

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
        parts = [
            self.name,
            f"recompute-{self.recompute}",
            f"mbs{self.mbs}",
            f"ga{self.accumulation}",
        ]
        return "-".join(
            parts + ["token"] * self.per_token + ["running"] * (self.balance == "running")
        )


def with_samples(case: Case, samples: int) -> Case:
    """The case with so many samples a step, one at a time (an interleaved pipeline needs a multiple of its stages)."""
    return dataclasses.replace(case, accumulation=samples // case.dp)


def sample(index: int) -> dict[str, Tensor]:
    """A packed sample: documents of any length, empty ones too, in padded slots; 16 tokens count in the loss."""
    generator = torch.Generator().manual_seed(1000 + index)
    slots: list[int] = []
    while sum(slots) < SEQ:
        room = (SEQ - sum(slots)) // SLOT
        slots.append(SLOT * int(torch.randint(0, min(room, 4) + 1, (), generator=generator)))
    lengths = [max(slot - int(torch.randint(0, 3, (), generator=generator)), 0) for slot in slots]
    tokens = torch.randint(VOCAB, (SEQ,), generator=generator)
    starts = torch.tensor([0, *slots]).cumsum(0)
    is_real = torch.zeros(SEQ)
    for start, length in zip(starts.tolist(), lengths, strict=False):
        is_real[start : start + length] = 1
    real = is_real.nonzero().flatten()
    is_counted = torch.zeros(SEQ)
    is_counted[real[torch.randperm(len(real), generator=generator)[:16]]] = 1
    return {
        "tokens": tokens,
        "labels": tokens.roll(-1),
        "loss_mask": is_counted,
        "positions": torch.arange(SEQ),
        "lengths": torch.tensor(lengths),
        "slots": torch.tensor(slots),
    }


def micro_batch(first: int, rows: int) -> dict[str, Any]:
    """`rows` consecutive samples as one packed stream, and the place of every token: sample * SEQ + position."""
    samples = [sample(first + row) for row in range(rows)]
    batch: dict[str, Any] = {
        key: torch.cat([s[key] for s in samples])
        for key in ("tokens", "labels", "loss_mask", "positions")
    }
    batch["places"] = torch.arange(first * SEQ, (first + rows) * SEQ)
    for key, source in (("cu", "lengths"), ("cu_padded", "slots")):
        sizes = torch.cat([torch.zeros(1, dtype=torch.long), *(s[source] for s in samples)])
        batch[key] = sizes.cumsum(0).int()
    return batch


def train(case: Case, *, seed: int) -> dict[str, Any]:
    """Train on this rank.

    Returns:
        losses (on the last stage: sum and count of every step), gradients of step 1, weights at the end (shards.Parts),
        decisions of step 1: {(layer, "pools"): {(sample, offset): experts}, (layer, "experts"): {place: experts}},
        margin: smallest gap a decision was made by (only where one rank sees all),
        metrics: what Megatron would log of step 1, by name.
    """
    from emo_megatron.mcore.context import CLOCK
    from emo_megatron.mcore.metrics import install_metrics

    from . import shards

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
        recorder.is_on = step == 0
        loss = forward_backward(case, chunks, consumed=consumed, recorder=recorder)
        metrics = report_metrics(case)
        if step == 0:
            answer["metrics"] = metrics
            answer["gradients"] = shards.parts(_gathered(chunks, case), gradients=True)
        optimizer.step()
        consumed += case.accumulation * case.mbs * case.dp
        answer["losses"] += [] if loss is None else [loss]
    CLOCK.consumed_samples = None
    answer["weights"] = shards.parts([chunk.module for chunk in chunks])
    break_cycles(chunks)
    return answer | {"decisions": recorder.decisions, "margin": recorder.margin}


def forward_backward(
    case: Case, chunks: list[Any], *, consumed: int, recorder: Recorder | None = None
) -> float | None:
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


def report_metrics(case: Case) -> dict[str, float]:
    """What Megatron's training loop logs of a step, for which it asks by the losses' names."""
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    logged: dict[str, float] = {}

    class Writer:
        def add_scalar(self, name: str, value: Any, _: int) -> None:
            logged[name] = float(value)

    options = _options(case)
    get_moe_metrics_tracker().report(
        loss_scale=1 / case.accumulation,
        iteration=1,
        writer=Writer(),
        force_initialize=True,
        track_names=case.logged_losses,
        num_layers=options["num_layers"],
        moe_layer_freq=options["moe_layer_freq"],
    )
    return logged


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
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from . import shards, tiny

    tiny.setup(
        tensor_model_parallel_size=case.tp,
        context_parallel_size=case.cp,
        pipeline_model_parallel_size=case.pp,
        virtual_pipeline_model_parallel_size=case.vpp,
        expert_model_parallel_size=case.ep,
        expert_tensor_parallel_size=case.etp or 1,
    )
    config = tiny.transformer_config(**_options(case))
    models = [_model(case, config, stage) for stage in (range(case.vpp) if case.vpp else [None])]
    shards.initialise(models, seed=seed)
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=case.distributed_optimizer, overlap_grad_reduce=False
    )
    chunks = [
        DistributedDataParallel(config=config, ddp_config=ddp, module=model) for model in models
    ]
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
    }
    if case.recompute == "moe":
        options |= {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    if case.recompute == "full":
        options |= {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
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
        vocab_size=VOCAB,
        max_sequence_length=SEQ * 8,
        # Megatron's rotary embedding of packed sequences knows the cut by document only
        position_embedding_type="learned_absolute" if case.cp_partition == "sample" else "rope",
        share_embeddings_and_output_weights=False,
        pre_process=parallel_state.is_pipeline_first_stage(
            ignore_virtual=case.vpp is None, vp_stage=vp_stage
        ),
        post_process=parallel_state.is_pipeline_last_stage(
            ignore_virtual=case.vpp is None, vp_stage=vp_stage
        ),
        vp_stage=vp_stage,
    )


def _batches(case: Case, consumed: int) -> Iterator[dict[str, Any]]:
    """This data-parallel rank's micro-batches of a step, whole: every rank of it gets all tokens."""
    from megatron.core import parallel_state

    rank = parallel_state.get_data_parallel_rank()
    for index in range(case.accumulation):
        yield micro_batch(consumed + (index * case.dp + rank) * case.mbs, case.mbs)


def _forward_step(
    iterator: Any,
    model: Any,
    return_schedule_plan: bool = False,
    *,
    case: Case,
    recorder: Recorder | None,
) -> Any:
    from emo_megatron.mcore.pipeline import as_exchanged, flatten_received
    from emo_megatron.mcore.router_documents import RouterDocuments, forward_with_documents

    batch = next(iterator)
    is_packed = case.documents == "attention"
    held = _held(batch, case)[None] if is_packed else _held_of_rows(batch, case)
    if recorder is not None:
        # the router sees tokens of [s, mbs, h]
        recorder.places = _sequence_part(batch["places"][held].T.flatten(), case)
    num_flat = case.mbs if is_packed else 1
    flatten_received(model, num_samples=num_flat)
    output = forward_with_documents(
        model.build_schedule_plan if return_schedule_plan else model,
        None
        if is_packed
        else RouterDocuments(cu_seqlens=batch["cu_padded"], tokens_per_sample=SEQ),
        batch["tokens"][held],
        batch["positions"][held],
        None,
        labels=batch["labels"][held],
        packed_seq_params=_packed(batch) if is_packed else None,
    )
    if not return_schedule_plan:
        output = as_exchanged(output, model, num_samples=num_flat)
    return output, functools.partial(_loss, batch["loss_mask"][held].flatten())


def _packed(batch: dict[str, Any]) -> Any:
    from . import tiny

    longest = int(batch["cu_padded"].diff().max())
    return tiny.packed(
        batch["cu"].tolist(),
        cu_seqlens_q_padded=batch["cu_padded"],
        cu_seqlens_kv_padded=batch["cu_padded"],
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        tokens_per_sample=SEQ,
    )


def _loss(is_counted: Tensor, losses: Tensor) -> Any:
    total = (losses.reshape(-1) * is_counted).sum()
    count = is_counted.sum()
    return total, count.int(), {"lm loss": torch.stack([total.detach(), count])}


def _held(batch: dict[str, Any], case: Case) -> Tensor:
    """What this context-parallel rank holds: two chunks of the stream or, by document, of every slot."""
    from megatron.core import parallel_state

    stream = torch.arange(len(batch["tokens"]))
    if case.cp == 1:
        return stream
    rank = parallel_state.get_context_parallel_rank()
    bounds = batch["cu_padded"].tolist() if case.cp_partition == "document" else [0, len(stream)]
    held = []
    for start, end in itertools.pairwise(bounds):
        pieces = stream[start:end].chunk(2 * case.cp) if end > start else ()
        held += [pieces[rank], pieces[2 * case.cp - 1 - rank]] if pieces else []
    return torch.cat(held)


def _held_of_rows(batch: dict[str, Any], case: Case) -> Tensor:
    """The same of samples that are not packed, [mbs, s]: two chunks of each."""
    from megatron.core import parallel_state

    rows = torch.arange(len(batch["tokens"])).view(-1, SEQ)
    rank = parallel_state.get_context_parallel_rank()
    chunks = rows.chunk(2 * case.cp, dim=1)
    return torch.cat([chunks[rank], chunks[2 * case.cp - 1 - rank]], dim=1)


def _sequence_part(values: Tensor, case: Case) -> Tensor:
    from megatron.core import parallel_state

    return values.chunk(case.tp)[parallel_state.get_tensor_model_parallel_rank()]


def _gathered(chunks: list[Any], case: Case) -> list[Any]:
    """The model chunks with whole gradients: the distributed optimizer leaves a rank its own part."""
    if case.distributed_optimizer:
        for buffer in (b for c in chunks for b in c.buffers + c.expert_parallel_buffers):
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                pieces = bucket.grad_data.chunk(group.size())
                whole = torch.empty_like(bucket.grad_data)
                torch.distributed.all_gather_into_tensor(
                    whole, pieces[group.rank()].clone(), group=group
                )
                bucket.grad_data.copy_(whole)
    return [chunk.module for chunk in chunks]


class Recorder:
    """Notes what the routers of this rank decided in forward; recomputation is passed over."""

    def __init__(self, chunks: list[Any]) -> None:
        from emo_megatron.mcore.router import PoolRouter

        self.is_on = False
        self.places = torch.empty(0)
        self.decisions: dict[tuple[int, str], dict[Any, tuple[int, ...]]] = {}
        self.margin = float("inf")
        self.noise = torch.Generator().manual_seed(3)
        for module in (m for chunk in chunks for m in chunk.modules()):
            if isinstance(module, PoolRouter):
                module.routing = functools.partial(self._routing, module, module.routing)

    def _routing(self, router: Any, routing: Any, logits: Tensor, **options: Any) -> Any:
        from emo_megatron.mcore.compat import is_in_backward

        answer = routing(logits, **options)
        if is_in_backward():
            return answer
        scope = router.scope
        pool_DE = scope.pools.get(router.layer_number)
        logits_TE = logits.detach().flatten(0, -2).float()
        if router.score_function == "softmax" and router.num_groups is None:
            self._margins(router, logits_TE, scope, pool_DE)
        elif router.tp_dp_cp_group.size() == 1:
            self._margin_of_noise(router, logits_TE, scope, pool_DE)
        if self.is_on:
            self._record(router.layer_number, answer[1], scope, pool_DE)
        return answer

    def _record(self, layer: int, routing_map: Tensor, scope: Any, pool_DE: Tensor | None) -> None:
        ids = scope.document_ids_T
        experts = self.decisions.setdefault((layer, "experts"), {})
        for place, document, chosen in zip(self.places, ids, routing_map, strict=True):
            if document >= 0:
                experts[int(place)] = tuple(chosen.nonzero().flatten().tolist())
        if pool_DE is not None:
            pools = self.decisions.setdefault((layer, "pools"), {})
            segments = scope.segments
            starts_D = segments.starts_D - segments.rows_D * segments.tokens_per_sample
            is_empty = torch.bincount(scope.segments.document_ids_T + 1, minlength=len(pool_DE) + 1)
            for document, pool in enumerate(pool_DE):
                if is_empty[document + 1] > 0:
                    key = (
                        int(scope.sample_positions_D[document]),
                        int(starts_D[document]),
                    )
                    pools[key] = tuple(pool.nonzero().flatten().tolist())

    def _margins(self, router: Any, logits_TE: Tensor, scope: Any, pool_DE: Any) -> None:
        """Smallest gap in probability between an expert that was taken and one that was not."""
        ids = scope.document_ids_T
        for document in ids.unique().tolist():
            rows = logits_TE[ids == document]
            if document < 0:
                continue
            inside = torch.ones(rows.shape[1], dtype=torch.bool)
            if pool_DE is not None:
                inside = pool_DE[document]
                mean = rows.softmax(-1).mean(0)
                if not inside.all():
                    self._note(mean[inside].min() - mean[~inside].max())
            scores = rows.masked_fill(~inside, float("-inf")).softmax(-1)
            best = scores.topk(min(router.topk + 1, scores.shape[1])).values
            if inside.sum() > router.topk:
                self._note((best[:, router.topk - 1] - best[:, router.topk]).min())

    def _margin_of_noise(
        self, router: Any, logits_TE: Tensor, scope: Any, pool_DE: Tensor | None
    ) -> None:
        """A margin of 0 where noise far above rounding changes what gates, groups or biases decide."""
        from emo_megatron import ops

        ids_T = scope.document_ids_T
        wanted: Any = None
        for scale in (0.0, *[NOISE] * 4):
            noisy_TE = logits_TE + scale * torch.randn(logits_TE.shape, generator=self.noise)
            if pool_DE is not None:
                _, choosing_DE = router._document_scores(noisy_TE, ids_T, scope, "reference")
                choosing_DE, sizes_D = router._within_groups(choosing_DE, pool_DE.sum(dim=-1))
                pool_DE = ops.select_pool(choosing_DE, pool_sizes_D=sizes_D, backend="reference")
            routed = ops.pool_topk(
                noisy_TE,
                document_ids_T=ids_T,
                pool_DE=pool_DE,
                top_k=router.topk,
                score_function=router.score_function,
                pre_softmax=router.config.moe_router_pre_softmax,
                expert_bias_E=router.expert_bias,
                num_groups=router.num_groups,
                group_topk=router.config.moe_router_group_topk,
                backend="reference",
            )
            is_real_T1 = (ids_T >= 0)[:, None]
            found = [pool_DE, routed.routing_map_TE & is_real_T1]
            wanted = wanted or found
            if not all(a is b or torch.equal(a, b) for a, b in zip(found, wanted, strict=True)):
                self.margin = 0.0

    def _note(self, gap: Tensor) -> None:
        self.margin = min(self.margin, float(gap))
