"""Measure what a Megatron checkpoint loses with fewer experts, under any layout.

    torchrun --nproc-per-node 4 -m emo_megatron.runners.rank_retention --load CHECKPOINT --expert-model-parallel-size 4 \
        --retention-checkpoint CHECKPOINT --retention-data calibration --retention-held-out held-out \
        --retention-output runs/retention

`python -m emo_megatron retention` starts this, and then draws what was measured. Pools are off, as in exported models.
"""

from __future__ import annotations

from emo_megatron.commands.retention_options import RetentionOptions
from emo_megatron.runners.open import open_study, run_command
from emo_megatron.runners.retention import check_output, measure_retention


def main() -> None:
    """Load the checkpoint and write the rows."""
    opened = open_study(RetentionOptions, step="retention", texts=("data", "held_out"), check=check_output)
    measure_retention(opened.options, model=opened.model, read=opened.documents)


if __name__ == "__main__":
    run_command(main)
