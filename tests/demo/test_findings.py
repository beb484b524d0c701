"""The demo's findings, table and figure, on rows whose means can be worked out by hand."""

import builtins
import dataclasses
import json
import math
import struct
import sys
from pathlib import Path
from statistics import fmean

import pytest
from support import made_up
from support.rows import row

from demo import recipe
from demo.figure import plot_retention
from demo.findings import findings, main, table
from demo.losses import Measured
from emo_megatron.report.rows import RetentionRow, load_rows


def measured(**changes: float) -> list[RetentionRow]:
    """A run of two domains that bears out every finding, unless a number of it is changed."""
    numbers = {
        # dyadic, so that bounds are met exactly
        "emo": 0.125,
        "standard": 0.375,
        "emo_eighth": 0.25,
        "standard_eighth": 0.5,
        "random": 0.25,
        "elsewhere": 0.25,
        "emo_full": 3.05,
        "small": 3.5,
    } | changes
    rows = []
    for domain, other in (("a", "b"), ("b", "a")):
        emo = {"domain": domain, "full_loss": numbers["emo_full"]}
        rows += [
            row("emo", "full", 1.0, 0.0, **emo),
            row("emo", "mean_prob", 0.25, numbers["emo"], **emo),
            row("emo", "mean_prob", 0.25, numbers["elsewhere"], evaluated_on=other, **emo),
            row("emo", "mean_prob", 0.125, numbers["emo_eighth"], **emo),
            row("emo", "random", 0.25, numbers["random"], **emo),
            row("standard", "full", 1.0, 0.0, domain=domain),
            row("standard", "mean_prob", 0.25, numbers["standard"], domain=domain),
            row("standard", "mean_prob", 0.125, numbers["standard_eighth"], domain=domain),
            row("small", "full", 1.0, 0.0, domain=domain, full_loss=numbers["small"]),
        ]
    return rows


def losses(rows: list[RetentionRow]) -> dict[str, Measured]:
    """Two documents of each domain, whose losses differ and whose mean is the row's."""
    found: dict[str, Measured] = {}
    for model in {r.model for r in rows}:
        own = [r for r in rows if r.model == model and r.is_own]
        others = [r.loss_increase for r in rows if r.model == model and not r.is_own]
        nats: dict[tuple[str, float], dict[str, list[float]]] = {}
        for r in own:
            condition = nats.setdefault((r.method, r.keep_fraction), {})
            condition[r.evaluated_on] = [100 * 1.3 * r.loss, 300 * 0.9 * r.loss]
        found[model] = Measured(
            tokens={r.evaluated_on: [100, 300] for r in own},
            nats=nats,
            increase_on_others=fmean(others) if others else None,
        )
    return found


BREAKS = {
    "quarter_increase": {"emo": 0.1251},
    "eighth_increase": {"emo_eighth": 0.2501},
    "choice_matters": {"random": 0.2499},
    "quarter_is_selective": {"elsewhere": 0.2499},
}
REPORTS = {"full_models", "quarter_and_small"}


def test_findings_hold() -> None:
    found = {finding.name: finding for finding in findings(losses(measured()))}
    assert found.keys() == {*BREAKS, *REPORTS}
    # the bounds are met exactly but for rounding
    eased = {finding.name: finding for finding in findings(losses(measured(emo=0.1249, emo_eighth=0.2499)))}
    assert {name for name in BREAKS if eased[name].holds} == set(BREAKS)
    numbers = {name: (finding.value, finding.bound) for name, finding in found.items()}
    assert numbers["quarter_increase"] == pytest.approx((0.125, 0.125))
    assert numbers["eighth_increase"] == pytest.approx((0.25, 0.25))
    assert numbers["choice_matters"] == pytest.approx((0.25, 0.25))
    assert numbers["quarter_is_selective"] == pytest.approx((0.25, 0.25))


def test_findings_without_a_bound_report_a_number_with_its_error() -> None:
    found = {finding.name: finding for finding in findings(losses(measured()))}
    for name, value in {"full_models": 0.05, "quarter_and_small": 3.175 - 3.5}.items():
        assert found[name].value == pytest.approx(value)
        assert found[name].bound is found[name].holds is None
        assert found[name].mark.isspace()
    # of two documents whose losses are 1.3 and .9 times the mean; and of the mean of two domains
    error = math.sqrt(2 * 2 * (100 * 0.3 * 0.05) ** 2) / 400 / math.sqrt(2)
    assert f"+0.050 ± {error:.3f}" in found["full_models"].text


@pytest.mark.parametrize("name", BREAKS)
def test_findings_fail(name: str) -> None:
    found = {finding.name: finding for finding in findings(losses(measured(**BREAKS[name])))}
    assert found[name].holds is False
    assert found[name].mark.strip() == "NO"


def test_findings_of_models_that_lose_nothing() -> None:
    # twice a gain, or a third of one, would be bounds that reward a loss
    better = {f.name: f for f in findings(losses(measured(emo=-0.02, standard=-0.5)))}
    assert better["quarter_increase"].holds
    assert better["quarter_increase"].bound == 0.0
    worse = {f.name: f for f in findings(losses(measured(emo=0.001, standard=-0.5)))}
    assert worse["quarter_increase"].holds is False
    random = {f.name: f for f in findings(losses(measured(emo=-0.02, random=-0.05)))}
    assert random["choice_matters"].holds is False
    others = {f.name: f for f in findings(losses(measured(emo=-0.02, elsewhere=-0.03)))}
    assert others["quarter_is_selective"].holds is False


@pytest.mark.parametrize(
    ("left_out", "missing"),
    [
        (lambda r: r.model == "standard", {"quarter_increase", "eighth_increase", "full_models"}),
        (lambda r: r.keep_fraction == 0.125, {"eighth_increase"}),
        (lambda r: r.model == "small", {"quarter_and_small"}),
        (lambda r: r.method == "random", {"choice_matters"}),
        (lambda r: r.domain != r.evaluated_on, {"quarter_is_selective"}),
        (lambda r: True, {*BREAKS, *REPORTS}),
    ],
)
def test_findings_leave_out_what_was_not_measured(left_out, missing: set[str]) -> None:
    found = findings(losses([r for r in measured() if not left_out(r)]))
    assert {finding.name for finding in found} == {*BREAKS, *REPORTS} - missing


def test_losses_of_different_documents_are_not_subtracted() -> None:
    found = losses(measured())
    other = dataclasses.replace(found["standard"], tokens={"a": [300, 100], "b": [100, 300]})
    with pytest.raises(ValueError, match="documents"):
        findings(found | {"standard": other})


def test_table() -> None:
    lines = table(measured()).splitlines()
    assert [line.split()[2:] for line in lines[3:6]] == [
        ["3.050", "3.000", "-", "-", "-"],
        ["3.175", "(+0.125)", "3.375", "(+0.375)", "3.500", "3.300", "(+0.250)", "+0.125"],
        ["3.300", "(+0.250)", "3.500", "(+0.500)", "-", "-", "-"],
    ]
    kept = [line.split()[:2] for line in lines[3:6]]
    assert kept == [["32", "(all)"], ["8", "(1/4)"], ["4", "(1/8)"]]
    assert len({len(line) for line in lines[2:6]}) == 1
    assert "lower is better" in table(measured())


def test_a_rise_that_rounds_to_zero_has_no_minus() -> None:
    rows = measured(emo=-1e-5)
    assert "3.050 (+0.000)" in table(rows)
    assert "+0.000 ± 0.000" in next(f.text for f in findings(losses(rows)) if f.name == "quarter_increase")
    assert "(-0.001)" in table(measured(emo=-0.001))


def test_table_without_most_of_the_numbers() -> None:
    small = [row("small", "full", 1.0, 0.0)]
    assert "8 (all)" in table(small)
    assert "3.500" in table(small)
    # the small model has a line of its own if nothing else keeps as many experts
    lines = table([row("emo", "full", 1.0, 0.0), *small]).splitlines()
    assert lines[4].split() == ["8", "(1/4)", "-", "-", "3.500", "-", "-"]
    assert table([])


def png_size(path: Path) -> tuple[int, ...]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    empty = plot_retention([], tmp_path / "empty.png")
    full = plot_retention(measured(), tmp_path / "new" / "retention.png", caption="emo, 2 domains, commit abc")
    assert full == tmp_path / "new" / "retention.png"
    assert list(full.parent.iterdir()) == [full]
    assert png_size(full) == png_size(empty) == (1600, 650)
    assert full.stat().st_size > empty.stat().st_size


@pytest.mark.parametrize(
    "is_kept",
    [
        lambda r: r.model == "emo",
        lambda r: r.model == "small",
        lambda r: r.method == "full",
        lambda r: r.domain == r.evaluated_on,
        lambda r: r.keep_fraction != 0.25,
        lambda r: r.domain == "a",
    ],
)
def test_plot_of_a_part(tmp_path: Path, is_kept) -> None:
    pytest.importorskip("matplotlib")
    rows = [r for r in measured() if is_kept(r)]
    assert png_size(plot_retention(rows, tmp_path / "part.png")) == (1600, 650)


def test_plot_of_many_domains_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    module = pytest.importorskip("matplotlib.figure")
    save = module.Figure.savefig
    monkeypatch.setattr(module.Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    names = [f"a-domain-{number:03}" for number in range(14)]
    rows = [row("emo", "mean_prob", 0.25, 0.125, domain=a, evaluated_on=b) for a in names for b in names]
    for name in names:
        rows += [row(model, "full", 1.0, 0.0, domain=name) for model in ("emo", "standard", "small")]
        rows.append(row("standard", "mean_prob", 0.25, 0.625, domain=name))
    plot_retention(rows, tmp_path / "many.png", caption="the caption")
    (figure,) = figures
    left, right = figure.axes
    (colours,) = right.child_axes
    caption = next(text for text in figure.texts if text.get_text() == "the caption")
    for part in (left, right, colours):
        box, whole = part.get_tightbbox(), figure.bbox
        assert whole.x0 <= box.x0 < box.x1 <= whole.x1, part
        assert caption.get_window_extent().y1 <= box.y0 < box.y1 <= whole.y1, part
    assert left.get_tightbbox().x1 <= right.get_tightbbox().x0


def test_plot_draws_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    module = pytest.importorskip("matplotlib.figure")
    monkeypatch.setattr(module.Figure, "savefig", lambda self, path, **_: figures.append(self))
    monkeypatch.setattr(Path, "replace", lambda self, target: target)
    rows = [
        *measured(),
        row("emo", "mean_prob", 0.125, 9.0, evaluated_on="b"),
        row("emo", "mean_prob", 0.25, 1.5, domain="b", evaluated_on="a", seed=1),
    ]
    plot_retention(rows, tmp_path / "retention.png", caption="the caption")
    curves, crossings = figures[0].axes
    means = [line for line in curves.lines if line.get_marker() == "o"]
    assert [list(line.get_xdata()) for line in means] == [[0.125, 0.25, 1.0]] * 2
    assert means[0].get_ydata() == pytest.approx([3.5, 3.375, 3.0])
    assert means[1].get_ydata() == pytest.approx([3.3, 3.175, 3.05])
    dashed = [line for line in curves.lines if line.get_linestyle() == "--"]
    assert [list(line.get_xdata()) for line in dashed] == [[0.25, 1.0]]
    # "all" is on the left
    assert curves.get_xlim()[0] > curves.get_xlim()[1]
    assert crossings.images[0].get_array().tolist() == [[0.125, 0.25], [0.875, 0.125]]
    texts = [text.get_text() for text in (*figures[0].texts, *crossings.texts)]
    assert "the caption" in texts
    assert [texts.count(number) for number in ("0.12", "0.25", "0.88")] == [2, 1, 1]
    assert "EMO loses 0.12 nats per token, a standard MoE 0.38" in texts[0]


def test_plot_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'emo_megatron\[report\]'"):
        plot_retention(measured(), tmp_path / "retention.png")


def test_every_model_has_its_own_seed_in_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    models = ["emo", "standard", "small", "emo-seed2"]
    (tmp_path / "demo.json").write_text(json.dumps({"size": dataclasses.asdict(recipe.FULL), "seed": 5}))
    for model in models:
        path = tmp_path / model / "losses" / "measured.json"
        path.parent.mkdir(parents=True)
        kind = model.partition("-")[0]
        path.write_text(json.dumps([made_up.row(kind, d, d, "full", 8, 8) for d in made_up.DOMAINS]))
    monkeypatch.setattr(sys, "argv", ["findings", str(tmp_path), *models])
    main()
    assert {(r.model, r.seed) for r in load_rows(tmp_path / "retention.json")} == {
        *((model, 5) for model in models[:3]),
        ("emo-seed2", 6),
    }
    said = capsys.readouterr().out
    assert "With all experts" in said
    assert "yes" not in said
