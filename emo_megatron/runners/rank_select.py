"""Choose experts by running a Megatron checkpoint: layer by layer, or the smallest module within a bound.

    torchrun --nproc-per-node 4 -m emo_megatron.runners.rank_select --load CHECKPOINT --expert-model-parallel-size 4 \
        --select-checkpoint CHECKPOINT --select-stats french.safetensors --select-max-rise 1% \
        --select-held-out french-held-out.jsonl --select-output french.json

`python -m emo_megatron select` starts this.
"""

from __future__ import annotations

from emo_megatron.commands.options import SelectOptions
from emo_megatron.commands.select import select
from emo_megatron.experts.calibration import Calibration
from emo_megatron.files import must_not_exist
from emo_megatron.runners.open import open_study, run_command


def main() -> None:
    """Load the checkpoint and write the Selection file."""
    opened = open_study(
        SelectOptions, step="select", texts=("data", "held_out"), check=lambda options: must_not_exist(options.output)
    )
    options = opened.options
    documents = held_out = None
    if options.needs_data and options.data is not None:
        documents = opened.documents(options.data, options.calibration)
    if options.max_rise is not None and options.held_out is not None:
        held_out = opened.documents(options.held_out, Calibration(num_tokens=options.tokens))
    select(options, model=opened.model, documents=documents, held_out=held_out)


if __name__ == "__main__":
    run_command(main)
