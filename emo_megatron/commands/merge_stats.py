"""The command merge-stats: the statistics of several sets of documents as one file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from emo_megatron.experts.stats import load_stats, merge_stats
from emo_megatron.files import must_not_exist


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Merge statistics files of different documents into one: the statistics of all documents together."""

    stats: tuple[Path, ...]
    """Files of `stats`, of the same model."""
    output: Path
    """Statistics file to write."""


def run(options: Options) -> Path:
    """Merge; returns the file."""
    must_not_exist(options.output)
    return merge_stats([load_stats(path) for path in options.stats]).save(options.output)
