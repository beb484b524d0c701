"""A runner for Megatron models: statistics of the experts, and the loss with some of the experts, in parallel layouts.

With multi-token prediction, statistics cover the MoE layers of the prediction too: as in training, a position counts at
depth k only if the token k positions later is in the same document. Losses are losses of the next token only.

Shapes: L MoE layers of the whole model, E routed experts.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from emo_megatron.checkpoint.source import number_of
from emo_megatron.experts.calibration import Row, empty_row, pack_rows
from emo_megatron.experts.stats import ExpertStatistics, ModelMetadata
from emo_megatron.mcore.layer import PoolMoELayer
from emo_megatron.mcore.padding import Packing, packed_params
from emo_megatron.runners.base import Loss, Setting, check_nats, digest_of, statistics_of
from emo_megatron.runners.megatron_hooks import MoELayerHooks, check_outputs, check_weights, model_weights


class MegatronRunner:
    """An `ExpertRunner` for this rank's part of a Megatron model. All ranks must make the same calls.

    Args:
        model: the GPTModel of this pipeline stage; its MoE layers must be PoolMoELayers, with pools off in evaluation.
        metadata: metadata of the whole model.
        seq_length: tokens per row; longer documents are cut.
        micro_batch_size: rows per micro-batch.
        configuration: flags of the run that trained the model.
        megatron: more flags of Megatron, given by the user.

    Attributes:
        model: the model that runs. `setting` is of the weights at construction: no CachedRunner may measure a model
            that was changed afterwards.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        metadata: ModelMetadata,
        seq_length: int,
        micro_batch_size: int,
        configuration: Mapping[str, object] | None = None,
        megatron: str = "",
    ) -> None:
        if parallel_state.get_context_parallel_world_size() > 1:
            raise NotImplementedError("context parallelism is unsupported here; remove --context-parallel-size")
        check_weights(model)
        self.metadata = metadata
        self.model: Any = model.eval()
        self._layers = [m for m in model.modules() if isinstance(m, PoolMoELayer)]
        self._seq_length, self._rows_at_once = seq_length, micro_batch_size
        parameter = next(model.parameters())
        self._device = parameter.device
        self.setting = Setting(
            weights=_digest(model, configuration), seq_length=seq_length, dtype=str(parameter.dtype), megatron=megatron
        )

    @property
    def is_writer(self) -> bool:
        """Whether this is the first rank."""
        return dist.get_rank() == 0

    def from_writer[T](self, read: Callable[[], T]) -> T:
        """See ExpertRunner."""
        found: list[Any] = [None, None]
        if self.is_writer:
            try:
                found[0] = read()
            except (OSError, ValueError) as error:
                found[1] = error
        dist.broadcast_object_list(found, src=0)
        if found[1] is not None:
            raise found[1]
        answer: T = found[0]
        return answer

    def statistics(
        self, documents: Sequence[Tensor], *, outputs: bool, allowed_LE: Tensor | None = None
    ) -> ExpertStatistics:
        """See ExpertRunner."""
        if outputs:
            check_outputs(self.model.config)
        observers = [MoELayerHooks(layer, outputs=outputs) for layer in self._layers]
        try:
            self._run(documents, allowed_LE)
        finally:
            for observer in observers:
                observer.remove()

        def summed(name: str) -> Tensor:
            found = {number_of(o.layer): getattr(o.sums, name) for o in observers}
            return self._over_ranks(found, is_square=name == "coactivation_EE")

        return statistics_of(self, documents, summed=summed, outputs=outputs, allowed_LE=allowed_LE)

    def loss(self, documents: Sequence[Tensor], *, allowed_LE: Tensor | None = None) -> Loss:
        """See ExpertRunner."""
        entries = self._run(documents, allowed_LE)
        totals = torch.zeros(2, dtype=torch.float64, device=self._device)
        # on the last pipeline stage, every tensor-parallel rank has the losses of all tokens
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            for entry in entries:
                totals += entry["nats"].to(totals)
        dist.all_reduce(totals, group=dist.group.WORLD)
        nats, num_tokens = float(totals[0]), int(totals[1])
        check_nats(nats, self, documents, allowed_LE=allowed_LE)
        return Loss.mean(nats, num_tokens=num_tokens)

    def document_nats(self, documents: Sequence[Tensor], *, allowed_LE: Tensor | None = None) -> Tensor:
        """[D] float64 on the CPU: cross entropy per document, summed over all tokens except the first."""
        if dist.get_world_size() > 1:
            raise NotImplementedError("losses of single documents need exactly one process")
        entries = self._run(documents, allowed_LE)
        nats_T = torch.cat([entry["token_nats"] for entry in entries]).cpu()
        # rows hold the documents in order, whole or cut
        parts = nats_T.split([max(document.numel() - 1, 0) for document in documents])
        nats_D = torch.stack([part.sum() for part in parts])
        check_nats(float(nats_D.sum()), self, documents, allowed_LE=allowed_LE)
        return nats_D

    @torch.no_grad()
    def _run(self, documents: Sequence[Tensor], allowed_LE: Tensor | None) -> list[dict[str, Tensor]]:
        """Run documents through Megatron's schedule; the last stage returns the losses of this rank's micro-batches."""
        rows = pack_rows(documents, seq_length=self._seq_length)
        num_batches = -(-sum(1 for _ in rows) // self._rows_of_all)
        if allowed_LE is not None and bool(allowed_LE.all()):
            # all experts are allowed: a subset would turn off routing by groups of experts
            allowed_LE = None
        for layer in self._layers:
            place = self.metadata.layers.index(number_of(layer))
            layer.pool_router.allowed_experts = None if allowed_LE is None else allowed_LE[place].to(self._device)
        try:
            found = get_forward_backward_func()(
                forward_step_func=_forward_step,
                data_iterator=self._batches(documents, num_batches),
                model=self.model,
                num_microbatches=num_batches,
                # a micro-batch is one packed stream
                seq_length=self._seq_length * self._rows_at_once,
                micro_batch_size=1,
                forward_only=True,
            )
        finally:
            for layer in self._layers:
                layer.pool_router.allowed_experts = None
        return list(found)

    @property
    def _rows_of_all(self) -> int:
        """Rows per micro-batch, summed over all data-parallel ranks."""
        return int(parallel_state.get_data_parallel_world_size()) * self._rows_at_once

    def _batches(self, documents: Sequence[Tensor], num_batches: int) -> Iterator[_Batch]:
        """Yield this data-parallel rank's micro-batches, made lazily; after the last document, rows are padding."""
        rows = itertools.chain(
            pack_rows(documents, seq_length=self._seq_length), itertools.repeat(empty_row(self._seq_length))
        )
        first = parallel_state.get_data_parallel_rank() * self._rows_at_once
        for _ in range(num_batches):
            of_all = list(itertools.islice(rows, self._rows_of_all))
            yield _batch(of_all[first : first + self._rows_at_once], self._device)

    def _over_ranks(self, found: dict[int, Tensor], *, is_square: bool) -> Tensor:
        """[L, E] or [L, E, E] float64 on the CPU: sums per layer, added over all ranks.

        `found` maps layer numbers to this rank's sums. In each layer, exactly one rank counts each token.
        """
        num_layers, num_experts = len(self.metadata.layers), self.metadata.num_experts
        shape = (num_layers, num_experts, num_experts)[: 3 if is_square else 2]
        # counts are integers far below 2^53, so float64 is exact
        total = torch.zeros(shape, dtype=torch.float64, device=self._device)
        for number, tensor in found.items():
            total[self.metadata.layers.index(number)] = tensor.double()
        dist.all_reduce(total, group=dist.group.WORLD)
        return total.cpu()


def _digest(model: torch.nn.Module, configuration: Mapping[str, object] | None) -> str:
    """16 hex digits of the configuration and of all ranks' weights; of the layout, only tensor parallelism matters."""
    own = [f"{name} {experts} {digest_of([('', part)])}" for name, _, experts, part in model_weights(model)]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    # the set removes the equal weights of data-parallel ranks
    lines = [digest_of((), configuration=configuration), *sorted({line for of_rank in found for line in of_rank})]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Rows packed one after the other, [1, rows * S], with document boundaries."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    is_predicted_T: Tensor
    packed: PackedSeqParams


def _batch(rows: list[Row], device: torch.device) -> _Batch:
    seq_length = rows[0].tokens_S.numel()
    rooms = [seq_length - sum(row.lengths) for row in rows]
    # for attention and for the shifts of multi-token prediction, the rest of a row is a document of padding
    slots = [n for row, room in zip(rows, rooms, strict=True) for n in (*row.lengths, *([room] if room else []))]
    packing = Packing(
        cu_seqlens=torch.tensor([0, *slots], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32),
        tokens_per_sample=seq_length,
        # the routers count padding in no document
        num_padding_B=torch.tensor(rooms, device=device),
    )
    return _Batch(
        tokens=torch.cat([row.tokens_S for row in rows])[None].to(device),
        labels=torch.cat([row.labels_S for row in rows])[None].to(device),
        positions=torch.cat([torch.arange(slot) for slot in slots])[None].to(device),
        is_predicted_T=torch.cat([row.is_predicted_S for row in rows]).to(device),
        packed=packed_params(packing, longest=max(slots)),
    )


def _forward_step(batches: Iterator[_Batch], model: Any) -> tuple[Tensor, Any]:
    batch = next(batches)
    output = model(batch.tokens, batch.positions, None, labels=batch.labels, packed_seq_params=batch.packed)
    return output, functools.partial(_loss, batch.is_predicted_T)


def _loss(is_predicted_T: Tensor, losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    token_nats_T = losses.reshape(-1)[is_predicted_T].double()
    total = token_nats_T.sum()
    nats = torch.stack([total, is_predicted_T.sum().to(total)])
    return total.float(), {"nats": nats, "token_nats": token_nats_T}
