"""Measure what the experts of a Megatron checkpoint do, under any layout.

    torchrun --nproc-per-node 4 -m emo_megatron.runners.rank_stats --load CHECKPOINT --expert-model-parallel-size 4 \
        --stats-checkpoint CHECKPOINT --stats-data french.jsonl --stats-output french.safetensors

`python -m emo_megatron stats` starts this.
"""

from __future__ import annotations

from emo_megatron.commands.options import StatsOptions
from emo_megatron.runners.base import collect_stats, stats_in
from emo_megatron.runners.open import open_study, run_command


def main() -> None:
    """Load the checkpoint and write the statistics file."""
    opened = open_study(StatsOptions, step="stats", texts=("data",), check=lambda options: stats_in(options.output))
    options = opened.options
    collect_stats(
        opened.model,
        opened.documents(options.data, options.calibration),
        output=options.output,
        outputs=options.outputs,
    )


if __name__ == "__main__":
    run_command(main)
