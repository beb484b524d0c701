"""PoolConfig: every knob of document-pool routing, validated and frozen.

Each field is also a command-line flag: `pool_min` is `--pool-min`. The command line, checkpoints and code therefore use
the same names. "The paper" is arXiv 2605.06663.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from emo_megatron.arguments import nearest
from emo_megatron.json_files import read_json

PoolCpPartition = Literal["sample", "document"]
PoolDocuments = Literal["attention", "routers"]

HEADING = "pool configuration"
"""First words of the errors of PoolConfig."""

WITHOUT_POOLS = ("pool_documents", "pool_balance", "pool_cp_partition", "pool_dispatcher", "pool_seed")
"""Fields that the standard MoE may set too."""


def broken(*rules: tuple[object, str]) -> list[str]:
    """Return the sentences whose condition holds."""
    return [sentence for is_broken, sentence in rules if is_broken]


def raise_problems(where: str, problems: Sequence[str]) -> None:
    """Raise one ValueError with one line per problem; do nothing if there are no problems."""
    if problems:
        raise ValueError(f"{where}:\n" + "\n".join(f"  - {problem}" for problem in problems))


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolConfig:
    """How each document of a batch gets its pool of experts. By default pools are off: the standard MoE."""

    pool_min: int | None = None
    """Smallest size of a pool, in routed experts (the shared expert does not count). The paper: 8. None: no pools, the
    standard MoE."""
    pool_max: int | None = None
    """Largest size of a pool, in routed experts. None (the paper): all routed experts; with --pool-group-scope
    document, all experts in the document's groups."""
    pool_rule: Literal["uniform", "top_p"] = "uniform"
    """How the size of a pool is chosen. uniform (the paper): an integer drawn from [pool_min, pool_max] per document
    and layer; pool_skew can make the draw non-uniform. top_p: the smallest number of experts that hold pool_top_p of
    the document's mean probability, at least pool_min and at most pool_max."""
    pool_top_p: float | None = None
    """Share of the document's router probability, in (0, 1), that a pool must hold with --pool-rule top_p."""
    pool_min_start: int | None = None
    """First value of the lower bound of the pool size, in routed experts. The bound falls linearly to pool_min over
    pool_min_decay_samples. None: pool_max."""
    pool_min_decay_samples: int = 0
    """Number of training samples over which the lower bound of the pool size falls to pool_min. The count starts after
    pool_delay_samples. 0 (the paper): the bound is always pool_min."""
    pool_delay_samples: int = 0
    """Number of training samples before pools start. Until then every document uses all experts, as in the standard
    MoE. 0 (the paper): pools start at the first step. docs/experiments.md compares delays in small CPU runs."""
    pool_skew: float = 1.0
    """Skew of the drawn pool sizes, above 0: size = low + floor((high - low + 1) * u^(1 / pool_skew)), u uniform in
    [0, 1). 1 (the paper): uniform. 2: the larger of two uniform draws. Larger values favour large pools: better for the
    full model (the authors' later runs), worse for modules (small CPU runs, docs/experiments.md)."""
    pool_unrestricted: float = 0.0
    """Share of documents, in [0, 1], that may use all experts. Drawn separately per layer. The paper: 0."""
    pool_forced: int = 0
    """Number of routed experts that are in every pool and count towards its size: those with the highest indices."""
    pool_mask: Literal["logits", "selection"] = "logits"
    """Effect of a pool. logits (the paper): experts outside the pool get no probability. selection (OLMo-core's second
    version): the pool limits only which experts a token may choose; weights and losses use all experts."""
    pool_score: Literal["probability", "gate_with_bias"] = "probability"
    """Score, summed over the tokens of a document, that chooses the document's pool. probability (the paper): the
    softmax over all experts. gate_with_bias: the gate plus the expert bias, for recipes that balance load by
    --moe-router-enable-expert-bias alone. With probability, an expert in no pool gets more bias but no tokens."""
    pool_group_scope: Literal["token", "document"] = "token"
    """What --moe-router-group-topk limits, if experts are in --moe-router-num-groups groups. token: the groups of each
    token, inside its document's pool; a token may use more groups if the pool holds too few experts in them.
    document: the groups of each pool, and therefore of every token."""
    pool_scope: Literal["document", "sample"] = "document"
    """document (the paper): one pool per document. sample: document boundaries are ignored and each packed sample has
    one pool (an ablation; modules become useless)."""
    pool_eval: int | None = None
    """Pool size in evaluation, in routed experts. None: evaluation uses no pools, like exported models."""
    pool_documents: PoolDocuments = "attention"
    """Which parts of the model get document boundaries. attention (the paper): attention, rotary embedding and routers,
    as packed sequences. routers: the routers only, so attention runs across documents as in the recipe. Also valid for
    the standard MoE. Do not compare models trained with different values."""
    pool_balance: Literal["micro", "running"] = "micro"
    """Tokens over which the load is balanced. micro (the paper): one micro-batch of all data-parallel ranks. running:
    the mean over the micro-batches of the step so far."""
    pool_cp_partition: PoolCpPartition = "sample"
    """How the host splits packed micro-batches over context-parallel ranks, which batches do not record. sample: one
    zigzag per micro-batch. document: one zigzag per document, as Transformer Engine's packed attention requires.
    Only for training loops of your own: pretrain_emo.py and Bridge always use document with --pool-documents
    attention."""
    pool_dispatcher: Literal["megatron", "dedup"] = "megatron"
    """How tokens are sent to their experts. megatron: by --moe-token-dispatcher-type. dedup: replaces Megatron's
    alltoall (--moe-token-dispatcher-type alltoall must be given) and sends each token to each rank at most once, even
    if several experts of the token are on that rank. Also works without pools."""
    pool_seed: int = 1234
    """Seed of the counter-based hash that draws pool sizes."""
    pool_eos_starts_document: bool = False
    """Assign each end-of-document token to the next document, like the authors' router (but not their attention).
    Otherwise an end-of-document token belongs to the document that it ends."""
    pool_check: bool = False
    """Also check document boundaries that are on a GPU: they must start at 0, never decrease and end inside the
    micro-batch. For debugging, because the check waits for the GPU in every micro-batch. Boundaries on a CPU are always
    checked."""

    @property
    def is_on(self) -> bool:
        """Whether training uses pools (after pool_delay_samples)."""
        return self.pool_min is not None

    def is_on_after(self, consumed_samples: int) -> bool:
        """Whether the training step that starts after `consumed_samples` uses pools."""
        return self.is_on and consumed_samples >= self.pool_delay_samples

    def __post_init__(self) -> None:
        raise_problems(HEADING, self._problems())

    def _problems(self) -> list[str]:
        """Errors in this configuration on its own, without a model; one sentence per error."""
        kinds = get_type_hints(PoolConfig)
        sizes = ("pool_min", "pool_max", "pool_min_start", "pool_eval")
        counts = ("pool_forced", "pool_min_decay_samples", "pool_delay_samples")
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        found = broken(
            *(
                (
                    get_origin(kinds[name]) is Literal and value not in get_args(kinds[name]),
                    f"{flag(name)} must be one of {get_args(kinds[name])}; got {value!r}",
                )
                for name, value in values.items()
            ),
            (
                self.pool_documents == "routers" and self.pool_cp_partition == "document",
                "--pool-cp-partition must be sample with --pool-documents routers, because context parallelism then "
                "splits samples; got 'document'",
            ),
        )
        # first, because the comparisons below do not reject NaN
        wrong = [
            f"{flag(name)} must be a whole number; got {values[name]!r}"
            for name in (*sizes, *counts, "pool_seed")
            if not _is_whole(values[name], can_lack=name in sizes)
        ]
        if wrong:
            return found + wrong
        found += broken(
            *(
                (values[name] is not None and values[name] < 1, f"{flag(name)} must be at least 1; got {values[name]}")
                for name in sizes
            ),
            *((values[name] < 0, f"{flag(name)} must not be negative; got {values[name]}") for name in counts),
            (
                not 0.0 <= self.pool_unrestricted <= 1.0,
                f"--pool-unrestricted must be in [0, 1]; got {self.pool_unrestricted}",
            ),
            (not 0.0 < self.pool_skew < float("inf"), f"--pool-skew must be finite and above 0; got {self.pool_skew}"),
        )
        return found + (self._problems_when_on() if self.is_on else self._problems_when_off())

    def _problems_when_on(self) -> list[str]:
        low, high, start, top_p = self.pool_min, self.pool_max, self.pool_min_start, self.pool_top_p
        assert low is not None
        by_mass, in_groups = self.pool_rule == "top_p", self.pool_group_scope == "document"
        return broken(
            (high is not None and high < low, f"--pool-max must be at least --pool-min ({low}); got {high}"),
            (
                self.pool_forced > low,
                f"--pool-forced must be at most --pool-min ({low}), because every pool holds the forced experts; got "
                f"{self.pool_forced}",
            ),
            (
                self.pool_eval is not None and self.pool_forced > self.pool_eval,
                f"--pool-forced must be at most --pool-eval ({self.pool_eval}); got {self.pool_forced}",
            ),
            (by_mass and self.pool_unrestricted > 0, "--pool-unrestricted requires --pool-rule uniform"),
            (by_mass and self.pool_skew != 1.0, "--pool-skew requires --pool-rule uniform"),
            (by_mass != (top_p is not None), "--pool-top-p and --pool-rule top_p go together; give both or neither"),
            (top_p is not None and not 0.0 < top_p < 1.0, f"--pool-top-p must be in (0, 1); got {top_p}"),
            (
                by_mass and self.pool_score != "probability",
                f"--pool-score must be probability with --pool-rule top_p; got {self.pool_score!r}",
            ),
            (
                by_mass and in_groups,
                f"--pool-group-scope must be token with --pool-rule top_p; got {self.pool_group_scope!r}",
            ),
            (
                in_groups and self.pool_forced > 0,
                "--pool-forced must be 0 with --pool-group-scope document, because forced experts may be outside the "
                f"document's groups; got {self.pool_forced}",
            ),
            (
                start is not None and self.pool_min_decay_samples == 0,
                "--pool-min-start requires --pool-min-decay-samples above 0",
            ),
            (start is not None and start < low, f"--pool-min-start must be at least --pool-min ({low}); got {start}"),
            (
                start is not None and high is not None and start > high,
                f"--pool-min-start must be at most --pool-max ({high}); got {start}",
            ),
        )

    def _problems_when_off(self) -> list[str]:
        return [
            f"{flag(field.name)} has no effect without --pool-min, which turns pools on"
            for field in dataclasses.fields(self)
            if field.name not in WITHOUT_POOLS and getattr(self, field.name) != field.default
        ]

    def problems_with_model(self, *, num_experts: int, top_k: int) -> list[str]:
        """Errors for a model of `num_experts` routed experts, `top_k` per token; one sentence per error."""
        found = []
        for name in ("pool_min", "pool_max", "pool_min_start", "pool_eval"):
            value = getattr(self, name)
            if value is not None and value > num_experts:
                found.append(
                    f"{flag(name)} counts routed experts and must be at most --num-experts ({num_experts}); got {value}"
                )
            if name in ("pool_min", "pool_eval") and value is not None and value < top_k:
                found.append(
                    f"{flag(name)} must be at least --moe-router-topk ({top_k}), the number of experts that each "
                    f"token needs; got {value}"
                )
        return found

    def size_bounds(self, *, num_experts: int, consumed_samples: int) -> tuple[int, int]:
        """The bounds [low, high] of pool sizes after `consumed_samples` training samples."""
        assert self.pool_min is not None, "pools are off"
        high = self.pool_max if self.pool_max is not None else num_experts
        if self.pool_min_decay_samples == 0:
            return self.pool_min, high
        start = self.pool_min_start if self.pool_min_start is not None else high
        since = max(0, consumed_samples - self.pool_delay_samples)
        done = min(1.0, since / self.pool_min_decay_samples)
        return round(start + (self.pool_min - start) * done), high


def flag(field_name: str) -> str:
    """The command-line flag of a PoolConfig field."""
    return "--" + field_name.replace("_", "-")


def load_pool_config(path: Path) -> PoolConfig:
    """The PoolConfig in a JSON file: an object with any of its fields, such as {"pool_min": 8}."""
    if not path.is_file():
        raise ValueError(f"{HEADING} {path} must be an existing file")
    return pool_config_of(read_json(path, kind=f"a {HEADING}"), where=f"{HEADING} {path}")


def pool_config_of(stored: object, *, where: str) -> PoolConfig:
    """The PoolConfig of a JSON object with any of the fields; errors begin with `where`, the name of the source."""
    if not isinstance(stored, dict):
        raise ValueError(f'{where} must be a JSON object such as {{"pool_min": 8}}; got {stored!r}')
    kinds = get_type_hints(PoolConfig)
    problems = [
        f"{name} must be {_in_words(kinds[name])}; got {json.dumps(value)}{' (a string)' * isinstance(value, str)}"
        for name, value in stored.items()
        if name in kinds and not _is_a(value, kinds[name])
    ]
    unknown = ", ".join(f"{name}{nearest(name, kinds)}" for name in stored if name not in kinds)
    if unknown:
        problems.append(f"unknown fields: {unknown}; the fields are {', '.join(kinds)}")
    raise_problems(where, problems)
    try:
        return PoolConfig(**stored)
    except ValueError as error:
        raise ValueError(where + str(error).removeprefix(HEADING)) from None


def _in_words(kind: Any) -> str:
    """The type of a field in words, for errors about JSON values."""
    names = {int: "a whole number", float: "a number", bool: "true or false", NoneType: "null"}
    return " or ".join(names[option] for option in get_args(kind) or (kind,))


def _is_whole(value: Any, *, can_lack: bool) -> bool:
    return (value is None and can_lack) or (isinstance(value, int) and not isinstance(value, bool))


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a JSON value has the type of a field. PoolConfig itself checks the choices of a Literal."""
    if get_origin(kind) is Literal:
        return True
    if get_args(kind):
        return any(_is_a(value, option) for option in get_args(kind))
    # type(), because isinstance() accepts a bool as an int
    return type(value) in ((int, float) if kind is float else (kind,))
