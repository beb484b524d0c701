"""A runner for Hugging Face models: statistics of the experts, and the loss with some of the experts, through hooks.

Supports mixture-of-experts models of transformers whose layers have a softmax router `gate` and `experts` (OLMoE,
Qwen2-MoE and Qwen3-MoE). The authors' EMO equals a Qwen2-MoE and is run as a Qwen2-MoE, without remote code.

Shapes: B rows, S positions, T = B * S tokens, E routed experts, K experts per token, H hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from emo_megatron.experts.calibration import Row, pack_rows
from emo_megatron.experts.selection import router_fingerprint
from emo_megatron.experts.stats import ExpertStatistics, LayerSums, ModelMetadata, residual_change_of
from emo_megatron.files import one_line
from emo_megatron.finite import check_named_weight
from emo_megatron.json_files import read_object
from emo_megatron.runners.base import Loss, Setting, check_nats, digest_of, statistics_of

MODEL_TYPES = ("emo", "olmoe", "qwen2_moe", "qwen3_moe")
"""Supported values of model_type in config.json."""


def load_hugging_face(path: Path) -> Any:
    """Load the model of a Hugging Face folder in evaluation mode, on a GPU if there is one; nothing is downloaded."""
    from transformers import AutoModelForCausalLM

    from emo_megatron.hf.folder import HuggingFaceFolder, as_stock, check_unquantized

    config = read_object(path / "config.json", kind="a model's configuration")
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(f"model_type must be one of {', '.join(MODEL_TYPES)}; got {kind} in {path / 'config.json'}")
    check_unquantized(path, config)
    with as_stock(HuggingFaceFolder(path)) if kind == "emo" else nullcontext(path) as folder:
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto", local_files_only=True)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is not whole: {one_line(error)}") from None
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Rows with one document each, padded at the end to the length of the longest row."""

    tokens_BS: Tensor
    labels_BS: Tensor
    is_predicted_BS: Tensor
    is_real_BS: Tensor


class HuggingFaceRunner:
    """An `ExpertRunner` over a model of transformers, in one process.

    Args:
        model: a causal language model.
        seq_length: tokens per row; longer documents are cut.
        micro_batch_size: rows per forward pass.

    Attributes:
        model: the model that runs. `setting` is of the weights at construction: no CachedRunner may measure a model
            that was changed afterwards.
    """

    def __init__(self, model: Any, *, seq_length: int, micro_batch_size: int) -> None:
        self.model = model.eval()
        self._blocks = _blocks(model)
        for name, weight in _stored_weights(model):
            check_named_weight(name, weight)
        self._seq_length, self._rows_at_once = seq_length, micro_batch_size
        self.metadata = _metadata_of(model, self._blocks)
        dtype = str(next(model.parameters()).dtype)
        self.setting = Setting(
            weights=digest_of(_stored_weights(model), configuration=_configuration(model)),
            seq_length=seq_length,
            dtype=dtype,
        )

    @property
    def is_writer(self) -> bool:
        """Always true: there is one process."""
        return True

    def from_writer[T](self, read: Callable[[], T]) -> T:
        """See ExpertRunner."""
        return read()

    def statistics(
        self, documents: Sequence[Tensor], *, outputs: bool, allowed_LE: Tensor | None = None
    ) -> ExpertStatistics:
        """See ExpertRunner."""
        observers = self._observe(allowed_LE, outputs=outputs, is_summing=True)
        try:
            for batch in self._batches(documents):
                for observer in observers:
                    observer.is_counted_T = batch.is_real_BS.flatten()
                self._logits(batch)
        finally:
            for observer in observers:
                observer.remove()

        def summed(name: str) -> Tensor:
            return torch.stack([getattr(observer.sums, name).cpu() for observer in observers])

        return statistics_of(self, documents, summed=summed, outputs=outputs, allowed_LE=allowed_LE)

    def loss(self, documents: Sequence[Tensor], *, allowed_LE: Tensor | None = None) -> Loss:
        """See ExpertRunner."""
        observers = self._observe(allowed_LE, outputs=False, is_summing=False)
        total, count = 0.0, 0
        try:
            for batch in self._batches(documents):
                logits = self._logits(batch)[batch.is_predicted_BS].float()
                labels = batch.labels_BS[batch.is_predicted_BS]
                losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
                total += float(losses.double().sum())
                count += labels.numel()
        finally:
            for observer in observers:
                observer.remove()
        check_nats(total, self, documents, allowed_LE=allowed_LE)
        return Loss.mean(total, num_tokens=count)

    def _observe(self, allowed_LE: Tensor | None, *, outputs: bool, is_summing: bool) -> list[MoEBlockHooks]:
        return [
            MoEBlockHooks(
                block,
                top_k=self.metadata.top_k,
                renormalises=bool(getattr(self.model.config, "norm_topk_prob", True)),
                allowed_E=None if allowed_LE is None else allowed_LE[place],
                outputs=outputs,
                is_summing=is_summing,
            )
            for place, block in enumerate(self._blocks.values())
        ]

    @torch.no_grad()
    def _logits(self, batch: _Batch) -> Tensor:
        # attention is causal, so no real token attends to the padding at the end of a row
        output = self.model(input_ids=batch.tokens_BS, use_cache=False)
        logits: Tensor = output.logits
        return logits

    def _batches(self, documents: Sequence[Tensor]) -> Iterator[_Batch]:
        # one row per piece of a document, because attention of these models crosses documents within a row
        rows = [row for document in documents for row in pack_rows([document], seq_length=self._seq_length)]
        for start in range(0, len(rows), self._rows_at_once):
            yield self._batch(rows[start : start + self._rows_at_once])

    def _batch(self, rows: list[Row]) -> _Batch:
        longest = max(sum(row.lengths) for row in rows)
        device = next(self.model.parameters()).device
        lengths = torch.tensor([sum(row.lengths) for row in rows])
        return _Batch(
            tokens_BS=torch.stack([row.tokens_S[:longest] for row in rows]).to(device),
            labels_BS=torch.stack([row.labels_S[:longest] for row in rows]).to(device),
            is_predicted_BS=torch.stack([row.is_predicted_S[:longest] for row in rows]).to(device),
            is_real_BS=(torch.arange(longest) < lengths[:, None]).to(device),
        )


class MoEBlockHooks:
    """Hooks that sum statistics of one MoE block and leave experts out, until `remove()`.

    Args:
        block: module with a router `gate` and `experts`.
        top_k: K.
        renormalises: whether a token's top-k probabilities are scaled to sum to 1.
        allowed_E: [E] bool, experts that may be used; None: all.
        outputs: whether to measure expert outputs too.
        is_summing: whether to sum statistics at all.

    Attributes:
        sums: sums over the counted tokens.
        is_counted_T: [T] bool, tokens of the current forward pass that are not padding; set by the caller.
    """

    def __init__(
        self, block: Any, *, top_k: int, renormalises: bool, allowed_E: Tensor | None, outputs: bool, is_summing: bool
    ) -> None:
        weight = block.gate.weight
        self._block, self._top_k, self._renormalises = block, top_k, renormalises
        self._outputs = outputs
        self._allowed_E = None if allowed_E is None else allowed_E.to(weight.device)
        self.sums = LayerSums(weight.shape[0], outputs=outputs, device=weight.device)
        self.is_counted_T: Tensor | None = None
        self._scored: tuple[Tensor, Tensor, Tensor] | None = None
        self._handles = [block.gate.register_forward_hook(self._route)]
        if is_summing:
            self._handles.append(block.register_forward_hook(self._finished))

    def remove(self) -> None:
        """Remove the hooks; afterwards the block uses all experts again."""
        for handle in self._handles:
            handle.remove()

    def _route(self, gate: Any, inputs: Any, output: Any) -> Any:
        """Store the scores; if experts are left out, replace the router's output by the output without them."""
        # in transformers 5 the router chooses the experts, and in some releases its "logits" are probabilities;
        # in earlier releases the router is a linear layer and the block chooses
        chooses = isinstance(output, tuple)
        logits_TE = torch.nn.functional.linear(inputs[0].flatten(0, -2), gate.weight)
        allowed_TE = logits_TE
        if self._allowed_E is not None:
            allowed_TE = logits_TE.masked_fill(~self._allowed_E, float("-inf"))
        probs_TE = allowed_TE.float().softmax(dim=-1)
        weights_TK, experts_TK = probs_TE.topk(self._top_k, dim=-1)
        if self._renormalises:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        weights_TK = weights_TK.to(logits_TE.dtype)
        self._scored = (logits_TE, weights_TK, experts_TK)
        if self._allowed_E is None:
            return None
        return (output[0], weights_TK, experts_TK) if chooses else allowed_TE.view_as(output)

    def _finished(self, block: Any, inputs: tuple[Any, ...], output: Any) -> None:
        assert self._scored is not None
        assert self.is_counted_T is not None
        logits_TE, weights_TK, experts_TK = self._scored
        norms_TE = change_T = None
        routing_map_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, experts_TK, True)
        if self._outputs:
            input_TH = inputs[0].flatten(0, -2)
            output_TH = (output[0] if isinstance(output, tuple) else output).reshape(input_TH.shape)
            change_T = residual_change_of(input_TH, output_TH)
            lengths_TK = self._lengths(input_TH, weights_TK, experts_TK)
            norms_TE = torch.zeros_like(logits_TE, dtype=torch.float32)
            norms_TE = norms_TE.scatter(1, experts_TK, lengths_TK)
        self.sums.add(
            probs_TE=logits_TE.float().softmax(dim=-1),
            routing_map_TE=routing_map_TE,
            is_counted_T=self.is_counted_T,
            norms_TE=norms_TE,
            change_T=change_T,
        )

    def _lengths(self, input_TH: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Tensor:
        """[T, K] float32: gate times the norm of each chosen expert's output; computes the experts again."""
        experts = self._block.experts
        found = []
        for k in range(self._top_k):
            weights_T1, experts_T1 = weights_TK[:, k : k + 1], experts_TK[:, k : k + 1]
            if isinstance(experts, torch.nn.ModuleList):
                output_TH = torch.zeros_like(input_TH)
                for expert in set(experts_T1[:, 0].tolist()):
                    rows = (experts_T1[:, 0] == expert).nonzero()[:, 0]
                    output_TH[rows] = experts[expert](input_TH[rows]) * weights_T1[rows]
            else:
                # call forward directly, so that no hooks of the model's own pass run
                output_TH = experts.forward(input_TH, experts_T1, weights_T1)
            found.append(output_TH.float().norm(dim=-1))
        return torch.stack(found, dim=1)


def _blocks(model: Any) -> dict[int, Any]:
    """Map from the number of a layer, counted from 1, to its MoE block, in model order."""
    found = {}
    for name, module in model.named_modules():
        layer = re.fullmatch(r".*\blayers\.(\d+)\.mlp", name)
        if layer and hasattr(module, "gate") and hasattr(module, "experts"):
            found[int(layer[1]) + 1] = module
    if not found:
        raise ValueError("the model must have layers with a router `gate` and `experts`; found none")
    return dict(sorted(found.items()))


def _stored_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight with its name in checkpoints; transformers 5 keeps a layer's experts in two parameters."""
    for name, parameter in model.named_parameters():
        joined = re.fullmatch(r"(.+\.experts)\.(gate_up|down)_proj", name)
        if joined is None:
            yield name, parameter
            continue
        kinds = joined[2].split("_")
        for expert, rows in enumerate(parameter):
            for kind, weight in zip(kinds, rows.chunk(len(kinds)), strict=True):
                yield f"{joined[1]}.{expert}.{kind}_proj.weight", weight


def _configuration(model: Any) -> dict[str, object]:
    """The entries of config.json that may change the model's results."""
    told = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
    return {name: value for name, value in model.config.to_dict().items() if name not in told}


def _metadata_of(model: Any, blocks: dict[int, Any]) -> ModelMetadata:
    first = next(iter(blocks.values()))
    num_experts = int(first.gate.weight.shape[0])
    routed = sum(
        parameter.numel()
        for block in blocks.values()
        for part in (block.gate, block.experts)
        for parameter in part.parameters()
    )
    return ModelMetadata(
        fingerprint=router_fingerprint(block.gate.weight for block in blocks.values()),
        num_experts=num_experts,
        top_k=int(model.config.num_experts_per_tok),
        layers=tuple(blocks),
        expert_parameters=routed // (len(blocks) * num_experts),
        other_parameters=sum(parameter.numel() for parameter in model.parameters()) - routed,
        bytes_per_parameter=next(first.experts.parameters()).element_size(),
    )
