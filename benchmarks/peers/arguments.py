"""What every script of this folder is given. The scripts run with the packages of a peer, without emo_megatron."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The model, the text and the size of the module."""

    model: Path
    """Hugging Face folder of a Qwen2-MoE."""
    documents: list[list[int]]
    """Tokens of each document."""
    texts: list[str]
    """The same documents as text; the tokenizer of the model gives exactly `documents`."""
    keep: int
    """Routed experts per layer to keep."""
    output: Path
    """Folder to write."""


def read_arguments() -> Arguments:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    for name in ("model", "documents", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--keep", type=int, required=True)
    found = parser.parse_args()
    documents = json.loads(found.documents.read_text(encoding="utf-8"))
    return Arguments(
        model=found.model.absolute(),
        documents=documents["tokens"],
        texts=documents["texts"],
        keep=found.keep,
        output=found.output.absolute(),
    )
