"""What this package asks of a model, Megatron's or Hugging Face's.

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
    """Cross entropy on validation documents; a NotFiniteError where it is not finite."""

    nats: float
    """Mean a token."""
    num_tokens: int
    """Predicted tokens behind it: every token of a document but its first."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.nats):
            raise NotFiniteError(f"a loss must be a finite number; got {self.nats}")

    @classmethod
    def mean(cls, nats: float, *, num_tokens: int) -> Loss:
        """Of a sum over tokens."""
        if num_tokens < 1:
            raise ValueError(
                "validation documents must have two tokens or more, since the first is not predicted; got "
                "documents of one token only"
            )
        return cls(nats=nats / num_tokens, num_tokens=num_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What a measurement depends on beside the documents."""

    weights: str
    """`digest_of` what is run: its weights, and how it computes with them."""
    seq_length: int
    """Tokens a row."""
    dtype: str
    """Of the weights as they are run."""
    megatron: str = ""
    """More of Megatron's flags, which the user gave."""


class ExpertRunner(Protocol):
    """A model whose experts can be watched and left out. On several ranks all of them call alike and get the same.

    What it measures is finite, or a NotFiniteError names the layer and the expert that make it so.
    """

    @property
    def metadata(self) -> ModelMetadata:
        """What it is."""
        ...

    @property
    def setting(self) -> Setting:
        """What measurements of it depend on."""
        ...

    @property
    def is_writer(self) -> bool:
        """Whether this process writes files and shows progress."""
        ...

    def from_writer[T](self, read: Callable[[], T]) -> T:
        """What the writer finds in files, or its error, on all ranks: no other looks while files come and go."""
        ...

    def statistics(
        self, documents: Sequence[Tensor], *, outputs: bool, allowed_LE: Tensor | None = None
    ) -> ExpertStatistics:
        """Run documents and sum up what the experts do.

        Args:
            documents: [n] int64 token ids each.
            outputs: also what they put out, for EASY-EP and REAP; costs time and memory.
            allowed_LE: [L, E] bool, experts that may be used; None: all. Probabilities are over all experts anyway.
        """
        ...

    def loss(self, documents: Sequence[Tensor], *, allowed_LE: Tensor | None = None) -> Loss:
        """Mean loss on documents with the allowed experts, as a module cut out of the model would have it."""
        ...


def statistics_of(
    model: ExpertRunner,
    documents: Sequence[Tensor],
    *,
    summed: Callable[[str], Tensor],
    outputs: bool,
    allowed_LE: Tensor | None,
) -> ExpertStatistics:
    """What a `ExpertRunner` answers, from its sums.

    Args:
        model, documents, outputs, allowed_LE: of the call that is answered.
        summed: name of a sum of `LayerSums` -> that of all layers, [L, E] or [L, E, E]; on the CPU.
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
        # a router's scores alone show what an expert of an earlier layer did
        if not outputs:
            with contextlib.suppress(NotImplementedError):
                model.statistics(documents, outputs=True, allowed_LE=allowed_LE)
        raise


def check_nats(nats: float, model: ExpertRunner, documents: Sequence[Tensor], *, allowed_LE: Tensor | None) -> None:
    """Refuse a sum of losses that is not finite. All ranks call alike.

    The documents are run once more, and the error names the first layer and expert whose numbers are not finite, or
    says that it is the logits'.
    """
    if math.isfinite(nats):
        return
    try:
        model.statistics(documents, outputs=True, allowed_LE=allowed_LE)
    except NotImplementedError:
        model.statistics(documents, outputs=False, allowed_LE=allowed_LE)
    raise NotFiniteError(
        f"a loss must be a finite number; got {nats}. The layers with experts compute finite numbers, and the logits "
        "that follow are none: run the model in a wider dtype, or take an earlier checkpoint"
    )


_CHUNK = 2**20
"""64-bit words hashed at once: some tens of megabytes of intermediate results."""


def digest_of(weights: Iterable[tuple[str, Tensor]], *, configuration: Mapping[str, object] | None = None) -> str:
    """16 hex digits that tell models apart, wherever their weights lie and whenever they were written.

    File names, sizes and metadata do not tell two fine-tunings of one model apart, so the weights themselves are read.

    Args:
        weights: by name, of any shapes and dtypes, on any device.
        configuration: what else the model's answers depend on; a value is told apart as text.
    """
    digest = hashlib.sha256(json.dumps(configuration, sort_keys=True, default=str).encode())
    for name, weight in sorted(weights, key=lambda named: named[0]):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} ".encode())
        if weight.numel():
            digest.update(_sums(weight.detach()).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _sums(weight: Tensor) -> Tensor:
    """[n] int64, a sum for each chunk of a weight's bits, in which every word has a factor of its own."""
    bytes_N = weight.contiguous().view(-1).view(torch.uint8)
    words_N = torch.nn.functional.pad(bytes_N, (0, -len(bytes_N) % 8)).view(torch.int64)
    factors_N = torch.arange(1, 2 * min(_CHUNK, len(words_N)), 2, device=weight.device) * 0x1E3779B97F4A7C15
    # the shift brings the highest bits, the signs, down to where a product spreads them
    sums = [((part ^ (part >> 29)) * factors_N[: len(part)]).sum() for part in words_N.split(_CHUNK)]
    return torch.stack(sums)
