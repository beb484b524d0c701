"""The model card of an export: the origin of the model, the kept experts and the method, and the measured losses.

The text of the card is in card.md.jinja, in this folder. What engines computed is in serving.json, a part of
benchmarks/results/serve.json that `make test-serve` writes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from huggingface_hub import ModelCardData
from jinja2 import Environment, StrictUndefined

from emo_megatron import __version__
from emo_megatron.experts.selection import Selection
from emo_megatron.hf.mapping import Architecture, weight_shapes
from emo_megatron.report.rows import FULL, RANDOM, RetentionRow

Retained = tuple[RetentionRow, float | None]
"""A row of a module, and the mean loss of the same model with the same number of random experts; None if that loss was
not measured."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The Megatron checkpoint that the weights come from."""

    name: str
    """Name of the run, from the run's folder."""
    title: str | None = None
    """Title of the card; None: `name`."""
    iteration: int = 0
    """Training iteration; 0 for weights without a run."""
    samples: int | None = None
    """Training samples seen."""
    seq_length: int | None = None
    """Tokens per sample."""
    pools: dict[str, Any]
    """The document pools of the training run, as fields of PoolConfig; empty if the run had no pools."""
    is_module: bool = False
    """Whether the checkpoint is a module. Only the parent's checkpoint states how the weights were trained."""
    mtp: Literal["drop", "keep"] | None = None
    """What the export does with the layers of multi-token prediction; None: the checkpoint has none."""


def model_card(
    architecture: Architecture,
    *,
    model_type: str,
    dtype: str,
    origin: Origin,
    has_tokenizer: bool = True,
    selection: Selection | None = None,
    retention: Sequence[Retained] = (),
    parity: str | None = None,
) -> str:
    """The card: Markdown with the front matter of the Hugging Face hub. `parity` describes the measured difference."""
    a = architecture
    sizes = {name: math.prod(shape) for name, shape in weight_shapes(a).items()}
    in_experts = sum(size for name, size in sizes.items() if ".experts." in name)
    total = sum(sizes.values())
    values: dict[str, Any] = {
        "metadata": ModelCardData(
            library_name="gguf" if model_type == "gguf" else "transformers",
            pipeline_tag="text-generation",
            tags=["mixture-of-experts", "emo", model_type],
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
    served = json.loads(Path(__file__).with_name("serving.json").read_text(encoding="utf-8"))
    template = environment.from_string(Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8"))
    return template.render(
        values,
        a=a,
        version=__version__,
        model_type=model_type,
        dtype=dtype,
        origin=origin,
        has_tokenizer=has_tokenizer,
        selection=selection,
        retention=retention,
        parity=parity,
        served=served,
        engines=served["engines"],
    )


def _calibration(data: dict[str, Any]) -> str:
    """The calibration documents: in words if `data` has the form that `stats` writes, otherwise as JSON."""
    files = data.get("calibration")
    if not isinstance(files, list) or not all(
        isinstance(file, dict) and {"file", "documents", "tokens"} <= file.keys() for file in files
    ):
        return f"`{json.dumps(data)}`" if data else "not recorded"
    return ", ".join(f"{file['file']} ({file['documents']:,} documents, {file['tokens']:,} tokens)" for file in files)


def retained(
    rows: Sequence[RetentionRow], *, kept: int | None = None, method: str | None = None, chosen_for: str | None = None
) -> list[Retained]:
    """The rows of a retention evaluation that a card shows.

    Args:
        rows: of an evaluation of the model, or of the module's parent.
        kept: routed experts per layer of the module; None: any number.
        method: the method that chose the experts of the module; None: every method but random.
        chosen_for: the domain of the module: the rows of that domain on every validation text, the text of the domain
            itself first. None: the rows of every domain on the domain's own text.
    """
    random: dict[tuple[str, str, int], list[float]] = {}
    for row in rows:
        if row.method == RANDOM:
            random.setdefault((row.model, row.evaluated_on, row.num_experts_kept), []).append(row.loss)
    by_chance = {place: fmean(losses) for place, losses in random.items()}
    found = [
        (row, by_chance.get((row.model, row.evaluated_on, row.num_experts_kept)))
        for row in rows
        if row.method not in (FULL, RANDOM)
        and method in (None, row.method)
        and row.domain == (chosen_for or row.evaluated_on)
        and kept in (None, row.num_experts_kept)
    ]
    return sorted(found, key=lambda pair: not pair[0].is_own)
