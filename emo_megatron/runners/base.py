"""What this package asks of a model, Megatron's or Hugging Face's, and the pass over calibration documents.

Shapes: L MoE layers in model order, E routed experts.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor
from tqdm import tqdm

from emo_megatron.experts.calibration import Documents
from emo_megatron.experts.stats import ExpertStatistics, ModelFacts, load_stats, merge_stats
from emo_megatron.files import must_be_writable, partial_of
from emo_megatron.finite import NotFiniteError


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """Cross entropy on held-out documents.

    Raises:
        NotFiniteError: on construction, when it is not finite.
    """

    nats: float
    """Mean a token."""
    num_tokens: int
    """Predicted tokens behind it: every token of a document but its first."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.nats):
            raise NotFiniteError(f"a loss must be a finite number; got {self.nats}")

    @classmethod
    def mean(cls, nats: float, *, num_tokens: int) -> Loss:
        """Of a sum over tokens.

        Raises:
            ValueError: no token was predicted.
        """
        if num_tokens < 1:
            raise ValueError(
                "held-out documents must have two tokens or more, since the first is not predicted; got "
                "documents of one token only"
            )
        return cls(nats=nats / num_tokens, num_tokens=num_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What a measurement depends on beside the documents."""

    weights: str
    """`mark_of` the checkpoint."""
    seq_length: int
    """Tokens a row."""
    dtype: str
    """Of the weights as they are run."""
    megatron: str = ""
    """More of Megatron's flags, which the user gave."""


class StudiedModel(Protocol):
    """A model whose experts can be watched and left out. On several ranks all of them call alike and get the same."""

    @property
    def facts(self) -> ModelFacts:
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

        Raises:
            NotFiniteError: what an expert does is not a finite number; names its layer and the expert.
        """
        ...

    def loss(self, documents: Sequence[Tensor], *, allowed_LE: Tensor | None = None) -> Loss:
        """Mean loss on documents with the allowed experts, as a module cut out of the model would have it.

        Raises:
            NotFiniteError: it is not a finite number; names the layer and the expert that make it so, see `check_nats`.
        """
        ...


def stats_in(output: Path) -> ExpertStatistics | None:
    """The statistics that were written to a file before; None if there is none.

    Raises:
        ValueError: it is something else, which is not written over, or nothing can be written there.
    """
    if output.is_dir():
        raise ValueError(f"{output} is a folder; name a file")
    if output.exists():
        return load_stats(output)
    must_be_writable(output)
    return None


def statistics_of(
    model: StudiedModel,
    documents: Sequence[Tensor],
    *,
    summed: Callable[[str], Tensor],
    outputs: bool,
    allowed_LE: Tensor | None,
) -> ExpertStatistics:
    """What a `StudiedModel` answers, from its sums.

    Args:
        model: the one that is asked.
        documents: that it ran.
        summed: name of a sum of `LayerSums` -> that of all layers, [L, E] or [L, E, E]; on the CPU.
        outputs: whether outputs were looked at.
        allowed_LE: [L, E] bool, the experts that were used; None: all.

    Raises:
        NotFiniteError: a sum is not finite; names the layer and the expert.
    """
    together_LEE = summed("together_EE").round().long()
    try:
        return ExpertStatistics(
            model=model.facts,
            num_documents=len(documents),
            num_tokens=sum(document.numel() for document in documents),
            probability_LE=summed("probability_E"),
            count_LE=together_LEE.diagonal(dim1=1, dim2=2).contiguous(),
            together_LEE=together_LEE,
            norm_LE=summed("norm_E") if outputs else None,
            change_LE=summed("change_E") if outputs else None,
        )
    except NotFiniteError:
        # a router's scores alone show what an expert of an earlier layer did
        if not outputs:
            with contextlib.suppress(NotImplementedError):
                model.statistics(documents, outputs=True, allowed_LE=allowed_LE)
        raise


def check_nats(nats: float, model: StudiedModel, documents: Sequence[Tensor], *, allowed_LE: Tensor | None) -> None:
    """Refuse a sum of losses that is not finite. All ranks call alike.

    Args:
        nats: the sum.
        model: that was run; the documents are run once more to see where it comes from.
        documents: behind the sum.
        allowed_LE: [L, E] bool, the experts that were used; None: all.

    Raises:
        NotFiniteError: naming the first layer and expert whose numbers are not finite, or saying that it is the
            logits'.
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


def collect_stats(
    model: StudiedModel, documents: Documents, *, output: Path, outputs: bool, documents_at_once: int = 256
) -> ExpertStatistics:
    """Measure documents and write the statistics file.

    What is measured is kept beside `output` as it comes, so that an interrupted pass goes on where it was.

    Args:
        model: on every rank that holds a part of it.
        documents: the calibration documents.
        output: statistics file; read instead of measured if it is already of these documents.
        outputs: as in `StudiedModel.statistics`.
        documents_at_once: documents between two saves.

    Raises:
        ValueError: `output` holds other statistics.
    """
    unfinished = partial_of(output)
    source = documents.source | asdict(model.setting)

    def is_of_this(stats: ExpertStatistics) -> bool:
        # JSON has no tuples, and what chose the documents shows in their digest
        names = ("sha256", *asdict(model.setting))
        return (
            # files that were written before this was noted lack --megatron
            [[entry.get(name, "") for name in names] for entry in stats.data] == [[source[name] for name in names]]
            and stats.model.is_same(model.facts)
            and ("norm_LE" in stats.tensors()) == outputs
        )

    def find() -> ExpertStatistics | None:
        found = stats_in(output)
        if found is not None:
            if is_of_this(found):
                return found
            raise ValueError(
                f"{output} holds the statistics of something else: other weights, --data, --seq-length, dtype, "
                "--outputs or --megatron; name another file"
            )
        if unfinished.exists():
            # what is of something else is nothing to go on with, and it is replaced
            found = load_stats(unfinished)
            return found if is_of_this(found) else None
        return None

    total = model.from_writer(find)
    done = 0 if total is None else total.num_documents
    bar = tqdm(
        total=len(documents.tokens),
        initial=done,
        desc="statistics",
        unit="document",
        disable=None if model.is_writer else True,
    )
    with bar:
        while done < len(documents.tokens):
            chunk = documents.tokens[done : done + documents_at_once]
            part = model.statistics(chunk, outputs=outputs)
            total = part if total is None else merge_stats([total, part])
            done += len(chunk)
            bar.update(len(chunk))
            total = total.of(source)
            if model.is_writer:
                total.save(unfinished)
    assert total is not None, "there is a document at least"
    if model.is_writer and unfinished.exists():
        total.save(output)
        unfinished.unlink()
    return total
