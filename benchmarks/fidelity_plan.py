"""The number of steps that fit into the time of fidelity.py, computed from the log of the first steps."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace
from pathlib import Path

import find_demo  # noqa: F401

from demo.recipe import QUICK, Size
from emo_megatron.mcore.cpu import local_flags

PASSES = 5
"""How often the text is read at most: more often, models learn it by heart, and the larger ones sooner."""
RESERVE = 0.08
"""Share of the training time kept back where this call chooses the steps: the partner that takes over the number may
be slower."""
PARTNER_RESERVE = 0.01
"""The same where a partner has chosen them."""
OTHER_SECONDS = 8.0
"""For what is not seen in the log: the last checkpoint, files, pages."""
LINE = re.compile(
    r"iteration\s+(\d+)/\s*\d+ \|.*?elapsed time per iteration \(ms\): ([\d.]+)"
    r"(?:.*? lm loss: ([\d.E+-]+))?"
)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long a run must be to be worth anything."""

    fewest_steps: int
    """Fewer are not trained."""
    probe_steps: int
    """After so many the speed is judged."""
    probe_share: float
    """Or after this share of the time, whichever comes first."""
    seconds: float
    """With less time nothing is begun."""


ON_GPU = Size(
    steps=915,
    rows=128,
    micro_rows=64,
    seq_length=1024,
    layers=8,
    hidden=512,
    heads=8,
    experts=64,
    expert_hidden=256,
    shared_hidden=512,
    top_k=4,
    pool_min=12,
    pool_decay=0.6,
    pool_delay=0.0,
    pool_skew=1.0,
    unrestricted=0.0,
    balance=0.1,
    fractions=(0.5, 0.25, 0.125),
    evaluation_tokens=65536,
    calibration_tokens=32768,
    lr=1.5e-3,
    warmup=80,
    # without Transformer Engine Megatron turns packed documents one by one, which a GPU would wait for
    positions="learned_absolute",
    flags=("--bf16", *local_flags()),
)
"""120 million tokens for a GPU without Transformer Engine."""
ON_GPU_QUICK = replace(
    QUICK,
    steps=24,
    micro_rows=4,
    shared_hidden=64,
    warmup=4,
    positions=ON_GPU.positions,
    flags=ON_GPU.flags,
    pool_decay=ON_GPU.pool_decay,
    pool_delay=ON_GPU.pool_delay,
    pool_skew=ON_GPU.pool_skew,
    unrestricted=ON_GPU.unrestricted,
    balance=ON_GPU.balance,
)
"""All that `ON_GPU` does, in seconds on a CPU."""


LIMITS = Limits(fewest_steps=100, probe_steps=100, probe_share=0.1, seconds=120)
QUICK_LIMITS = Limits(fewest_steps=4, probe_steps=8, probe_share=0.2, seconds=20)


@dataclass(frozen=True, kw_only=True)
class LogLine:
    """What Megatron says of the iterations since its last line."""

    iteration: int
    seconds: float
    """An iteration, in the mean."""
    loss: float | None


def read_log(log: Path) -> list[LogLine]:
    """The lines of a training log so far; none before the first."""
    if not log.exists():
        return []
    return [
        LogLine(iteration=int(number), seconds=float(milliseconds) / 1e3, loss=float(loss) if loss else None)
        for number, milliseconds, loss in LINE.findall(log.read_text(errors="replace"))
    ]


def step_seconds(lines: list[LogLine]) -> float | None:
    """Mean seconds of a step; None before the third line.

    The first two lines are left out: Megatron's second one counts the first step again, which holds what is done once.
    """
    if len(lines) < 3:
        return None
    counts = [b.iteration - a.iteration for a, b in itertools.pairwise(lines[1:])]
    total = sum(n * line.seconds for n, line in zip(counts, lines[2:], strict=True))
    return total / sum(counts)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What the first steps tell."""

    steps: int
    """Done when it was measured."""
    step_seconds: float
    startup_seconds: float
    """From the start of the process to its first step."""


def evaluation_seconds(size: Size, speed: Speed, *, num_domains: int, fractions: tuple[float, ...]) -> float:
    """What two evaluations may take: the whole model at two checkpoints, and every fraction of its experts.

    Args:
        size: of the model.
        speed: of its training.
        num_domains: of the text.
        fractions: of the experts, each chosen, at random, and one of them on every other domain.
    """
    passes = 2 + 2 * len(fractions) + (num_domains - 1 if fractions else 0)
    tokens = num_domains * passes * size.evaluation_tokens
    if fractions:
        tokens += num_domains * size.calibration_tokens
    # a forward pass is a third of a step; the rest is for rows and micro-batches that documents do not fill
    per_token = speed.step_seconds / (size.rows * size.seq_length)
    return 2 * speed.startup_seconds + tokens * per_token


def planned_steps(size: Size, *, train_tokens: int, limits: Limits) -> int:
    """The steps of the size, or as many as `PASSES` over the training text have, but never fewer than are allowed."""
    of_text = PASSES * train_tokens // (size.rows * size.seq_length)
    return max(limits.fewest_steps, min(size.steps, of_text))


def choose_steps(
    planned: int, *, seconds_left: float, after: float, speed: Speed, limits: Limits, reserve: float
) -> int:
    """How many steps to train.

    Args:
        planned: steps of the run whose first `speed.steps` are done.
        seconds_left: for the rest of the training and all that follows.
        after: seconds of what follows.
        speed: of the first steps.
        limits: the fewest steps.
        reserve: share of the training time kept back.

    Returns:
        `planned` if the run can go on as it is; else as many as fit into a run that begins anew.

    Raises:
        ValueError: those are too few.
    """
    step = speed.step_seconds * (1 + reserve)
    room = seconds_left - after - OTHER_SECONDS
    if (planned - speed.steps) * step <= room:
        return planned
    steps = int((room - speed.startup_seconds) / step)
    if steps > 100:
        # a round number, which a slightly slower partner also reaches
        steps -= steps % 10
    if steps < limits.fewest_steps:
        raise ValueError(
            f"--seconds leaves {seconds_left:.0f} s for training and evaluation after the first steps, enough for "
            f"{max(steps, 0)} steps of {speed.step_seconds:.2f} s each, and {limits.fewest_steps} are the fewest; "
            "give more seconds or a faster device"
        )
    return steps
