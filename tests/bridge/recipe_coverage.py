"""Which recipes of the installed Megatron-Bridge can have pools, as JSON.

    python tests/bridge/recipe_coverage.py [--write]

prints it, or replaces benchmarks/results/bridge-recipes.json, with which test_coverage.py compares, and its table,
bridge-recipes.md.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from support import hub_configs
from support.bridge_coverage import coverage, recipes
from support.bridge_families import RECIPES, outcome, train_over_budget
from support.bridge_table import table

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "bridge-recipes.json"


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
