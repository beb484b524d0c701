"""The tables of update_module.py: gain and harm of every update, and the page in benchmarks/results."""

from __future__ import annotations

import importlib.metadata
import re
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import torch
from timing import describe_machine

LEAST_GAIN = 0.005
"""Smallest gain, in nats per token, by which harm is divided."""
Losses = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Model -> update -> domain -> nats per token; the update "parent" is the untouched model."""
WIDTH = 120
"""Columns of the page's text."""
WHOLE_WORDS = {"break_long_words": False, "break_on_hyphens": False}
TITLES = {"emo": "EMO", "standard": "standard"}

INTRODUCTION = """# Updating the demo's models with Perl

- script: `benchmarks/update_module.py`
{machine}
- losses measured: {dates}; date, commit, threads and load above are those of this page
- models: EMO and the standard MoE of `make demo`, {experts} routed experts and a shared one, which have seen no Perl;
  one seed

{steps} steps of {step_tokens} tokens of Perl text. {kept} routed experts are chosen by mean router probability on
{calibration_tokens} tokens. The number after a comma is the largest learning rate, which falls linearly to a tenth:
{lr}, and for the module's experts also {rate}, the rate of LoRA. Losses are nats per token over {evaluation_tokens}
validation tokens per domain. Gain: how much the loss on Perl falls below that of the untouched parent. Harm: the mean
loss increase over the demo's eight domains. Share: `merge --blend`, how far the result goes from the parent's weights
to the trained weights. For a module alone only Perl is shown, because the parent stays unchanged.

LoRA in peft: the module is exported, `benchmarks/train_lora.py` trains an adapter of rank {rank} and alpha {alpha} for
{targets}, and `import --adapter` merges the adapter. The adapter sees the same number of tokens of the same text, in
file order, with the same warm-up and fall to a tenth; its optimizer has the same settings, and its loss has neither a
load-balancing loss nor a z-loss. The rates {rates} were tried, and {rate} was chosen for the merged rows of both models
by the Perl validation loss of EMO's module, which is the loss in the table.

What the numbers mean is in [docs/update.md](../../docs/update.md).

"""


@dataclass(frozen=True, kw_only=True)
class Update:
    """One row: a kind of update."""

    name: str
    """Key of its losses."""
    trained: str
    share: float | None = None
    """`merge --blend`; None: nothing is merged."""
    is_alone: bool = False
    """Whether the model is the module, without its parent."""


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What an update does to the losses, in nats per token."""

    loss: float
    """On the new domain."""
    gain: float
    """Loss decrease on the new domain."""
    rises: dict[str, float]
    """Other domain -> loss increase."""

    @property
    def harm(self) -> float:
        """Mean loss increase over the other domains."""
        return statistics.mean(self.rises.values())

    @property
    def share(self) -> float | None:
        """Harm per gain; 0 if the table shows no harm, and None if there is no gain."""
        if self.gain <= LEAST_GAIN:
            return None
        return 0.0 if round(self.harm, 3) == 0 else self.harm / self.gain


def effect(parent: Mapping[str, float], losses: Mapping[str, float], *, domain: str) -> Effect:
    """Compare the losses of an updated model with those of its untouched parent."""
    rises = {name: losses[name] - parent[name] for name in parent if name != domain}
    return Effect(loss=losses[domain], gain=parent[domain] - losses[domain], rises=rises)


def long_table(losses: Losses, *, domain: str) -> str:
    """One row per model and update, with the domain that loses most."""
    lines = [f"| model | update | loss on {domain} | gain | harm to the others | harm / gain | worst |"]
    lines.append("|---|---|--:|--:|--:|--:|---|")
    for model, updates in losses.items():
        for name, measured in updates.items():
            found = effect(updates["parent"], measured, domain=domain)
            worst = max(found.rises, key=lambda d: found.rises[d])
            share = "-" if found.share is None else f"{found.share:.3f}"
            cells = [model, name, f"{found.loss:.3f}", f"{found.gain:+.3f}", f"{found.harm:+z.3f}", share]
            lines.append(f"| {' | '.join(cells)} | {worst} {found.rises[worst]:+.3f} |")
    return "\n".join(lines) + "\n"


def table(losses: Losses, updates: Sequence[Update], *, domain: str) -> str:
    """One row per update, with both models side by side."""
    head, line = "| trained | share |", "|---|---|"
    for model in losses:
        head += f" {TITLES[model]}: {domain.capitalize()} loss | gain | harm | harm / gain |"
        line += "--:|" * 4
    lines = [head, line]
    named = None
    for update in updates:
        share = "" if update.share is None else {1.0: "1", 0.5: "1/2", 0.25: "1/4"}[update.share]
        cells = ["" if update.trained == named else update.trained, share]
        named = update.trained
        for measured in losses.values():
            cells += _cells(effect(measured["parent"], measured[update.name], domain=domain), update)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cells(found: Effect, update: Update) -> list[str]:
    if update.name == "parent":
        return [_short(found.loss), "", "", ""]
    cells = [_short(found.loss), _short(found.gain, "+")]
    if update.is_alone:
        return [*cells, "", ""]
    return [*cells, _short(found.harm, "+"), "-" if found.share is None else _short(found.share)]


def _short(number: float, sign: str = "") -> str:
    """Three decimals, without a zero in front of the point, and no minus in front of zero."""
    return re.sub(r"^([+-]?)0\.", r"\1.", f"{number:{sign}z.3f}")


def rate_text(rate: float) -> str:
    """A learning rate as it is read: 4e-3."""
    return f"{Decimal(str(rate)):e}"


def dates_of(files: Iterable[Path]) -> str:
    """When the first and the last of these files were written, because a resumed run measures only what is missing."""
    times = sorted(path.stat().st_mtime for path in files)
    ends = dict.fromkeys(f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M}" for time in (times[0], times[-1]))
    return f"{' to '.join(ends)} UTC"


def versions(*names: str) -> dict[str, str]:
    """Package -> installed version."""
    return {name: importlib.metadata.version(name) for name in names}


def page(losses: Losses, updates: Sequence[Update], *, domain: str, setting: Mapping[str, object]) -> str:
    """The page: the machine and versions, how the numbers were measured (`setting`), and the table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = describe_machine(device, threads=torch.get_num_threads()) | versions("transformers", "peft")
    listed = "\n".join(f"- {name}: {value}" for name, value in machine.items())
    paragraphs = INTRODUCTION.format(machine=listed, **setting).split("\n\n")
    wrapped = [part if part.startswith("- ") else textwrap.fill(part, WIDTH, **WHOLE_WORDS) for part in paragraphs]
    return "\n\n".join([*wrapped[:-1], table(losses, updates, domain=domain)])
