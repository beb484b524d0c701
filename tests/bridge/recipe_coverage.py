"""Which recipes of the installed Megatron-Bridge can have pools, as JSON.

    python tests/bridge/recipe_coverage.py [--write]

prints it, or replaces benchmarks/results/bridge-recipes.json, with which test_coverage.py compares, and its table,
bridge-recipes.md.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from support import hub_configs
from support.bridge_coverage import coverage, recipes
from support.bridge_families import RECIPES, outcome, train_over_budget

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "bridge-recipes.json"
HEAD = """# Document pools in the recipes of Megatron-Bridge

Every MoE pretraining recipe on text of megatron-bridge {bridge}, with megatron-core {core}: {count} recipes, of which \
{unchanged} start unchanged, {started} after apply_pools has changed the options named, {refused} are refused. \
{vlm} recipes on images have no documents to pool over and are left out.

Layers: the recipe's own spec with pools in it, built without Transformer Engine. Two steps: one recipe of the family, \
made small, trained on a CPU; its losses, or what the host says is missing, as it does to the stock recipe.
Written by `python tests/bridge/recipe_coverage.py --write`; the rows by recipe are in bridge-recipes.json.

| family | recipes | unchanged | started | refused | options changed | refused for | layers | two steps |
| --- | --: | --: | --: | --: | --- | --- | --- | --- |
"""


def table(found: dict[str, Any]) -> str:
    """Markdown of what was found, by family."""
    rows = found["recipes"]
    verdicts = Counter(row["verdict"] for row in rows)
    head = HEAD.replace("\\\n", "").format(
        **found["versions"],
        **{name: verdicts[name] for name in ("unchanged", "started", "refused")},
        count=len(rows),
        vlm=sum(n for name, n in found["left_out"].items() if "VLM" in name),
    )
    return head + "".join(
        _line(family, [row for row in rows if row["family"] == family], trained)
        for family, trained in found["families"].items()
    )


def _line(family: str, rows: list[dict[str, Any]], trained: dict[str, Any]) -> str:
    verdicts = Counter(row["verdict"] for row in rows)
    changed = Counter(_short(name) for row in rows for name in row.get("changed", ()))
    fields = Counter(_short(re.split(r"[ ;]", line)[0]) for row in rows for line in row.get("reason", ()))
    layers = Counter(row["layers"] for row in rows if "layers" in row)
    cells = [
        family,
        str(len(rows)),
        *(str(verdicts[name] or "") for name in ("unchanged", "started", "refused")),
        _counts(changed),
        _counts(fields),
        _counts(layers),
        _steps(trained),
    ]
    return "| " + " | ".join(cells) + " |\n"


def _short(option: str) -> str:
    return option.removeprefix("model.")


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def _steps(trained: dict[str, Any]) -> str:
    if "losses" in trained:
        losses = ", ".join(f"{loss:.3f}" for loss in trained["losses"])
        return "; ".join([losses, *trained["left_out"]])
    if "without_mamba" in trained:
        return f"{trained['error']}; without Mamba layers {_steps(trained['without_mamba'])}"
    return str(trained.get("error", "refused"))


def find() -> dict[str, Any]:
    """The rows of all recipes, and how two steps of one recipe of each family went."""
    hub_configs.use()
    found, functions = coverage(), dict(recipes())
    verdicts = {row["recipe"]: row["verdict"] for row in found["recipes"]}
    found["versions"] = {name: version(f"megatron-{name}") for name in ("bridge", "core")}
    found["families"] = {
        family: {"recipe": name} | ({} if verdicts[name] == "refused" else outcome(functions[name]))
        for family, name in RECIPES.items()
    }
    found["over_budget"] = train_over_budget(functions[RECIPES["Moonlight"]])
    return found


def main() -> None:
    """Print what was found, or write it."""
    logging.disable(logging.CRITICAL)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{free.getsockname()[1]}"}
    found = find()
    if "--write" in sys.argv[1:]:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        RESULTS.with_suffix(".md").write_text(table(found))
    else:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
