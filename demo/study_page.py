"""The results of study.py as a page and as a file of numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from demo.corpus import Corpus
from demo.further import AFTER, BEFORE, Further
from demo.intervals import Difference
from demo.losses import Measured, minus
from demo.runs import SELECTION, VALIDATION, Run
from emo_megatron.commands.retention import versions
from emo_megatron.files import whole
from emo_megatron.json_files import to_json
from emo_megatron.report.rows import CHOSEN, EMO, FULL, QUARTER, RANDOM, SMALL, STANDARD
from emo_megatron.report.table import MISSING, signed

FORMAT = "emo_megatron.study.1"
NOT_RUN = "not run"
EIGHTH = QUARTER / 2
INTRODUCTION = """\
Losses are nats per token, means over the domains. **Gap**: EMO with all experts minus the standard MoE of the same
shape. **1/4**, **1/8**: loss increase of modules with that share of the routed experts, chosen for their domain.
**Random 1/4**: loss increase with a random quarter. In the grid, ± is the standard error over documents, paired. In
the other tables, ± is the standard error over seeds."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """All runs of a study, finished or not."""

    corpus: Corpus
    grid: Sequence[Run]
    finalists: Sequence[Run]
    validation: Sequence[Run]
    further: Sequence[Further]
    longer: Sequence[Run]
    options: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Score:
    """One setting with pools: the means over the seeds that are measured."""

    name: str
    gap: float
    increase: float
    """At a quarter of the experts."""

    @property
    def sum(self) -> float:
        """What decides: the quarter module's loss minus that of the full standard MoE."""
        return self.gap + self.increase


def scores(runs: Sequence[Run], text: str) -> list[Score]:
    """The settings with pools whose runs and twins are measured, the best first."""
    found: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        gap, measured = gap_of(run, runs, text), run.measured(text)
        if gap is not None and measured is not None:
            found.setdefault(run.setting.name, []).append((gap.nats, measured.increase(CHOSEN, QUARTER).nats))
    means = [
        Score(name=name, gap=fmean(g for g, _ in pairs), increase=fmean(i for _, i in pairs))
        for name, pairs in found.items()
    ]
    return sorted(means, key=lambda score: score.sum)


def gap_of(run: Run, runs: Sequence[Run], text: str, iteration: int | None = None) -> Difference | None:
    """EMO minus its twin of the same seed; None for models without pools, and if one was not measured."""
    if run.setting.model != EMO:
        return None
    return _difference(run, _companion(run, runs, STANDARD), text, iteration=iteration)


def _companion(run: Run, runs: Sequence[Run], model: str) -> Run | None:
    name = run.setting.of_shape(model)
    same = (r for r in runs if r.setting.name == name and (r.seed, r.steps) == (run.seed, run.steps))
    return next(same, None)


def _difference(
    run: Run,
    other: Run | None,
    text: str,
    *,
    method: str = FULL,
    keep_fraction: float = 1.0,
    iteration: int | None = None,
) -> Difference | None:
    """The loss of some experts of a run minus the loss of another full model."""
    first = run.measured(text, iteration)
    second = other.measured(text, iteration) if other else None
    return None if first is None or second is None else minus(first, second, method=method, keep_fraction=keep_fraction)


def save(study: Study, base: Path) -> str:
    """Write `base`.md and `base`.json; returns the page."""
    text = page(study)
    files = {".md": text, ".json": to_json(numbers(study), indent=1) + "\n"}
    for suffix, content in files.items():
        with whole(base.with_suffix(suffix)) as unfinished:
            unfinished.write_text(content, encoding="utf-8")
    return text


def page(study: Study) -> str:
    """The whole page, in Markdown."""
    domains = study.corpus.manifest["domains"]
    text = (
        f"Text: {len(domains)} domains ({', '.join(domains)}), {study.corpus.train_tokens:,} training tokens, "
        f"fingerprint {study.corpus.manifest['fingerprint'][:16]}. {versions()}; one CPU thread per model."
    )
    parts = [
        "# Settings of EMO at the demo's size",
        INTRODUCTION,
        text,
        "## Grid\n\n" + _about(study.grid, SELECTION) + _table(_grid_rows(study.grid), GRID),
        "## Finalists\n\n" + _about(study.finalists, SELECTION) + _means(study.finalists, SELECTION),
        "## Validation\n\n" + _about(study.validation, VALIDATION) + _means(study.validation, VALIDATION),
        "## Further training\n\n" + _further(study.further),
        "## More tokens\n\n" + _longer(study.longer),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _about(runs: Sequence[Run], text: str) -> str:
    if not runs:
        return "Not planned yet: an earlier stage decides which runs these are.\n\n"
    size, seeds = runs[0].size, sorted({run.seed for run in runs})
    return (
        f"{size.steps} steps, {size.tokens / 1e6:.2f}M tokens; seed{'s' * (len(seeds) > 1)} "
        f"{', '.join(map(str, seeds))}; measured on the {text} text.\n\n"
    )


GRID = ("setting", "", "full", "gap", "1/4", "1/8", "random 1/4", "gap + 1/4")


def _grid_rows(runs: Sequence[Run]) -> Iterator[tuple[str, ...]]:
    for run in runs:
        head = (run.setting.name, run.setting.about)
        measured = run.measured(SELECTION)
        if measured is None:
            yield (*head, NOT_RUN, *[""] * 5)
            continue
        gap = gap_of(run, runs, SELECTION)
        yield (
            *head,
            f"{measured.loss():.3f}",
            str(gap) if gap else MISSING,
            *(_cell(MEANS[name](run, runs, SELECTION)) for name in ("1/4", "1/8", "random 1/4")),
            signed(gap.nats + measured.increase(CHOSEN, QUARTER).nats) if gap else MISSING,
        )


def _cell(value: float | None) -> str:
    return MISSING if value is None else signed(value)


def over_seeds(values: Sequence[float], *, with_sign: bool = True) -> str:
    """Mean and standard error over seeds."""
    mean = signed(fmean(values)) if with_sign else f"{fmean(values):.3f}"
    if len(values) == 1:
        return f"{mean} (one seed)"
    return f"{mean} ± {stdev(values) / math.sqrt(len(values)):.3f}"


MEANS: dict[str, Callable[[Run, Sequence[Run], str], float | None]] = {
    "full": lambda run, runs, text: _of(run, text, lambda m: m.loss()),
    "gap": lambda run, runs, text: _nats(gap_of(run, runs, text)),
    "1/4": lambda run, runs, text: _of(run, text, lambda m: m.increase(CHOSEN, QUARTER).nats),
    "1/8": lambda run, runs, text: _of(run, text, lambda m: m.increase(CHOSEN, EIGHTH).nats),
    "random 1/4": lambda run, runs, text: _of(run, text, lambda m: m.increase(RANDOM, QUARTER).nats),
    "selectivity": lambda run, runs, text: _of(run, text, _selectivity),
    "1/4 minus small": lambda run, runs, text: _against_small(run, runs, text),
}


def _of(run: Run, text: str, value: Callable[[Measured], float | None]) -> float | None:
    measured = run.measured(text)
    try:
        return None if measured is None else value(measured)
    except KeyError:
        # a small model keeps all its experts, and not every size has an eighth
        return None


def _selectivity(measured: Measured) -> float | None:
    others = measured.increase_on_others
    return None if others is None else others - measured.increase(CHOSEN, QUARTER).nats


def _nats(difference: Difference | None) -> float | None:
    return None if difference is None else difference.nats


def _against_small(run: Run, runs: Sequence[Run], text: str) -> float | None:
    if run.setting.model != EMO:
        return None
    return _nats(_difference(run, _companion(run, runs, SMALL), text, method=CHOSEN, keep_fraction=QUARTER))


def _means(runs: Sequence[Run], text: str) -> str:
    """One line per setting: means over seeds; and what is not run."""
    by_setting: dict[str, list[Run]] = {}
    for run in runs:
        by_setting.setdefault(run.setting.name, []).append(run)
    lines, missing = [], []
    for name, group in by_setting.items():
        done = [run for run in group if run.measured(text)]
        missing += [run.name for run in group if run not in done]
        if not done:
            continue
        cells = [name, str(len(done))]
        for column, value in MEANS.items():
            found = [v for v in (value(run, runs, text) for run in done) if v is not None]
            cells.append(over_seeds(found, with_sign=column != "full") if found else MISSING)
        lines.append(tuple(cells))
    return _table(lines, ("setting", "seeds", *MEANS)) + _not_run(missing)


def _not_run(names: Sequence[str]) -> str:
    return f"\n\nNot run: {', '.join(names)}." if names else ""


def _further(further: Sequence[Further]) -> str:
    """Module and small model before and after, per seed and domain."""
    if not further:
        return "Not planned yet: an earlier stage decides which runs these are."
    pairs: dict[tuple[int, str], dict[str, Further]] = {}
    for item in further:
        pairs.setdefault((item.parent.seed, item.domain), {})[item.parent.setting.model] = item
    lines, missing = [], []
    apart: dict[int, list[float]] = {}
    for (seed, domain), models in pairs.items():
        cells, losses = [str(seed), domain], {}
        for model in (EMO, SMALL):
            for when in (BEFORE, AFTER):
                measured = models[model].loss(when)
                losses[model, when] = measured.loss() if measured else math.nan
                cells.append(f"{losses[model, when]:.3f}" if measured else NOT_RUN)
        difference = losses[EMO, AFTER] - losses[SMALL, AFTER]
        if not math.isnan(difference):
            apart.setdefault(seed, []).append(difference)
        missing += [m.name for m in models.values() if m.loss(AFTER) is None]
        lines.append((*cells, MISSING if math.isnan(difference) else signed(difference)))
    tokens = further[0].steps * further[0].parent.size.rows * further[0].parent.size.seq_length
    about = (
        f"EMO's module with a quarter of the experts and the small model, each trained for {tokens / 1e6:.2f}M more "
        "tokens of the domain; loss on validation documents of the domain.\n\n"
    )
    head = ("seed", "domain", "module", "trained", "small", "trained", "trained module minus trained small")
    mean = f"\n\nMean over seeds: {over_seeds([fmean(v) for v in apart.values()])}." if apart else ""
    return about + _table(lines, head) + mean + _not_run(missing)


def _longer(runs: Sequence[Run]) -> str:
    if not runs:
        return "Not planned yet: an earlier stage decides which runs these are."
    emo = next(run for run in runs if run.setting.model == EMO)
    lines = []
    for iteration in emo.iterations:
        tokens = iteration * emo.size.rows * emo.size.seq_length
        measured, gap = emo.measured(SELECTION, iteration), gap_of(emo, runs, SELECTION, iteration)
        standard = _companion(emo, runs, STANDARD)
        other = standard.measured(SELECTION, iteration) if standard else None
        lines.append(
            (
                f"{tokens / 1e6:.2f}M",
                f"{other.loss():.3f}" if other else NOT_RUN,
                f"{measured.loss():.3f}" if measured else NOT_RUN,
                str(gap) if gap else MISSING,
                str(measured.increase(CHOSEN, QUARTER)) if measured else MISSING,
                str(other.increase(CHOSEN, QUARTER)) if other else MISSING,
            )
        )
    epochs = emo.size.tokens / emo.corpus.train_tokens
    about = f"{emo.setting.name} and its standard MoE, seed {emo.seed}, {epochs:.1f} passes over the text.\n\n"
    return about + _table(lines, ("tokens", "standard", "EMO", "gap", "EMO 1/4", "standard 1/4"))


def _table(rows: Iterator[tuple[str, ...]] | Sequence[tuple[str, ...]], head: Sequence[str]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def numbers(study: Study) -> dict[str, Any]:
    """Everything measured, per run and text."""
    runs = {run.name: run for run in (*study.grid, *study.finalists, *study.validation, *study.longer)}
    found: list[dict[str, Any]] = []
    for run in runs.values():
        for text in (SELECTION, VALIDATION):
            for iteration in run.iterations:
                if measured := run.measured(text, iteration):
                    found.append(_run_numbers(run, measured, text=text, iteration=iteration))
    further = [
        {"name": f.name, "domain": f.domain, "seed": f.parent.seed, "when": when, "loss": measured.loss()}
        for f in study.further
        for when in (BEFORE, AFTER)
        if (measured := f.loss(when))
    ]
    return {
        "format": FORMAT,
        "text": {name: study.corpus.manifest[name] for name in ("fingerprint", "vocab_size", "domains")},
        "versions": versions(),
        "options": study.options,
        "runs": found,
        "further": further,
    }


def _run_numbers(run: Run, measured: Measured, *, text: str, iteration: int) -> dict[str, Any]:
    losses = {
        f"{method} {fraction:g}": {
            domain: math.fsum(values) / sum(measured.tokens[domain]) for domain, values in nats.items()
        }
        for (method, fraction), nats in measured.nats.items()
    }
    return {
        "setting": run.setting.name,
        "seed": run.seed,
        "iteration": iteration,
        "steps": run.size.steps,
        "tokens": iteration * run.size.rows * run.size.seq_length,
        "text": text,
        "size": asdict(run.size),
        "losses": losses,
        "increase_on_others": measured.increase_on_others,
    }
