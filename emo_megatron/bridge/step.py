"""The forward step of Bridge's pretrain(): every stage reads its batch, and its routers get the documents."""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from megatron.bridge.training.losses import masked_next_token_loss
from megatron.bridge.training.state import GlobalState
from megatron.bridge.training.utils.flop_utils import (
    accumulate_flops_metadata,
    get_model_chunk_vp_stage,
)
from megatron.bridge.training.utils.pg_utils import get_pg_collection
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from emo_megatron.bridge.pooled import Pooled
from emo_megatron.bridge.recipe import check_run
from emo_megatron.bridge.run_config import check_resume
from emo_megatron.mcore.context import CLOCK
from emo_megatron.mcore.metrics import install_metrics
from emo_megatron.mcore.router_documents import (
    RouterDocuments,
    forward_with_documents,
    merged_bounds,
)


def pool_forward_step(
    state: GlobalState, data_iterator: Any, model: Any, return_schedule_plan: bool = False
) -> tuple[Any, Any]:
    """One micro-batch through this stage, for Bridge's `pretrain(cfg, pool_forward_step)`.

    Args:
        state: Bridge's; its model is one that apply_pools has changed.
        data_iterator: of this stage's batches.
        model: this stage, or virtual stage.
        return_schedule_plan: plan the pass and don't run it, as expert-parallel overlap asks.

    Returns:
        The stage's output or the plan, and the loss as a function of the output.

    Raises:
        ValueError: the recipe has no pools, or the run that is resumed had others.
    """
    _begin(state)
    CLOCK.consumed_samples = state.train_state.consumed_train_samples
    vp_stage = get_model_chunk_vp_stage(model)
    state.timers("batch-generator", log_level=2).start()
    with state.straggler_timer(bdata=True):
        batch, documents = _get_batch(state, data_iterator, model, vp_stage)
    state.timers("batch-generator").stop()
    accumulate_flops_metadata(
        state, batch["tokens"], vp_stage=vp_stage, config_seq_len=state.cfg.model.seq_length
    )
    with state.straggler_timer:
        output = forward_with_documents(
            model.build_schedule_plan if return_schedule_plan else model,
            documents,
            batch["tokens"],
            batch["position_ids"],
            None,
            labels=batch["labels"],
            **({"loss_mask": batch["loss_mask"]} if return_schedule_plan else {}),
        )
    checks = state.cfg.rerun_state_machine
    loss = functools.partial(
        masked_next_token_loss,
        batch["loss_mask"],
        check_for_nan_in_loss=checks.check_for_nan_in_loss,
        check_for_spiky_loss=checks.check_for_spiky_loss,
    )
    return output, loss


def _get_batch(
    state: GlobalState, data_iterator: Any, model: Any, vp_stage: int | None
) -> tuple[dict[str, Tensor | None], RouterDocuments]:
    """This stage's part of the next micro-batch, [mbs, s] each or None, and the documents of all of it."""
    groups, config = get_pg_collection(model), state.cfg.model
    loaded = next(data_iterator)
    if "cu_seqlens" not in loaded:
        raise ValueError(
            f"dataset.inter_document_masking must be True; got a batch of {sorted(loaded)}: the documents of a batch "
            "come with it"
        )
    mbs, length = loaded["tokens"].shape
    documents = RouterDocuments(
        # on the host, where counting the documents costs nothing
        cu_seqlens=merged_bounds(loaded["cu_seqlens"]).cuda(non_blocking=True),
        tokens_per_sample=length,
        num_padding_B=_num_padding(loaded["loss_mask"], state.cfg.dataset),
    )
    # the dataset starts them anew at every document, which the recipe's attention does not
    loaded["position_ids"] = torch.arange(length).expand(mbs, length)
    vp = {"vp_stage": vp_stage, "vp_size": config.virtual_pipeline_model_parallel_size}
    wanted: tuple[str, ...] = ()
    if is_pp_first_stage(groups.pp) and (vp_stage is None or is_vp_first_stage(**vp)):
        wanted += ("tokens", "position_ids")
    if is_pp_last_stage(groups.pp) and (vp_stage is None or is_vp_last_stage(**vp)):
        wanted += ("labels", "loss_mask")
    batch = {
        key: loaded[key].cuda(non_blocking=True) if key in wanted else None
        for key in ("tokens", "position_ids", "labels", "loss_mask")
    }
    if groups.cp.size() > 1 and wanted:
        batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=groups.cp)
    return batch, documents


def _num_padding(loss_mask_BS: Tensor, dataset: Any) -> Tensor | None:
    """[B] int64, tokens of padding at the end of each sample, which the dataset counts to its last document.

    Told by the loss, which leaves out padding and the token before it; None where it leaves out other tokens too.
    """
    if dataset.eod_mask_loss:
        return None
    is_left_out_BS = loss_mask_BS.flip(1).cumsum(1) == 0
    num_left_out_B = is_left_out_BS.sum(1)
    num_padding_B = (num_left_out_B - 1).clamp(min=0)
    # a sample that fills up a batch has no loss at all
    is_filler_B = num_left_out_B == loss_mask_BS.shape[1]
    return torch.where(is_filler_B, num_left_out_B, num_padding_B).cuda(non_blocking=True)


@dataclass(slots=True)
class _Run:
    state: weakref.ref[GlobalState] | None = None


_RUN = _Run()
"""The run that this process is in."""


def _begin(state: GlobalState) -> None:
    """At the first step of a run: check what it resumes, and let Megatron report the routers' metrics.

    Bridge hands metrics to its loggers and drops the line for the console, so that line is printed here.
    """
    if _RUN.state is not None and _RUN.state() is state:
        return
    model = state.cfg.model
    if not isinstance(model, Pooled):
        raise ValueError(
            "cfg.model must have document pools with pool_forward_step; call emo_megatron.bridge.apply_pools(cfg, "
            "PoolConfig(...)) first"
        )
    # options that came after apply_pools
    check_run(state.cfg, model.pool_config())
    check_resume(state.cfg.checkpoint, model.pool_config(), step=state.train_state.step)
    install_metrics(model.pool_config(), model, has_documents=True)
    tracker = get_moe_metrics_tracker()
    report = tracker.report
    is_last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1

    def report_and_print(*args: Any, **kwargs: Any) -> str:
        line = report(*args, **kwargs)
        if is_last and line:
            print(f" pools |{line}", flush=True)
        return line

    tracker.report = report_and_print
    _RUN.state = weakref.ref(state)
