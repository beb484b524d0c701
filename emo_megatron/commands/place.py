"""The command place: choose the experts of every expert-parallel rank, so that experts used together share a rank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from emo_megatron.commands.options import check_least
from emo_megatron.experts.placement import Method, place
from emo_megatron.experts.stats import load_stats, merge_stats
from emo_megatron.files import must_not_exist


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Choose which experts share an expert-parallel rank, and write a placement file for the command reorder.

    For example:
        emo_megatron place --stats text.safetensors --ranks 8 --output ep8.json
    """

    stats: tuple[Path, ...]
    """Statistics files, measured on text similar to the training text. Several files are merged."""
    ranks: int
    """Number of expert-parallel ranks (Megatron's --expert-model-parallel-size)."""
    output: Path
    """Placement file to write; must not exist."""
    method: Method = "coactivation"
    """coactivation: experts that are used by the same tokens share a rank. load: only balance the load of the ranks."""
    max_imbalance: float = 1.1
    """Upper bound of the largest rank load divided by the mean, as far as the loads of the experts allow."""
    seed: int = 0
    """Seed of the order in which swaps of experts are tried."""

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
