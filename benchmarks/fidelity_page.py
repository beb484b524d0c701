"""The page of fidelity.py: one model's numbers, and a comparison with each partner whose results were found.

Losses are in nats per token. Differences are paired over the validation documents, which both models read.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from fidelity_bounds import bounds_part, full_condition, quarter_condition
from fidelity_results import MODELS, Partner, Result
from timing import markdown_table

from demo.findings import table
from demo.intervals import mean_of, paired
from emo_megatron.report.rows import CHOSEN, EMO, QUARTER, RANDOM, SMALL, STANDARD, find_summary, summarise
from emo_megatron.report.table import MISSING, share, signed


def page(result: Result, partners: Mapping[str, Partner]) -> str:
    """The whole page, in Markdown."""
    parts = [
        f"# Fidelity: {result.model}",
        _status(result),
        "\n".join(f"- {name}: {value}" for name, value in result.machine.items()),
        "## Training\n\n" + _training(result),
    ]
    if result.nats:
        parts.append("## Validation loss\n\n" + _losses(result))
    if any(row.method == CHOSEN for row in result.rows):
        parts.append("## With fewer experts\n\n" + _fewer(result))
    together = {result.model: result} | {
        model: partner.result
        for model, partner in partners.items()
        if model != result.model and not partner.differing and partner.result.nats
    }
    parts.append("## Compared\n\n" + _compared(result, partners, together))
    parts.append("## Bounds\n\n" + bounds_part(together))
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _status(result: Result) -> str:
    done = ", ".join(result.stages) or "nothing"
    text = f"Finished: {done}." if result.is_finished else f"**Not finished.** Done so far: {done}."
    return "\n\n".join([text, *(f"Note: {note}" for note in result.notes)])


def _training(result: Result) -> str:
    size, plan = result.settings["size"], result.plan
    speed = (
        f"{result.tokens_per_second:,.0f} tokens/s"
        if result.tokens_per_second
        else "tokens/s: not measured (reported only for training on a GPU, after its end)"
    )
    experts = size["experts"] // (4 if result.model == SMALL else 1)
    lines = [
        f"{size['layers']} layers of width {size['hidden']}, {size['heads']} heads; {experts} routed experts of "
        f"{size['expert_hidden']} and a shared one of {size['shared_hidden']}, top-{size['top_k']}; seed "
        f"{result.settings['seed']}",
        f"{size['steps']} steps of {size['rows']} x {size['seq_length']} tokens, "
        f"{result.settings['tokens']:,} tokens, {result.corpus['epochs']:.2f} times the text; "
        f"planned by {plan['by']}: {plan['planned_steps']} steps",
        f"{plan['seconds']:.0f} s available; a step took {plan['step_seconds']:.3f} s, after a start-up of "
        f"{plan['startup_seconds']:.0f} s ({plan['probe_steps']} steps were measured)",
        speed,
        f"text: {len(result.corpus['domains'])} domains, {result.corpus['train_tokens']:,} training tokens, "
        f"vocabulary {result.corpus['vocab_size']}, hash {result.settings['corpus']}",
    ]
    lines += [
        f"training loss at step {iteration}: {loss:.3f}" for iteration, loss in result.curve[-1:] if loss is not None
    ]
    return "\n".join(f"- {line}" for line in lines)


def losses_of(result: Result, name: str) -> dict[str, float]:
    """Domain -> loss of a condition."""
    return {domain: sum(nats) / sum(result.document_tokens[domain]) for domain, nats in result.nats[name].items()}


def _losses(result: Result) -> str:
    full = losses_of(result, full_condition(result))
    rows = [
        [
            domain,
            str(len(result.document_tokens[domain])),
            f"{sum(result.document_tokens[domain]):,.0f}",
            f"{result.early[domain]:.4f}" if result.early else MISSING,
            f"{loss:.4f}",
        ]
        for domain, loss in full.items()
    ]
    early = f"{fmean(result.early.values()):.4f}" if result.early else MISSING
    rows.append(["mean", "", "", early, f"{fmean(full.values()):.4f}"])
    head = ["domain", "documents", "tokens", f"at {result.plan['early']:.0%} of the steps", "at the end"]
    return markdown_table(head, rows)


def _fewer(result: Result) -> str:
    summaries = summarise(result.rows)
    lines = []
    for chosen in (s for s in summaries if s.method == CHOSEN):
        chance = find_summary(summaries, model=result.model, method=RANDOM, keep_fraction=chosen.keep_fraction)
        elsewhere = chosen.loss_increase_on_others
        lines.append(
            [
                f"{chosen.num_experts_kept} ({share(chosen.keep_fraction)})",
                f"{chosen.loss:.4f} ({signed(chosen.loss_increase)})",
                f"{chance.loss:.4f} ({signed(chance.loss_increase)})" if chance else MISSING,
                MISSING if elsewhere is None else signed(elsewhere),
            ]
        )
    head = ["experts kept", "chosen for the domain", "random", "increase on other domains"]
    return "Loss, and in brackets its increase over all experts; means over domains.\n\n" + markdown_table(head, lines)


def _compared(result: Result, partners: Mapping[str, Partner], together: Mapping[str, Result]) -> str:
    """The comparison of models, and why a model is left out."""
    lines = []
    for model in MODELS:
        if model == result.model:
            continue
        partner = partners.get(model)
        if partner is None:
            lines.append(f"- {model}: partner not found: run gpu.sh C {model}")
        elif partner.differing:
            lines.append(f"- {model}: not compared with {partner.place}: {'; '.join(partner.differing)}")
        elif not partner.result.nats:
            lines.append(f"- {model}: not compared: {partner.place} ended before its losses")
        else:
            size = partner.result.settings["size"]
            lines.append(
                f"- {model}: {partner.place}, {size['steps']} steps, "
                f"{partner.result.settings['tokens']:,} tokens, as here"
            )
    parts = ["\n".join(lines)]
    if result.nats and len(together) > 1:
        parts += [_gap(together), _quarter(together), _table(together)]
    return "\n\n".join(part for part in parts if part)


def _gap(together: Mapping[str, Result]) -> str:
    """EMO's full model against the standard model."""
    if not {EMO, STANDARD} <= together.keys():
        return ""
    emo, standard = together[EMO], together[STANDARD]
    gaps = paired(emo.nats[full_condition(emo)], standard.nats[full_condition(standard)], emo.document_tokens)
    rows = [[domain, str(gap)] for domain, gap in gaps.items()]
    rows.append(["mean", str(mean_of(gaps))])
    head = ["domain", "EMO minus standard"]
    return "All experts, nats per token, paired over documents, with standard errors:\n\n" + markdown_table(head, rows)


def _quarter(together: Mapping[str, Result]) -> str:
    """EMO's quarter against the small model."""
    if not {EMO, SMALL} <= together.keys():
        return ""
    emo, small = together[EMO], together[SMALL]
    quarter = quarter_condition(emo)
    if quarter is None:
        return "EMO's quarter against the small model: the quarter is not measured yet."
    found = mean_of(paired(emo.nats[quarter], small.nats[full_condition(small)], emo.document_tokens))
    kept = next(row.num_experts_kept for row in emo.rows if row.keep_fraction == QUARTER)
    return f"EMO's quarter, {kept} experts chosen for the domain, minus the small model trained from scratch: {found}."


def _table(together: Mapping[str, Result]) -> str:
    """The demo's table of all measured models."""
    rows = [row for result in together.values() for row in result.rows]
    return f"```\n{table(rows)}\n```"
