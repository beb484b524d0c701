"""Measure one checkpoint for fidelity.py, in a process of its own: the whole model first, then size after size.

    python benchmarks/fidelity_measure.py --load CHECKPOINT --retention-checkpoint CHECKPOINT ...

Takes the flags of `emo_megatron.runners.rank_retention` and measures the same rows, and beside each the losses of the single
documents, so that two models can be compared document by document. `measured.json` in its output folder is written
anew after every size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from emo_megatron.commands.retention_options import RetentionOptions
from emo_megatron.files import whole
from emo_megatron.json_files import to_json
from emo_megatron.runners.base import Loss
from emo_megatron.runners.open import open_study, run_command
from emo_megatron.runners.retention import check_output, measure_retention, read_rows

MEASURED = "measured.json"


class DocumentLosses:
    """A study that keeps the losses of the documents behind every loss it tells.

    Args:
        study: a MegatronStudy.

    Attributes:
        told: of each call of `loss`: nats of the documents, and their predicted tokens.
    """

    def __init__(self, study: Any) -> None:
        self._study = study
        self.told: list[tuple[list[float], list[int]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def loss(self, documents: Sequence[Tensor], *, allowed_LE: Tensor | None = None) -> Loss:
        """See StudiedModel."""
        nats_D = self._study.document_nats(documents, allowed_LE=allowed_LE)
        tokens = [max(document.numel() - 1, 0) for document in documents]
        self.told.append((nats_D.tolist(), tokens))
        return Loss.mean(float(nats_D.sum()), num_tokens=sum(tokens))


def main() -> None:
    """Load the checkpoint and write `measured.json`."""
    opened = open_study(RetentionOptions, step="retention", texts=("data", "held_out"), check=check_output)
    options = opened.options
    model = DocumentLosses(opened.model)
    for number in range(len(options.keep) + 1):
        keep = options.keep[:number]
        stage = replace(options, keep=keep, cross=tuple(size for size in options.crossed if size in keep))
        measure_retention(stage, model=model, read=opened.documents)
        _write(options.output / MEASURED, read_rows(options.rows_file), model.told)


def _write(path: Path, rows: list[dict[str, Any]], told: list[tuple[list[float], list[int]]]) -> None:
    """Rows lie in the order in which they were measured, one call of `loss` each."""
    measured = [row | {"nats": nats, "document_tokens": tokens} for row, (nats, tokens) in zip(rows, told, strict=True)]
    with whole(path) as unfinished:
        unfinished.write_text(to_json(measured), encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
