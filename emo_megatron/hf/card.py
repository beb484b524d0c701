"""The model card of an export: where it comes from, which experts it kept and why, and what was measured of it.

Its text is card.md.jinja beside this file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, StrictUndefined

from emo_megatron import __version__
from emo_megatron.experts.selection import Selection
from emo_megatron.hf.mapping import Architecture, weight_shapes
from emo_megatron.report.rows import FULL, RANDOM, RetentionRow

Retained = tuple[RetentionRow, float | None]
"""A row of a module, and the loss with as many experts drawn at random, if it was measured."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where the weights were before."""

    name: str
    """Of the run, by its folder."""
    title: str | None = None
    """Of the card; None: the name."""
    iteration: int = 0
    """Of training; 0 for weights without a run."""
    samples: int | None = None
    """Training samples seen."""
    seq_length: int | None = None
    """Tokens per sample."""
    pools: dict[str, Any]
    """The document pools it was trained with, as PoolConfig's fields; empty without."""
    is_module: bool = False
    """Whether it was cut out of another checkpoint, which knows how it was trained."""


def model_card(
    architecture: Architecture,
    *,
    model_type: str,
    dtype: str,
    origin: Origin,
    selection: Selection | None = None,
    retention: Sequence[Retained] = (),
    parity: str | None = None,
    shared_gate_value: float = 0.0,
) -> str:
    """The card, Markdown with the front matter that Hugging Face's hub reads; `parity` as it was measured, in words."""
    a = architecture
    sizes = {name: math.prod(shape) for name, shape in weight_shapes(a).items()}
    in_experts = sum(size for name, size in sizes.items() if ".experts." in name)
    total = sum(sizes.values())
    values: dict[str, Any] = {
        "metadata": ModelCardData(
            library_name="transformers", pipeline_tag="text-generation", tags=["mixture-of-experts", "emo", model_type]
        ).to_yaml(),
        "total": total,
        "active": total - in_experts + in_experts * a.top_k // a.num_experts,
        "methods": ", ".join(sorted({f"`{row.method}`" for row, _ in retention})),
    }
    if selection is not None:
        values |= {
            "kept": selection.uniform_count(purpose="an export"),
            "keep_k": selection.keep_k(num_shared=int(a.shared_hidden > 0)),
            "calibration": _calibration(selection.data),
        }
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined, autoescape=False
    )
    environment.filters["thousands"] = "{:,}".format
    template = environment.from_string(Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8"))
    return template.render(
        values,
        a=a,
        version=__version__,
        model_type=model_type,
        dtype=dtype,
        origin=origin,
        selection=selection,
        retention=retention,
        parity=parity,
        shared_gate_value=shared_gate_value,
    )


def _calibration(data: dict[str, Any]) -> str:
    """The documents that chose the experts, in words where they are told as `stats` tells them."""
    files = data.get("calibration")
    if not isinstance(files, list) or not all(
        isinstance(file, dict) and {"file", "documents", "tokens"} <= file.keys() for file in files
    ):
        return f"`{json.dumps(data)}`" if data else "not recorded"
    return ", ".join(f"{file['file']} ({file['documents']:,} documents, {file['tokens']:,} tokens)" for file in files)


def retained(rows: Sequence[RetentionRow], *, kept: int | None = None, chosen_for: str | None = None) -> list[Retained]:
    """The rows that say what a module retains, or what modules of a model do.

    Args:
        rows: of an evaluation of the model, or of the module's parent.
        kept: routed experts of a module; None: any number.
        chosen_for: the domain of a module: its rows on every text, its own first; None: every domain on its own text.
    """
    random = {(row.evaluated_on, row.num_experts_kept): row.loss for row in rows if row.method == RANDOM}
    found = [
        (row, random.get((row.evaluated_on, row.num_experts_kept)))
        for row in rows
        if row.method not in (FULL, RANDOM)
        and row.domain == (chosen_for or row.evaluated_on)
        and kept in (None, row.num_experts_kept)
    ]
    return sorted(found, key=lambda pair: not pair[0].is_own)
