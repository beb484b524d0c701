"""The runner: the interface that the commands require of a model, whether of Megatron or of Hugging Face.

Shapes: L MoE layers in model order, E routed experts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from emo_megatron.experts.stats import ExpertStatistics, ModelMetadata
from emo_megatron.finite import NotFiniteError


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """Cross entropy on validation documents; raises NotFiniteError for a loss that is not finite."""

    nats: float
    """Mean loss in nats per token."""
    num_tokens: int
    """Number of predicted tokens: all tokens of a document except the first."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.nats):
            raise NotFiniteError(f"a loss must be a finite number; got {self.nats}")

    @classmethod
    def mean(cls, nats: float, *, num_tokens: int) -> Loss:
        """Make a mean loss from a sum over `num_tokens` tokens."""
        if num_tokens < 1:
            raise ValueError(
                "validation documents must have two tokens or more, because the first token is not predicted; got "
                "only documents of one token"
            )
        return cls(nats=nats / num_tokens, num_tokens=num_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Everything besides the documents that a measurement depends on."""

    weights: str
    """`digest_of` the model: the weights and the configuration."""
    seq_length: int
    """Tokens per row."""
    dtype: str
    """Dtype of the weights in the running model."""
    megatron: str = ""
    """More flags of Megatron, given by the user."""


class ExpertRunner(Protocol):
    """A model whose experts can be measured and left out. All ranks must make the same calls, and get the same results.

    Results are finite; otherwise a NotFiniteError names the layer and the expert with the first number that is not.
    """

    @property
    def metadata(self) -> ModelMetadata:
        """Metadata of the model."""
        ...

    @property
    def setting(self) -> Setting:
        """Settings that measurements of the model depend on."""
        ...

    @property
    def is_writer(self) -> bool:
        """Whether this process writes files and shows progress."""
        ...

    def from_writer[T](self, read: Callable[[], T]) -> T:
        """Read files on the writer only and return the result, or raise the writer's error, on all ranks.

        If every rank read the files, ranks could see different states while files change.
        """
        ...

    def statistics(
        self, documents: Sequence[Tensor], *, outputs: bool, allowed_LE: Tensor | None = None
    ) -> ExpertStatistics:
        """Run documents and sum up statistics of the experts.

        Args:
            documents: token ids of each document, [n] int64.
            outputs: whether to measure expert outputs too, for EASY-EP and REAP; needs more time and memory.
            allowed_LE: [L, E] bool, experts that may be used; None: all. Probabilities are always over all experts.
        """
        ...

    def loss(self, documents: Sequence[Tensor], *, allowed_LE: Tensor | None = None) -> Loss:
        """Mean loss on documents with the allowed experts only, equal to the loss of the module with these experts.

        The loss of the next token; the losses of multi-token prediction are not measured.
        """
        ...


def statistics_of(
    model: ExpertRunner,
    documents: Sequence[Tensor],
    *,
    summed: Callable[[str], Tensor],
    outputs: bool,
    allowed_LE: Tensor | None,
) -> ExpertStatistics:
    """Make the result of `ExpertRunner.statistics` from sums.

    Args:
        model, documents, outputs, allowed_LE: runner and arguments of the call.
        summed: name of a sum of `LayerSums` -> the sum for all layers, [L, E] or [L, E, E], on the CPU.
    """
    coactivation_LEE = summed("coactivation_EE").round().long()
    try:
        return ExpertStatistics(
            model=model.metadata,
            num_documents=len(documents),
            num_tokens=sum(document.numel() for document in documents),
            probability_LE=summed("probability_E"),
            count_LE=coactivation_LEE.diagonal(dim1=1, dim2=2).contiguous(),
            coactivation_LEE=coactivation_LEE,
            gated_norm_LE=summed("gated_norm_E") if outputs else None,
            residual_change_LE=summed("residual_change_E") if outputs else None,
        )
    except NotFiniteError:
        # without outputs, a bad expert shows only in the router of a later layer: run again to find the expert
        if not outputs:
            with contextlib.suppress(NotImplementedError):
                model.statistics(documents, outputs=True, allowed_LE=allowed_LE)
        raise


def check_nats(nats: float, model: ExpertRunner, documents: Sequence[Tensor], *, allowed_LE: Tensor | None) -> None:
    """Raise NotFiniteError for a sum of losses that is not finite. All ranks must call this function.

    The documents are run again to find the cause. The error names the first layer and expert whose numbers are not
    finite, or the logits.
    """
    if math.isfinite(nats):
        return
    try:
        model.statistics(documents, outputs=True, allowed_LE=allowed_LE)
    except NotImplementedError:
        model.statistics(documents, outputs=False, allowed_LE=allowed_LE)
    raise NotFiniteError(
        f"a loss must be a finite number; got {nats}. The layers with experts compute finite numbers, but the logits "
        "are not finite: run the model in a wider dtype, or use an earlier checkpoint"
    )


_CHUNK = 2**20
"""64-bit words hashed at once; needs a few tens of megabytes for intermediate results."""


def digest_of(weights: Iterable[tuple[str, Tensor]], *, configuration: Mapping[str, object] | None = None) -> str:
    """16 hex digits that identify a model by its weights, independent of the place and date of its files.

    Two fine-tunings of one model may have equal file names, sizes and metadata, so the weights themselves are read.

    Args:
        weights: weights by name, of any shapes and dtypes, on any device.
        configuration: other settings that the model's results depend on; values are compared as text.
    """
    digest = hashlib.sha256(json.dumps(configuration, sort_keys=True, default=str).encode())
    for name, weight in sorted(weights, key=lambda named: named[0]):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} ".encode())
        if weight.numel():
            digest.update(_sums(weight.detach()).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _sums(weight: Tensor) -> Tensor:
    """[n] int64: one sum per chunk of a weight's bits; in a chunk, every word has a different factor."""
    bytes_N = weight.contiguous().view(-1).view(torch.uint8)
    words_N = torch.nn.functional.pad(bytes_N, (0, -len(bytes_N) % 8)).view(torch.int64)
    factors_N = torch.arange(1, 2 * min(_CHUNK, len(words_N)), 2, device=weight.device) * 0x1E3779B97F4A7C15
    # the shift copies the highest bits, such as signs, to lower places, so that the product spreads them
    sums = [((part ^ (part >> 29)) * factors_N[: len(part)]).sum() for part in words_N.split(_CHUNK)]
    return torch.stack(sums)
