"""Methods side by side: smallest sizes by hand, tables that never show a loss increase alone, and the figure."""

from __future__ import annotations

import struct

import pytest

from emo_megatron.experts.select import MaxLossIncrease
from emo_megatron.report.figure import plot_methods
from emo_megatron.report.rows import rows_of
from emo_megatron.report.table import find_smallest_sizes, full_report, methods_table, smallest_sizes_table

FULL_LOSS = {"a": 2.0, "b": 4.0}
# domain -> method -> rise with 16, 8 and 4 of 32 experts
RISES = {
    "a": {"mean_prob": (0.01, 0.05, 0.5), "reap": (0.2, 0.05, 0.6), "random": (1.0, 2.0, 3.0)},
    "b": {"mean_prob": (0.01, 0.09, 0.3), "reap": (0.2, 0.05, 0.6), "random": (1.5, 2.5, 3.5)},
}


def measured():
    """What the command keeps of two domains, each module tried on the other, too."""
    rows = []
    for domain, other in (("a", "b"), ("b", "a")):
        rows.append(row(domain, domain, "full", 32, FULL_LOSS[domain]))
        for method, rises in RISES[domain].items():
            for kept, rise in zip((16, 8, 4), rises, strict=True):
                rows.append(row(domain, domain, method, kept, FULL_LOSS[domain] + rise))
                if method == "mean_prob":
                    rows.append(row(domain, other, method, kept, FULL_LOSS[other] + rise + 0.75))
    return rows


def row(domain, evaluated_on, method, kept, loss):
    return {
        "domain": domain,
        "evaluated_on": evaluated_on,
        "method": method,
        "keep_fraction": kept / 32,
        "num_experts_kept": kept,
        "loss": loss,
        "tokens": 100,
        "origin": "0" * 16,
    }


@pytest.fixture
def rows():
    return rows_of(measured(), model="emo", seed=3, versions="test")


def test_rows_get_their_rises(rows):
    found = {(r.domain, r.evaluated_on, r.method, r.num_experts_kept): r.loss_increase for r in rows}
    assert found["a", "a", "full", 32] == 0
    # against the full loss of the text, not of the domain that chose
    assert found["a", "b", "mean_prob", 8] == pytest.approx(0.8)
    assert {(r.model, r.seed, r.versions) for r in rows} == {("emo", 3, "test")}
    without = [r for r in measured() if (r["evaluated_on"], r["method"]) != ("a", "full")]
    assert {r.evaluated_on for r in rows_of(without, model="m", seed=0, versions="")} == {"b"}


def test_cliffs_by_hand(rows):
    found = {(c.domain, c.method): c for c in find_smallest_sizes(rows, MaxLossIncrease(value=0.1, is_share=False))}
    assert len(found) == 3 * 3
    mean = found[None, "mean_prob"]
    assert (mean.size.num_experts_kept, mean.size.keep_fraction) == (8, 0.25)
    assert (mean.size.loss, mean.size.loss_increase) == (pytest.approx(3.07), pytest.approx(0.07))
    # reap is within the bound again with 8 experts, but was out of it with 16
    assert found[None, "reap"].size.num_experts_kept == 32
    assert found["a", "random"].size.loss_increase == 0
    assert not any(c.is_smallest_measured for c in found.values())
    assert {c.model for c in found.values()} == {"emo"}


def test_a_bound_may_be_a_share_of_the_loss_and_may_hold_everywhere(rows):
    def kept(value):
        found = find_smallest_sizes(rows, MaxLossIncrease(value=value, is_share=True))
        return {c.domain: c.size.num_experts_kept for c in found if c.method == "mean_prob"}

    # 2.4 % of 2 nats are .048, of 4 nats .096
    assert kept(0.024) == {None: 8, "a": 16, "b": 8}
    (widest,) = [
        c
        for c in find_smallest_sizes(rows, MaxLossIncrease(value=1.0, is_share=True))
        if (c.domain, c.method) == ("b", "mean_prob")
    ]
    assert widest.size.num_experts_kept == 4
    assert widest.is_smallest_measured
    assert "4 (1/8) or fewer" in smallest_sizes_table([widest], MaxLossIncrease(value=1.0, is_share=True))


def test_beside_every_rise_stand_loss_random_experts_and_selectivity(rows):
    lines = methods_table(rows).splitlines()
    assert [line.split() for line in lines[3:6]] == [
        ["emo", "32", "(all)", "-", "3.000", "-", "-", "-"],
        ["emo", "16", "(1/2)", "mean_prob", "3.010", "+0.010", "4.250", "(+1.250)", "+0.750"],
        ["emo", "16", "(1/2)", "reap", "3.200", "+0.200", "4.250", "(+1.250)", "-"],
    ]
    assert len(lines) == 3 + 1 + 3 * 2
    report = full_report(rows, MaxLossIncrease.parse("5%"))
    assert "Fewest experts within 5.0% of the loss" in report
    own = report[report.index("Domain b") :]
    assert "4.090 +0.090 6.500 (+2.500) +0.750" in " ".join(own.split())


def test_random_experts_alone_are_shown_too(rows):
    alone = [r for r in rows if r.method in ("full", "random")]
    assert sum(" random " in line for line in methods_table(alone).splitlines()[2:]) == 3


@pytest.mark.parametrize("models", [("emo",), ("emo", "standard", "other")])
def test_the_figure_is_drawn(tmp_path, models):
    rows = [r for m in models for r in rows_of(measured(), model=m, seed=0, versions="test")]
    bound = MaxLossIncrease.parse("5%")
    path = plot_methods(rows, tmp_path / "deep" / "m.png", caption="test", bound=bound)
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", head[16:24])[0] == round(max(2, len(models)) * 5.6 * 120)
    assert [p.name for p in path.parent.iterdir()] == ["m.png"]
