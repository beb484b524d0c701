"""examples/pretrain_emo.py from weights that are the same under every layout; what its routers decided goes to a file.

    pretrain_recorded.py --record FOLDER [--bug NAME] <flags of the script>

Every rank writes FOLDER/<rank>.txt, a Python literal: `decisions` of all steps, as recorder.Recorder's, and `margin`.
"""

from __future__ import annotations

import argparse
import atexit
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from emo_megatron.mcore import cpu  # noqa: E402

cpu.activate()

import torch  # noqa: E402
from megatron.training.models.gpt import GPTModelBuilder  # noqa: E402
from torch import Tensor  # noqa: E402

from emo_megatron.mcore import batches, padding, train  # noqa: E402
from support import shards  # noqa: E402
from support.recorder import Recorder  # noqa: E402

SEED = 3


class RecorderOfRun(Recorder):
    """Where a token lies is the script's to tell here: it reads the batches."""

    def _record(self, layer: int, map_TE: Tensor, ids_T: Tensor, scope: Any, pool_DE: Tensor | None) -> None:
        segments = scope.segments
        first = scope.sample_positions_D[0] - segments.rows_D[0]
        places_T = scope.places_T
        if places_T is None:
            places_T = torch.arange(len(ids_T))
        self.places_T = first * segments.tokens_per_sample + places_T
        super()._record(layer, map_TE, ids_T, scope, pool_DE)


RECORDERS: list[RecorderOfRun] = []
build = GPTModelBuilder.build_model


def build_and_record(self: Any, *args: Any, **kwargs: Any) -> Any:
    model = build(self, *args, **kwargs)
    shards.initialise([model], seed=SEED)
    recorder = RecorderOfRun([model])
    RECORDERS.append(recorder)
    return model


def write(folder: Path) -> None:
    decisions: dict[Any, Any] = {}
    for recorder in RECORDERS:
        decisions |= recorder.decisions
    margin = min(recorder.margin for recorder in RECORDERS)
    content = repr({"decisions": decisions, "margin": str(margin)})
    (folder / f"{os.environ.get('RANK', '0')}.txt").write_text(content)


def _shift_labels() -> None:
    """Every label is that of the token before, in the padded order of the whole micro-batch."""
    cut = batches.cut_by_document

    def cut_shifted(batch: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        shifted = batch if batch.get("labels") is None else batch | {"labels": batch["labels"].roll(1)}
        return cut(shifted, *args, **kwargs)

    batches.cut_by_document = cut_shifted


def _cut_samples() -> None:
    """Context parallelism holds two chunks of the micro-batch, and not of every document."""
    indices = padding.local_token_indices
    padding.local_token_indices = lambda **options: indices(**options | {"document_bounds": None})


def _average_means() -> None:
    """The loss is the mean of what context-parallel ranks have as theirs."""
    loss_func = train.loss_func

    def loss_of_rank(loss_mask: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        loss, _, report = loss_func(loss_mask, *args, **kwargs)
        return loss, loss_mask.sum().int(), report

    train.loss_func = loss_of_rank


BUGS: dict[str, Callable[[], None]] = {
    "labels are shifted": _shift_labels,
    "samples are cut": _cut_samples,
    "means of ranks are averaged": _average_means,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--bug", choices=BUGS)
    own, sys.argv[1:] = parser.parse_known_args()
    if own.bug:
        BUGS[own.bug]()
    GPTModelBuilder.build_model = build_and_record  # type: ignore[method-assign]
    atexit.register(write, own.record)
    script = ROOT / "examples" / "pretrain_emo.py"
    sys.argv[0] = str(script)
    runpy.run_path(str(script), run_name="__main__")
