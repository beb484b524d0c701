"""PoolConfig: every knob of document-pool routing, validated, frozen.

Field names are the command-line flags (`pool_min` is `--pool-min`), so one name means one thing on the command line,
in a checkpoint and in code. Symbols in brackets are the paper's (arXiv 2605.06663).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from emo_megatron.json_files import read_json

PoolCpPartition = Literal["sample", "document"]
PoolDocuments = Literal["attention", "routers"]

WITHOUT_POOLS = ("pool_documents", "pool_balance", "pool_cp_partition", "pool_dispatcher", "pool_seed")
"""Fields that the standard MoE may have too."""


def broken(*rules: tuple[object, str]) -> list[str]:
    """The sentences whose condition holds."""
    return [sentence for is_broken, sentence in rules if is_broken]


def raise_problems(where: str, problems: Sequence[str]) -> None:
    """Raise all that is wrong, a line for each; nothing where there is nothing."""
    if problems:
        raise ValueError(f"{where}:\n" + "\n".join(f"  - {problem}" for problem in problems))


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolConfig:
    """How every document of a batch gets its pool of experts. The default is off: the standard MoE."""

    pool_min: int | None = None
    """Smallest pool, in routed experts (the shared expert does not count). None turns pools off."""
    pool_max: int | None = None
    """Largest pool, in routed experts. None means all of them; with --pool-group-scope document all that the groups of
    a document hold."""
    pool_rule: Literal["uniform", "top_p"] = "uniform"
    """uniform: the size is an integer drawn from [pool_min, pool_max] for every document and layer, uniformly (the
    paper) or as pool_skew says. top_p: the fewest experts that hold pool_top_p of the document's mean probability,
    within these bounds."""
    pool_top_p: float | None = None
    """Probability mass, in (0, 1), that a pool of rule top_p must hold."""
    pool_min_start: int | None = None
    """Where the lower bound of the size starts, falling linearly to pool_min over pool_min_decay_samples.
    None means pool_max."""
    pool_min_decay_samples: int = 0
    """Training samples over which the lower bound falls, counted from the start of the pools. 0 keeps it at pool_min
    throughout (the paper)."""
    pool_delay_samples: int = 0
    """Training samples before pools start. Until then every document has all experts, as in the standard MoE, and from
    there pools at full strength. 0: from the first step on (the paper). In a small run on a CPU (one seed) pools from
    half of training on left an eighth of the experts .092 nats better than a bound that falls from the start, and the
    full model and a quarter no worse."""
    pool_skew: float = 1.0
    """How far drawn sizes lean towards large pools, above 0: size = low + floor((high - low + 1) * u^(1 / pool_skew)),
    u uniform in [0, 1). 1 is uniform (the paper), 2 is the larger of two such draws. What it trades is the modules: in
    the authors' later runs the full model lost .022, .009 and -.003 nats to the standard MoE with 1, 2 and 4, and what
    modules lose was not measured; in a small run on a CPU a quarter of the experts was .191 worse with 4 than with a
    falling bound of the same full model."""
    pool_unrestricted: float = 0.0
    """Share of documents, in [0, 1], drawn for every layer apart, that may use all experts."""
    pool_forced: int = 0
    """The last so many routed experts are in every pool and count towards its size."""
    pool_mask: Literal["logits", "selection"] = "logits"
    """logits: experts outside the pool get no probability (the paper). selection: the pool limits the choice only;
    weights and losses use all experts (OLMo-core's second version)."""
    pool_score: Literal["probability", "gate_with_bias"] = "probability"
    """What a document's pool is chosen by, summed over its tokens. probability: the softmax over all experts (the
    paper). gate_with_bias: the gate plus the expert bias, for recipes that balance load by
    --moe-router-enable-expert-bias alone: with probability an expert that no pool takes gets bias and no token."""
    pool_group_scope: Literal["token", "document"] = "token"
    """Who keeps to --moe-router-group-topk of the --moe-router-num-groups. token: every token, inside its document's
    pool, as far as the pool reaches. document: the pool lies inside so many groups, so every token keeps to them."""
    pool_scope: Literal["document", "sample"] = "document"
    """document: one pool a document (the paper). sample: boundaries are ignored and a whole packed sample shares a
    pool (an ablation; it destroys the modules)."""
    pool_eval: int | None = None
    """Pool size in evaluation. None: no pools, as exported models run."""
    pool_documents: PoolDocuments = "attention"
    """Who gets document boundaries: attention is attention, rotary embedding and routers, as packed sequences (the
    paper). routers leaves all else as the recipe has it, so that attention runs across documents. For the standard
    model too; models trained one way are not to be compared with those trained the other."""
    pool_balance: Literal["micro", "running"] = "micro"
    """Population of the load balance: micro is one micro-batch of all data-parallel ranks (the paper), running is the
    mean of the micro-batches of the step so far."""
    pool_cp_partition: PoolCpPartition = "sample"
    """How the host cuts packed micro-batches over context-parallel ranks: sample is one zigzag over the micro-batch,
    document one over every document, as Transformer Engine's packed attention needs. Batches do not say.
    pretrain_emo.py and Bridge cut by document where attention keeps to documents, whatever this says."""
    pool_dispatcher: Literal["megatron", "dedup"] = "megatron"
    """Who carries tokens to their experts: megatron is what --moe-token-dispatcher-type says; dedup takes the place of
    its alltoall and sends a token to each rank once, however many of its experts are there. Works without pools too."""
    pool_seed: int = 1234
    """Seed of the counter-based hash that draws pool sizes."""
    pool_eos_starts_document: bool = False
    """Count an end-of-document token to the document after it, as the authors' router does (and their attention
    does not)."""
    pool_check: bool = False
    """Validate document boundaries on device tensors too. Waits for the device in every micro-batch."""

    @property
    def is_on(self) -> bool:
        """Whether training uses pools, from pool_delay_samples on."""
        return self.pool_min is not None

    def is_on_after(self, consumed_samples: int) -> bool:
        """Whether the training step that starts after `consumed_samples` uses pools."""
        return self.is_on and consumed_samples >= self.pool_delay_samples

    def __post_init__(self) -> None:
        raise_problems("pool configuration", self._problems())

    def _problems(self) -> list[str]:
        """What is wrong with this configuration on its own, one sentence each."""
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
                "--pool-cp-partition must be sample with --pool-documents routers, where context parallelism cuts "
                "samples; got 'document'",
            ),
        )
        # no comparison below refuses NaN
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
                f"--pool-unrestricted must lie in [0, 1]; got {self.pool_unrestricted}",
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
                f"--pool-forced must be at most --pool-min ({low}), or small pools hold more than their size; got "
                f"{self.pool_forced}",
            ),
            (
                self.pool_eval is not None and self.pool_forced > self.pool_eval,
                f"--pool-forced must be at most --pool-eval ({self.pool_eval}); got {self.pool_forced}",
            ),
            (by_mass and self.pool_unrestricted > 0, "--pool-unrestricted goes with --pool-rule uniform only"),
            (by_mass and self.pool_skew != 1.0, "--pool-skew goes with --pool-rule uniform only"),
            (by_mass != (top_p is not None), "--pool-top-p and --pool-rule top_p go together; give both or neither"),
            (top_p is not None and not 0.0 < top_p < 1.0, f"--pool-top-p must lie in (0, 1); got {top_p}"),
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
                "--pool-forced must be 0 with --pool-group-scope document, or pools reach into the groups of the "
                f"forced experts; got {self.pool_forced}",
            ),
            (
                start is not None and self.pool_min_decay_samples == 0,
                "--pool-min-start needs --pool-min-decay-samples above 0",
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
        """What does not fit a model of `num_experts` routed experts, `top_k` of them a token; one sentence each."""
        found = []
        for name in ("pool_min", "pool_max", "pool_min_start", "pool_eval"):
            value = getattr(self, name)
            if value is not None and value > num_experts:
                found.append(
                    f"{flag(name)} counts routed experts and must be at most --num-experts ({num_experts}); got {value}"
                )
            if name in ("pool_min", "pool_eval") and value is not None and value < top_k:
                found.append(
                    f"{flag(name)} must be at least --moe-router-topk ({top_k}), or a token finds "
                    f"fewer experts than it needs; got {value}"
                )
        return found

    def size_bounds(self, *, num_experts: int, consumed_samples: int) -> tuple[int, int]:
        """The interval [low, high] sizes are drawn from after `consumed_samples` training samples."""
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
        raise ValueError(f"pool configuration {path}: there is no such file")
    return pool_config_of(read_json(path, kind="a pool configuration"), where=f"pool configuration {path}")


def pool_config_of(stored: object, *, where: str) -> PoolConfig:
    """The PoolConfig of an object with any of its fields, as JSON holds it; `where` names its file in errors."""
    if not isinstance(stored, dict):
        raise ValueError(f'{where} must be a JSON object such as {{"pool_min": 8}}; got {stored!r}')
    kinds = get_type_hints(PoolConfig)
    problems = [
        f"{name} must be {kinds[name]}; got {value!r}"
        for name, value in stored.items()
        if name in kinds and not _is_a(value, kinds[name])
    ]
    unknown = ", ".join(name for name in stored if name not in kinds)
    if unknown:
        problems.append(f"unknown: {unknown}; the fields are {', '.join(kinds)}")
    raise_problems(where, problems)
    try:
        return PoolConfig(**stored)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _is_whole(value: Any, *, can_lack: bool) -> bool:
    return (value is None and can_lack) or (isinstance(value, int) and not isinstance(value, bool))


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a JSON value has the type of a field; the choices of a Literal are PoolConfig's to check."""
    if get_origin(kind) is Literal:
        return True
    if get_args(kind):
        return any(_is_a(value, option) for option in get_args(kind))
    # neither may a bool pass for a number
    return type(value) in ((int, float) if kind is float else (kind,))
