"""The results of study.py as a page and as a file of numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
Losses are nats per token, means over the domains. **Full**: all experts. **Gap**: EMO with all experts minus the
standard MoE of the same shape. **1/4**, **1/8**: loss increase of modules with that share of the routed experts, chosen
for their domain. **Random 1/4**: loss increase with a random quarter. **1/4 loss**: full plus 1/4, which ranks the
settings. All settings have the same training tokens, the same parameters in routed experts and the same active
parameters.

In the tables of finalists and of the validation, ± is the standard error over seeds, and all seeds are measured on the
same documents. In the other tables, ± is the standard error over documents, of differences between two losses of the
same documents. Models of other seeds differ by several times as much."""


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


def gap_of(run: Run, runs: Sequence[Run], text: str, iteration: int | None = None) -> Difference | None:
    """EMO minus the standard MoE of the same shape and seed; None without pools, or if one was not measured."""
    if run.setting.model != EMO:
        return None
    return _difference(run, _same_shape(run, runs, STANDARD), text, iteration=iteration)


def _same_shape(run: Run, runs: Sequence[Run], model: str) -> Run | None:
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
        "## Grid\n\n" + _grid(study.grid),
        "## Finalists\n\n" + _means(study.finalists, SELECTION),
        "## Validation\n\n" + _means(study.validation, VALIDATION),
        "## Further training\n\n" + _further(study.further),
        "## More tokens\n\n" + _longer(study.longer),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


NOT_PLANNED = "Not planned yet: an earlier stage decides which runs these are."


def _about(runs: Sequence[Run], text: str) -> str:
    seeds = sorted({run.seed for run in runs})
    return (
        f"{runs[0].size.tokens / 1e6:.2f}M training tokens per model; seed{'s' * (len(seeds) > 1)} "
        f"{', '.join(map(str, seeds))}; measured on the {text} text.\n\n"
    )


INCREASES = ((CHOSEN, QUARTER), (CHOSEN, EIGHTH), (RANDOM, QUARTER))
GRID = ("setting", "", "full", "gap", "1/4", "1/8", "random 1/4", "1/4 loss")


def _grid(runs: Sequence[Run]) -> str:
    lines = []
    for run in runs:
        head = (run.setting.name, run.setting.about)
        measured = run.measured(SELECTION)
        if measured is None:
            lines.append((*head, NOT_RUN, *[""] * 5))
            continue
        gap = gap_of(run, runs, SELECTION)
        increases = [_increase(run, SELECTION, *kept) for kept in INCREASES]
        cells = [MISSING if found is None else str(found) for found in (gap, *increases)]
        lines.append((*head, f"{measured.loss():.3f}", *cells, f"{measured.loss(CHOSEN, QUARTER):.3f}"))
    return _about(runs, SELECTION) + _table(lines, GRID)


def over_seeds(values: Sequence[float], *, with_sign: bool = True) -> str:
    """Mean and standard error over seeds."""
    mean = signed(fmean(values)) if with_sign else f"{fmean(values):.3f}"
    if len(values) == 1:
        return f"{mean} (one seed)"
    return f"{mean} ± {stdev(values) / math.sqrt(len(values)):.3f}"


def _increase(run: Run, text: str, method: str, keep_fraction: float) -> Difference | None:
    """The loss increase; None if it was not measured: a small model keeps all experts, not every size has an eighth."""
    measured = run.measured(text)
    if measured is None or (method, keep_fraction) not in measured.nats:
        return None
    return measured.increase(method, keep_fraction)


MEANS: dict[str, Callable[[Run, Sequence[Run], str], float | None]] = {
    "full": lambda run, runs, text: _full(run, text),
    "gap": lambda run, runs, text: _nats(gap_of(run, runs, text)),
    "1/4": lambda run, runs, text: _nats(_increase(run, text, CHOSEN, QUARTER)),
    "1/8": lambda run, runs, text: _nats(_increase(run, text, CHOSEN, EIGHTH)),
    "random 1/4": lambda run, runs, text: _nats(_increase(run, text, RANDOM, QUARTER)),
    "selectivity": lambda run, runs, text: _selectivity(run, text),
    "1/4 minus small": lambda run, runs, text: _against_small(run, runs, text),
}


def _full(run: Run, text: str) -> float | None:
    measured = run.measured(text)
    return None if measured is None else measured.loss()


def _selectivity(run: Run, text: str) -> float | None:
    measured, increase = run.measured(text), _increase(run, text, CHOSEN, QUARTER)
    if measured is None or increase is None or measured.increase_on_others is None:
        return None
    return measured.increase_on_others - increase.nats


def _nats(difference: Difference | None) -> float | None:
    return None if difference is None else difference.nats


def _against_small(run: Run, runs: Sequence[Run], text: str) -> float | None:
    if run.setting.model != EMO:
        return None
    return _nats(_difference(run, _same_shape(run, runs, SMALL), text, method=CHOSEN, keep_fraction=QUARTER))


def _means(runs: Sequence[Run], text: str) -> str:
    """One line per setting: means over seeds; and the runs that are missing."""
    if not runs:
        return NOT_PLANNED
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
            cell = over_seeds(found, with_sign=column != "full") if found else MISSING
            cells.append(cell + (f" ({len(found)} of {len(done)} seeds)" if 0 < len(found) < len(done) else ""))
        lines.append(tuple(cells))
    return _about(runs, text) + _table(lines, ("setting", "seeds", *MEANS)) + _not_run(missing)


def _not_run(names: Sequence[str]) -> str:
    return f"\n\nNot run: {', '.join(names)}." if names else ""


def _further(further: Sequence[Further]) -> str:
    """Module and small model before and after, per seed and domain."""
    if not further:
        return NOT_PLANNED
    pairs: dict[tuple[int, str], dict[str, Further]] = {}
    for item in further:
        pairs.setdefault((item.parent.seed, item.domain), {})[item.parent.setting.model] = item
    lines, missing = [], []
    apart: dict[int, list[float]] = {}
    for (seed, domain), models in pairs.items():
        losses = {(model, when): models[model].loss(when) for model in (EMO, SMALL) for when in (BEFORE, AFTER)}
        cells = [NOT_RUN if found is None else f"{found.loss():.3f}" for found in losses.values()]
        module, small = losses[EMO, AFTER], losses[SMALL, AFTER]
        difference = minus(module, small) if module and small else None
        if difference:
            apart.setdefault(seed, []).append(difference.nats)
        missing += [m.name for m in models.values() if m.loss(AFTER) is None]
        passes = f"{models[EMO].passes:.1f}"
        lines.append((str(seed), domain, passes, *cells, str(difference) if difference else MISSING))
    size = further[0].parent.size
    about = (
        "EMO's module with a quarter of the experts and the small model, each trained for "
        f"{further[0].steps * size.rows * size.seq_length / 1e6:.2f}M more tokens of the domain. Loss on validation "
        "documents of the domain; ± is the standard error over documents.\n\n"
    )
    head = ("seed", "domain", "passes", "module", "trained", "small", "trained", "trained module minus trained small")
    values = [fmean(v) for v in apart.values()]
    mean = f"\n\nMean over seeds, each with other domains: {over_seeds(values)}." if values else ""
    return about + _table(lines, head) + mean + _not_run(missing)


def _longer(runs: Sequence[Run]) -> str:
    if not runs:
        return NOT_PLANNED
    emo = next(run for run in runs if run.setting.model == EMO)
    lines = []
    for iteration in emo.iterations:
        tokens = iteration * emo.size.rows * emo.size.seq_length
        measured, gap = emo.measured(SELECTION, iteration), gap_of(emo, runs, SELECTION, iteration)
        standard = _same_shape(emo, runs, STANDARD)
        other = standard.measured(SELECTION, iteration) if standard else None
        is_before = iteration <= emo.size.pool_delay * emo.size.steps
        lines.append(
            (
                f"{tokens / 1e6:.2f}M" + (", before pools" if is_before else ""),
                f"{other.loss():.3f}" if other else NOT_RUN,
                f"{measured.loss():.3f}" if measured else NOT_RUN,
                str(gap) if gap else MISSING,
                str(measured.increase(CHOSEN, QUARTER)) if measured else MISSING,
                str(other.increase(CHOSEN, QUARTER)) if other else MISSING,
            )
        )
    epochs = emo.size.tokens / emo.corpus.train_tokens
    about = (
        f"{emo.setting.name} and the standard MoE of the same shape, seed {emo.seed}, {epochs:.1f} passes over the "
        f"text; measured on the {SELECTION} text. The learning rate falls until the last row, so only the last row is "
        "of finished models.\n\n"
    )
    return about + _table(lines, ("tokens", "standard", "EMO", "gap", "EMO 1/4", "standard 1/4"))


def _table(rows: Sequence[tuple[str, ...]], head: Sequence[str]) -> str:
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
                    gap = gap_of(run, [*runs.values()], text, iteration)
                    own = _run_numbers(run, measured, text=text, iteration=iteration)
                    found.append(own | {"gap": _stored(gap) if gap else None})
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
        "increases": {
            f"{method} {fraction:g}": _stored(measured.increase(method, fraction))
            for method, fraction in measured.nats
            if method != FULL
        },
        "increase_on_others": measured.increase_on_others,
    }


def _stored(difference: Difference) -> dict[str, float | None]:
    return {"nats": difference.nats, "error": None if math.isnan(difference.error) else difference.error}
