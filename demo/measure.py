"""Measure one checkpoint as the command `retention` does, and keep the loss of every single document.

    python demo/measure.py --checkpoint CHECKPOINT ...

Takes the options of `retention` and measures the same rows: first the whole model, then one size after the other. With
the losses of documents, two models can be compared document by document. The output folder gets `unfinished.json`,
written again after every size, and `measured.json` at the end. Every loss is cached, so an interrupted call resumes.
"""

from __future__ import annotations

import math
import sys
from itertools import groupby
from typing import Any

import tyro
from torch import Tensor

from emo_megatron.commands.retention import Options, prepare
from emo_megatron.experts.calibration import Documents
from emo_megatron.files import message_of, to_output, whole
from emo_megatron.json_files import to_json
from emo_megatron.processes import stops_on_signals
from emo_megatron.runners.base import Loss
from emo_megatron.runners.cache import Cache, CachedRunner
from emo_megatron.runners.launch import USER_ERROR, say_error
from emo_megatron.runners.retention import measure_rows
from emo_megatron.variables import stay_offline

MEASURED, UNFINISHED = "measured.json", "unfinished.json"


class DocumentLosses(CachedRunner):
    """Keeps the losses of the documents behind every loss.

    Attributes:
        of_documents: per call of `loss`: nats per document, and predicted tokens per document.
    """

    def __init__(self, model: Any, cache: Cache) -> None:
        super().__init__(model, cache)
        self.of_documents: list[tuple[list[float], list[int]]] = []

    def loss(self, documents: Documents, *, allowed_LE: Tensor | None = None) -> Loss:
        """See CachedRunner."""
        model: Any = self.model

        def find() -> list[float]:
            nats: list[float] = model.document_nats(documents.tokens, allowed_LE=allowed_LE).tolist()
            return nats

        nats = self.remember(self._question("document losses", documents, allowed_LE), find)
        tokens = [max(document.numel() - 1, 0) for document in documents.tokens]
        self.of_documents.append((nats, tokens))
        return Loss.mean(math.fsum(nats), num_tokens=sum(tokens))


def measure(options: Options) -> None:
    """Load the checkpoint and write `measured.json`."""
    opened, rows, calibration, validation_data = prepare(options)
    model = DocumentLosses(opened.model, opened.cache)
    measured: list[dict[str, Any]] = []
    unfinished = options.output / UNFINISHED
    for _, group in groupby(sorted(rows, key=lambda row: -row.num_kept), key=lambda row: row.num_kept):
        measured += measure_rows(
            model, list(group), calibration=calibration, validation_data=validation_data, seed=options.seed
        )
        both = zip(measured, model.of_documents, strict=True)
        stored = [row | {"nats": nats, "document_tokens": tokens} for row, (nats, tokens) in both]
        with whole(unfinished) as path:
            path.write_text(to_json(stored), encoding="utf-8")
    unfinished.replace(options.output / MEASURED)


def main() -> int:
    """Measure, and return the exit status."""
    stay_offline()
    try:
        with stops_on_signals(), to_output():
            measure(tyro.cli(Options, config=(tyro.conf.FlagCreatePairsOff,)))
    except (ImportError, MemoryError, NotImplementedError, OSError, ValueError) as error:
        say_error(message_of(error))
        return USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
