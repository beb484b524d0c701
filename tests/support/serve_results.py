"""The files that `make test-serve` writes: benchmarks/results/serve.json, and what a model card says of the engines."""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
from collections.abc import Mapping
from decimal import ROUND_UP, Context
from pathlib import Path
from typing import Any

from emo_megatron.files import whole
from support.engines import NEW_TOKENS, ROOT, Agreement, Engine

RESULTS = ROOT / "benchmarks" / "results" / "serve.json"
PACKAGED = ROOT / "emo_megatron" / "hf" / "serving.json"
"""The part that a model card needs, in the package."""


def results(
    versions: Mapping[Engine, Mapping[str, str]], agreements: Mapping[Engine, Mapping[str, Agreement]]
) -> dict[str, Any]:
    """The content of RESULTS.

    Args:
        versions: engine -> versions in its environment: of "engine", and of torch and transformers if they are there.
        agreements: engine -> model -> the comparison, with at least one model per engine.
    """
    import transformers

    engines = [
        {
            "name": engine.name,
            "version": versions[engine]["engine"],
            **{name: found for name, found in versions[engine].items() if name != "engine"},
            "runs_dense_layers": engine.runs_dense_layers,
            "max_difference": _rounded(max(found.max_difference for found in models.values())),
            "models": {name: _row(found) for name, found in models.items()},
        }
        for engine, models in agreements.items()
    ]
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "device": "CPU",
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "dtype": "float32",
        "transformers": transformers.__version__,
        "greedy_tokens": NEW_TOKENS,
        "engines": engines,
    }


def packaged(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of PACKAGED, from the content of RESULTS."""
    fields = ("name", "version", "max_difference", "runs_dense_layers")
    return {
        **{name: content[name] for name in ("date", "device", "dtype", "transformers")},
        "engines": [{name: engine[name] for name in fields} for engine in content["engines"]],
    }


def write(content: Mapping[str, Any], path: Path) -> None:
    """Write the content as JSON that people can read."""
    with whole(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _row(agreement: Agreement) -> dict[str, Any]:
    return dataclasses.asdict(agreement) | {"max_difference": _rounded(agreement.max_difference)}


def _rounded(difference: float) -> float:
    """Two digits, rounded up, so that a difference is at most the written one."""
    return float(Context(prec=2, rounding=ROUND_UP).create_decimal(difference))
