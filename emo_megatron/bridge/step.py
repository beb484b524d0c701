"""The forward step for Bridge's pretrain(): each stage reads its batch and passes the documents to its routers."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from megatron.bridge.training.losses import masked_next_token_loss
from megatron.bridge.training.state import GlobalState
from megatron.bridge.training.utils.flop_utils import accumulate_flops_metadata, get_model_chunk_vp_stage
from megatron.bridge.training.utils.pg_utils import get_pg_collection
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.utils import get_batch_on_this_cp_rank, unwrap_model
from torch import Tensor

from emo_megatron.bridge.pooled import Pooled
from emo_megatron.bridge.recipe import check_run
from emo_megatron.bridge.run_config import check_resume
from emo_megatron.mcore.batches import TOKEN_KEYS
from emo_megatron.mcore.context import CLOCK
from emo_megatron.mcore.metrics import install_metrics
from emo_megatron.mcore.mtp import use_packed_roll
from emo_megatron.mcore.padding import (
    Packing,
    cut_by_document,
    over_all_tokens,
    packed_params,
    padded_bounds,
    padding_multiple,
)
from emo_megatron.mcore.router_documents import RouterDocuments, forward_stage, merged_bounds

Batch = dict[str, Tensor | None]


def pool_forward_step(
    state: GlobalState, data_iterator: Any, model: Any, return_schedule_plan: bool = False
) -> tuple[Any, Any]:
    """Run one micro-batch through this stage: `pretrain(cfg, pool_forward_step)`, after `apply_pools` on cfg.

    Returns the stage's output, and the loss as a function of that output. With `return_schedule_plan`, which
    expert-parallel overlap uses, the forward pass is planned but not run.
    """
    _begin(state)
    CLOCK.consumed_samples = state.train_state.consumed_train_samples
    config, groups = state.cfg.model, get_pg_collection(model)
    state.timers("batch-generator", log_level=2).start()
    with state.straggler_timer(bdata=True):
        batch, packing = _get_batch(state, data_iterator, unwrap_model(model))
        _count_flops(state, get_model_chunk_vp_stage(model), batch, packing)
        documents = packed = None
        if config.pool_documents == "routers":
            batch, documents = _cut_by_sample(batch, packing, groups)
        else:
            batch, packed = _packed(batch, packing, config, groups)
    state.timers("batch-generator").stop()
    # samples of padded documents differ in length, and stages exchange the shapes
    is_flat = packed is None or config.cuts_documents
    num_samples = 1 if is_flat else packing.num_samples or 1
    with state.straggler_timer:
        output = forward_stage(
            model, batch, documents, packed, num_samples=num_samples, is_planned=return_schedule_plan
        )
    checks = state.cfg.rerun_state_machine
    loss = functools.partial(
        masked_next_token_loss,
        batch["loss_mask"],
        check_for_nan_in_loss=checks.check_for_nan_in_loss,
        check_for_spiky_loss=checks.check_for_spiky_loss,
    )
    if groups.cp.size() == 1 or config.calculate_per_token_loss:
        return output, loss
    return output, functools.partial(_of_all_tokens, loss, groups.cp)


def _get_batch(state: GlobalState, data_iterator: Any, stage: Any) -> tuple[Batch, Packing]:
    """The next micro-batch, on the host and not yet split over context-parallel ranks.

    Returns:
        TOKEN_KEYS -> [mbs, S], or None if this stage does not need the key; and the documents.
    """
    loaded = next(data_iterator)
    if "cu_seqlens" not in loaded:
        raise ValueError(
            f"dataset.inter_document_masking must be True, so that batches have document boundaries; got a batch of "
            f"{sorted(loaded)}"
        )
    num_samples, length = loaded["tokens"].shape
    packing = Packing(
        cu_seqlens=merged_bounds(loaded["cu_seqlens"]).int(),
        tokens_per_sample=length,
        num_samples=num_samples,
        num_padding_B=_num_padding(loaded["loss_mask"], state.cfg.dataset),
    )
    needed: tuple[str, ...] = ("labels", "loss_mask") if stage.post_process else ()
    # layers of multi-token prediction also embed tokens
    if stage.pre_process or stage.mtp_process:
        needed += ("tokens", "position_ids")
    return {key: loaded[key] if key in needed else None for key in TOKEN_KEYS}, packing


def _count_flops(state: GlobalState, vp_stage: int | None, batch: Batch, packing: Packing) -> None:
    model = state.cfg.model
    # Bridge counts attention inside documents only without context parallelism
    is_packed = model.pool_documents == "attention" and not model.cuts_documents
    accumulate_flops_metadata(
        state,
        batch["tokens"],
        vp_stage=vp_stage,
        config_seq_len=model.seq_length,
        cu_seqlens=packing.cu_seqlens if is_packed else None,
    )


def _cut_by_sample(batch: Batch, packing: Packing, groups: Any) -> tuple[Batch, RouterDocuments]:
    """This rank's part of the micro-batch for the recipe's attention, and the documents for the routers."""
    if batch["position_ids"] is not None:
        # the dataset restarts positions at every document
        shape = batch["position_ids"].shape
        batch["position_ids"] = torch.arange(shape[1]).expand(shape)
    batch = _on_device(batch)
    if groups.cp.size() > 1:
        batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=groups.cp)
    return batch, RouterDocuments(**_on_device(vars(packing)))


def _packed(batch: Batch, packing: Packing, config: Any, groups: Any) -> tuple[Batch, PackedSeqParams]:
    """This rank's part of the micro-batch as one packed sequence, [1, t] per key, and its packing parameters."""
    batch = {key: None if value is None else value.view(1, -1) for key, value in batch.items()}
    bounds, cu_seqlens = None, packing.cu_seqlens
    if config.cuts_documents:
        tp_size = groups.tp.size() if config.sequence_parallel else 1
        multiple = padding_multiple(cp_size=groups.cp.size(), tp_size=tp_size)
        bounds = padded_bounds(cu_seqlens, multiple=multiple)
        batch = cut_by_document(
            batch,
            TOKEN_KEYS,
            cu_seqlens=cu_seqlens,
            bounds=bounds,
            num_tokens=int(bounds[-1]),
            cp_rank=groups.cp.rank(),
            cp_size=groups.cp.size(),
        )
    longest = int((cu_seqlens if bounds is None else bounds).diff().max())
    packed = packed_params(Packing(**_on_device(vars(packing))), longest=longest, **_on_device({"bounds": bounds}))
    return _on_device(batch), packed


def _on_device(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value.cuda(non_blocking=True) if isinstance(value, Tensor) else value for key, value in values.items()}


def _of_all_tokens(loss: Any, group: Any, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """A context-parallel rank's loss, scaled so that Megatron's mean over ranks equals the mean over all tokens."""
    summed, num_tokens, report = loss(output)
    return *over_all_tokens(summed, num_tokens, group), report


def _num_padding(loss_mask_BS: Tensor, dataset: Any) -> Tensor | None:
    """[B] int64, number of padding tokens at the end of each sample. The dataset counts them to the last document.

    The loss mask gives the number: the loss leaves out padding and the token before the padding. None if the loss also
    leaves out other tokens.
    """
    if dataset.eod_mask_loss:
        return None
    is_left_out_BS = loss_mask_BS.flip(1).cumsum(1) == 0
    num_left_out_B = is_left_out_BS.sum(1)
    num_padding_B = (num_left_out_B - 1).clamp(min=0)
    # a sample that only fills up a batch has no token with loss
    is_filler_B = num_left_out_B == loss_mask_BS.shape[1]
    return torch.where(is_filler_B, num_left_out_B, num_padding_B)


# the run of this process
_run: weakref.ref[GlobalState] | None = None


def _begin(state: GlobalState) -> None:
    """At the first step of a run: check the resumed checkpoint, install the router metrics and the packed MTP roll.

    Bridge passes metrics to its loggers but drops the console line, so this function prints the console line.
    """
    global _run
    if _run is not None and _run() is state:
        return
    model = state.cfg.model
    if not isinstance(model, Pooled):
        raise ValueError(
            "cfg.model must have document pools for pool_forward_step; call emo_megatron.bridge.apply_pools(cfg, "
            "PoolConfig(...)) first"
        )
    # options may have changed after apply_pools
    check_run(state.cfg, model.pool_config())
    check_resume(state.cfg.checkpoint, model.pool_config(), step=state.train_state.step)
    use_packed_roll()
    install_metrics(model.pool_config(), model, has_documents=True)
    tracker: Any = get_moe_metrics_tracker()
    tracker.adds_mtp_layers &= not model.predicts_by_dense_layers
    report = tracker.report
    is_last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1

    def report_and_print(*args: Any, **kwargs: Any) -> str:
        line = report(*args, **kwargs)
        if is_last and line:
            print(f" pools |{line}", flush=True)
        return line

    tracker.report = report_and_print
    _run = weakref.ref(state)
