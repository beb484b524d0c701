"""The steps of every stage, the most valuable first: command, time limit and requirements of each step.

A command may contain these names in braces: python, device, output (a folder for this step), builds (the folder of
libraries compiled in the background), model, seconds (the time of an elastic step), partners and corpus.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MOST_SECONDS = 540
"""All steps of a stage together, and writing the bundle."""
BUNDLE_SECONDS = 15
"""Of them, kept for the bundle."""
MODELS = ("standard", "emo", "small")
MEGATRON = {"TORCHDYNAMO_DISABLE": "1", "EMO_OPS": "native"}
"""Megatron compiles its own fused functions on first use, which would eat the time that is measured; and nothing is
measured with the reference ops because the compiled ones did not load."""
NO_CACHING = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
"""The caching allocator hides an overrun that stays inside one of its blocks."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One row of the summary."""

    name: str
    command: tuple[str, ...]
    seconds: int
    """Budget; the step is ended after it."""
    most_seconds: int | None = None
    """What it may take instead, at the cost of later steps, where that is left."""
    needs: tuple[str, ...] = ()
    """Of machine.py's `why_lacking`."""
    on_gpu: tuple[str, ...] = ()
    """Put behind the command, but not in a rehearsal."""
    rehearsal: tuple[str, ...] = ()
    """Put behind the command in a rehearsal, which has no GPU: small sizes."""
    with_corpus: tuple[str, ...] = ()
    """Put behind the command if a corpus is given."""
    environment: Mapping[str, str] = field(default_factory=dict)
    is_elastic: bool = False
    """Takes all that is left of the stage's budget, at least `seconds`."""

    @property
    def slug(self) -> str:
        """The name of its folder in the archive."""
        return self.name.replace(",", "").replace(" ", "-")


def _script(name: str, *arguments: str) -> tuple[str, ...]:
    return ("{python}", f"benchmarks/{name}.py", *arguments)


def _gpu(name: str, *arguments: str) -> tuple[str, ...]:
    return _script(f"gpu/{name}", *arguments, "--device", "{device}")


def _sanitizer(tool: str, seconds: int) -> Step:
    sanitizer = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "3")
    return Step(
        name=tool,
        command=(*sanitizer, *_gpu("sanitize")),
        seconds=seconds,
        needs=("compute-sanitizer",),
        environment=NO_CACHING,
    )


def _check(name: str, *check: str, seconds: int, rehearsal: tuple[str, ...] = ()) -> Step:
    small = ("--tokens", "512", *rehearsal)
    return Step(name=name, command=_gpu("checks", *check), seconds=seconds, rehearsal=small)


def _routing(*sizes: str) -> tuple[str, ...]:
    arguments = (*sizes, "--device", "{device}", "--output", "{output}")
    return _script("bench_routing", *arguments)


_TINY_ROUTING = ("--tokens", "256", "--experts", "16", "--top-k", "2", "--seconds", "0.02")
_START = (
    Step(name="metadata", command=_gpu("metadata", "--output", "{output}"), seconds=25),
    Step(
        name="library",
        command=_gpu("builds", "wait", "{builds}", "--logs", "{output}"),
        seconds=20,
        # without a library that works nothing else does: a compiler may take its time
        most_seconds=150,
    ),
)

STAGE_A = (
    *_START,
    Step(name="smoke", command=_gpu("smoke"), seconds=20, rehearsal=("--tokens", "512")),
    Step(
        name="gpu tests",
        command=("{python}", *("-m", "pytest", "-q", "-m", "gpu"), *("tests/ops", "-p", "no:cacheprovider")),
        seconds=65,
        needs=("pytest",),
    ),
    _check("first call in a capture", "first-capture", seconds=12),
    _check("stream, bits, decisions", *("other-stream", "equal-bits", "decisions", "--tokens", "65536"), seconds=40),
    # inductor's C++ would take most of a rehearsal
    _check("inductor", "compile", seconds=30, rehearsal=("--compiler", "aot_eager")),
    Step(name="kernels", command=_gpu("kernels", "--output", "{output}"), seconds=75, rehearsal=("--quick",)),
    Step(
        name="builds",
        command=_gpu("builds", "compare", "{builds}", "--output", "{output}"),
        seconds=50,
        needs=("nvcc",),
        rehearsal=("--quick",),
    ),
    Step(
        name="ncu",
        command=_gpu("ncu", "--output", "{output}"),
        seconds=50,
        needs=("ncu",),
        rehearsal=("--tokens", "256"),
    ),
    _sanitizer("memcheck", 35),
    _sanitizer("racecheck", 30),
    _sanitizer("synccheck", 25),
    Step(
        name="routing",
        command=_routing(),
        seconds=45,
        needs=("wheels",),
        on_gpu=(*("--tokens", "8192", "65536", "--experts", "128", "--top-k", "8"), *("--seconds", "1")),
        rehearsal=_TINY_ROUTING,
    ),
)

STAGE_B = (
    *_START,
    Step(
        name="layer",
        command=_script("bench_layer", "--device", "{device}", "--output", "{output}"),
        seconds=60,
        needs=("wheels",),
        rehearsal=("--quick", "--seconds", "0.1"),
        environment=MEGATRON,
    ),
    Step(
        name="permutation",
        command=_script("bench_permute", "--device", "{device}", "--output", "{output}"),
        seconds=40,
        needs=("wheels",),
        on_gpu=("--width", "2048", "--tokens", "16384", "65536"),
        rehearsal=("--quick", "--seconds", "0.1"),
        environment=MEGATRON,
    ),
    Step(
        name="model",
        command=_script("bench_model", "--device", "{device}", "--output", "{output}"),
        seconds=150,
        needs=("wheels",),
        on_gpu=("--seconds", "110"),
        rehearsal=("--quick", "--seconds", "2"),
        environment=MEGATRON,
    ),
    Step(
        name="trace",
        command=_script("bench_model", "--device", "{device}", "--trace", "{output}"),
        seconds=60,
        needs=("wheels",),
        rehearsal=("--quick",),
        environment=MEGATRON,
    ),
    Step(
        name="model, dedup",
        command=_script(*("bench_model", "--device", "{device}", "--dispatcher", "dedup"), *("--output", "{output}")),
        seconds=60,
        needs=("wheels",),
        on_gpu=("--seconds", "15"),
        rehearsal=("--quick", "--seconds", "2"),
        environment=MEGATRON,
    ),
    Step(
        name="routing, few tokens",
        command=_routing(),
        seconds=45,
        needs=("wheels",),
        on_gpu=("--tokens", "1024", "--top-k", "8", "--seconds", "1"),
        rehearsal=_TINY_ROUTING,
    ),
    Step(
        name="routing, many experts",
        command=_routing(),
        seconds=55,
        needs=("wheels",),
        on_gpu=(*("--tokens", "8192", "65536", "--experts", "512", "--top-k", "8"), *("--seconds", "1")),
        rehearsal=_TINY_ROUTING,
    ),
)

STAGE_C = (
    *_START,
    Step(
        name="fidelity",
        command=_script(
            *("fidelity", "{model}", "--device", "{device}", "--seconds", "{seconds}"),
            *("--partners", "{partners}", "--output", "{output}"),
        ),
        seconds=135,
        needs=("wheels",),
        rehearsal=("--quick",),
        with_corpus=("--corpus", "{corpus}"),
        environment=MEGATRON,
        is_elastic=True,
    ),
)

STAGES = {"A": STAGE_A, "B": STAGE_B, "C": STAGE_C}


def over_budget() -> list[str]:
    """The stages whose steps sum to more than a stage may take; none, or the table is wrong."""
    allowed = MOST_SECONDS - BUNDLE_SECONDS
    return [name for name, steps in STAGES.items() if sum(s.seconds for s in steps) > allowed]
