"""Place the experts that tokens use together on one expert-parallel rank.

python -m emo_megatron place --stats text.safetensors --ranks 8 --output ep8.json
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from emo_megatron.commands.options import check_least
from emo_megatron.experts.placement import Method, place
from emo_megatron.experts.stats import load_stats, merge_stats
from emo_megatron.files import must_not_exist


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Place the experts that tokens use together on one expert-parallel rank: a placement file, for relabel."""

    stats: tuple[Path, ...]
    """Files of `stats`, of text like that of the run to be; several count as one."""
    ranks: int
    """Expert-parallel ranks (--expert-model-parallel-size)."""
    output: Path
    """Placement file to write; must not exist."""
    method: Method = "together"
    """together: experts used by the same tokens share a rank. load: loads alone are balanced."""
    max_imbalance: float = 1.1
    """Load of the fullest rank over the mean, at most, as far as the experts' own loads allow it."""
    seed: int = 0
    """Of the order in which swaps of experts are tried."""

    def __post_init__(self) -> None:
        check_least(self, 1, "ranks")
        check_least(self, 0, "seed")


def run(options: Options) -> Path:
    """Write the placement file."""
    must_not_exist(options.output)
    stats = merge_stats([load_stats(path) for path in options.stats])
    placement = place(
        stats, num_ranks=options.ranks, method=options.method, max_imbalance=options.max_imbalance, seed=options.seed
    )
    return placement.save(options.output)
