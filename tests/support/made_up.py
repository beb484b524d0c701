"""Stands in for both processes of benchmarks/fidelity.py: a training that writes a log and the number of its
last step, a measurement of nothing.

The training takes MADE_UP_MS milliseconds a step by its log, and leaves its flags in MADE_UP_FLAGS. The measurement's
losses depend on the model's name and the document alone. Both wait MADE_UP_WAIT
seconds after each step, or each size; the training hangs after step MADE_UP_HANG.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

LINE = (
    " [2026-01-01 00:00:00] iteration {:8d}/{:8d} | consumed samples: {:12d} |"
    " elapsed time per iteration (ms): {:.1f} | learning rate: 1.0E-03 | global batch size:     8 |"
    " lm loss: {:.6E} | loss scale: 1.0 |"
)
DOMAINS = ("one", "two", "three")
DOCUMENT_TOKENS = (100, 200, 50, 400)
BY_MODEL = {"standard": 0.0, "emo": 0.02, "small": 0.3}
"""What the whole model's losses are apart."""


def train(arguments: list[str]) -> None:
    """Say what Megatron says of each step."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--train-iters", type=int)
    parser.add_argument("--save", type=Path)
    given = parser.parse_known_args(arguments)[0]
    steps = given.train_iters
    Path(os.environ["MADE_UP_FLAGS"]).write_text("\n".join(arguments))
    for step in range(1, steps + 1):
        milliseconds = float(os.environ["MADE_UP_MS"])
        print(LINE.format(step, steps, 8 * step, milliseconds, 8 / step), flush=True)
        time.sleep(float(os.environ.get("MADE_UP_WAIT", "0")))
        if step == int(os.environ.get("MADE_UP_HANG", "0")):
            time.sleep(100)
    given.save.mkdir(parents=True)
    (given.save / "latest_checkpointed_iteration.txt").write_text(str(steps))


def measure(arguments: list[str]) -> None:
    """Leave what demo/measure.py leaves: the whole model, then size after size."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("output", "checkpoint", "name"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--keep", nargs="*", default=[])
    options = parser.parse_known_args(arguments)[0]
    experts = 2 if options.name == "small" else 8
    rows = [row(options.name, d, d, "full", experts, experts) for d in DOMAINS]
    for kept in (None, *(int(size.split()[0]) for size in options.keep)):
        if kept is not None:
            for method in ("random", "mean_prob"):
                rows += [row(options.name, d, d, method, kept, experts) for d in DOMAINS]
            rows.append(row(options.name, "one", "two", "mean_prob", kept, experts))
        output = Path(options.output) / "unfinished.json"
        output.parent.mkdir(parents=True, exist_ok=True)
        part = output.with_suffix(".part")
        part.write_text(json.dumps(rows))
        part.replace(output)
        time.sleep(float(os.environ.get("MADE_UP_WAIT", "0")))
    output.replace(output.with_name("measured.json"))


def row(model: str, domain: str, evaluated_on: str, method: str, kept: int, experts: int) -> dict[str, object]:
    """One row."""
    missing = 1 - kept / experts
    rise = missing * {"full": 0, "mean_prob": 0.4, "random": 1.0}[method]
    if domain != evaluated_on:
        rise *= 2
    nats = [n * (3 + BY_MODEL[model] * (1 + place / 10) + rise + place / 5) for place, n in enumerate(DOCUMENT_TOKENS)]
    return {
        "domain": domain,
        "evaluated_on": evaluated_on,
        "method": method,
        "keep_fraction": kept / experts,
        "num_experts_kept": kept,
        "loss": sum(nats) / sum(DOCUMENT_TOKENS),
        "tokens": sum(DOCUMENT_TOKENS),
        "origin": "made up",
        "nats": nats,
        "document_tokens": DOCUMENT_TOKENS,
    }


if __name__ == "__main__":
    (train if "--train-iters" in sys.argv else measure)(sys.argv[1:])
