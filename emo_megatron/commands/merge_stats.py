"""The command merge-stats: merge the statistics of several sets of documents into one file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from emo_megatron.experts.stats import load_stats, merge_stats
from emo_megatron.files import must_not_exist


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Merge statistics files of different documents into one file.

    For example:
        emo_megatron merge-stats --stats french.safetensors spanish.safetensors --output both.safetensors
    """

    stats: tuple[Path, ...]
    """Statistics files of one model."""
    output: Path
    """Statistics file to write; must not exist."""


def run(options: Options) -> Path:
    """Merge, and return the path of the file."""
    must_not_exist(options.output)
    return merge_stats([load_stats(path) for path in options.stats]).save(options.output)
