"""Rows of retention: means that can be worked out by hand, files that come back, files that are refused."""

import csv
import dataclasses
import json
from pathlib import Path

import pytest
from support.rows import row

from emo_megatron.report import rows as retention
from emo_megatron.report.rows import RetentionRow, RetentionSummary

MEASURED = [row("emo", "full", 1.0, 0.0), row("emo", "mean_prob", 0.25, 0.125, evaluated_on="b")]


def test_summarise_by_hand() -> None:
    rows = [
        row("emo", "mean_prob", 0.25, 0.1, domain="a"),
        row("emo", "mean_prob", 0.25, 0.3, domain="b"),
        row("emo", "mean_prob", 0.25, 1.0, domain="a", evaluated_on="b"),
        row("emo", "mean_prob", 0.25, 2.0, domain="b", evaluated_on="a"),
        row("emo", "full", 1.0, 0.0, domain="a"),
    ]
    full, quarter = retention.summarise(rows)
    assert full == RetentionSummary(
        model="emo",
        method="full",
        keep_fraction=1.0,
        num_experts_kept=32,
        num_domains=1,
        loss=3.0,
        loss_increase=0.0,
        loss_increase_on_others=None,
    )
    assert full.selectivity is None
    assert (quarter.method, quarter.num_experts_kept, quarter.num_domains) == ("mean_prob", 8, 2)
    assert quarter.loss == pytest.approx(3.2)
    assert quarter.loss_increase == pytest.approx(0.2)
    assert quarter.loss_increase_on_others == pytest.approx(1.5)
    assert quarter.selectivity == pytest.approx(1.3)


def test_every_domain_counts_the_same() -> None:
    rows = [row("emo", "mean_prob", 0.5, 0.1, domain="a", seed=seed) for seed in range(3)]
    rows.append(row("emo", "mean_prob", 0.5, 0.5, domain="b"))
    (summary,) = retention.summarise(rows)
    assert summary.loss_increase == pytest.approx(0.3)


def test_random_experts_belong_to_no_domain() -> None:
    rows = [
        row("emo", "random", 0.5, 0.2, domain="a", evaluated_on="b"),
        row("emo", "random", 0.5, 0.4, domain="b", evaluated_on="b"),
        row("emo", "random", 0.5, 0.5, domain="", evaluated_on="c"),
    ]
    (summary,) = retention.summarise(rows)
    assert summary.num_domains == 2
    assert summary.loss_increase == pytest.approx((0.3 + 0.5) / 2)
    assert summary.selectivity is None


def test_summaries_are_sorted_and_need_a_domains_own_rows() -> None:
    rows = [
        row("standard", "mean_prob", 0.5, 0.1),
        row("emo", "mean_prob", 0.25, 0.1),
        row("emo", "mean_prob", 0.5, 0.1),
        row("emo", "mean_prob", 0.125, 0.1, evaluated_on="b"),
        row("emo", "full", 1.0, 0.0),
    ]
    got = [(s.model, s.method, s.keep_fraction) for s in retention.summarise(rows)]
    assert got == [
        ("emo", "full", 1.0),
        ("emo", "mean_prob", 0.5),
        ("emo", "mean_prob", 0.25),
        ("standard", "mean_prob", 0.5),
    ]
    assert retention.summarise([]) == []


@pytest.mark.parametrize("fraction", [0.0, -0.25, 1.5, float("nan")])
def test_bad_fraction(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"keep_fraction must "):
        dataclasses.replace(row("emo", "full", 1.0, 0.0), keep_fraction=fraction)


# numbers that no short decimal is exactly, and text that csv and json must quote
AWKWARD = dataclasses.replace(
    row("emo", "mean_prob", 1 / 3, 0.1 + 0.2), versions='a "quoted", é\nsecond line', domain=""
)


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_rows_survive_their_files(tmp_path: Path, suffix: str) -> None:
    rows = [*MEASURED, AWKWARD]
    paths = retention.save_rows(rows, tmp_path / "new" / "run.1")
    assert paths == (tmp_path / "new" / "run.1.csv", tmp_path / "new" / "run.1.json")
    assert retention.load_rows(tmp_path / "new" / f"run.1{suffix}") == rows
    # nothing unfinished stays, and a second write replaces the first
    assert sorted(tmp_path.glob("new/*")) == sorted(paths)
    retention.save_rows(rows[:1], tmp_path / "new" / "run.1")
    assert retention.load_rows(tmp_path / "new" / f"run.1{suffix}") == rows[:1]


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_files_of_earlier_releases_are_read(tmp_path: Path, suffix: str) -> None:
    """They call the column loss_increase rise; a file with both columns is an error."""
    rows = [row("emo", "mean_prob", 0.25, 0.5), row("emo", "full", 1.0, 0.0)]
    path = next(p for p in retention.save_rows(rows, tmp_path / "retention") if p.suffix == suffix)
    text = path.read_text()
    path.write_text(text.replace("loss_increase", "rise"))
    assert retention.load_rows(path) == rows
    records = [dataclasses.asdict(found) | {"rise": 0.5} for found in rows]
    (tmp_path / "both.json").write_text(json.dumps(records))
    with pytest.raises(ValueError, match=r"columns .*rise"):
        retention.load_rows(tmp_path / "both.json")


def test_no_rows_survive_their_files(tmp_path: Path) -> None:
    for path in retention.save_rows([], tmp_path / "retention"):
        assert retention.load_rows(path) == []


@pytest.mark.parametrize("suffix", [".csv", ".json"])
@pytest.mark.parametrize("column", ["loss", "loss_increase", "tokens", "seed", "keep_fraction"])
@pytest.mark.parametrize("value", ["nan", "-inf", "1e999", "many", ""])
def test_rows_with_a_number_that_is_none_are_refused_by_file_and_row(
    tmp_path: Path, suffix: str, column: str, value: str
) -> None:
    records = [dataclasses.asdict(row("emo", "full", 1.0, 0.0)) for _ in range(3)]
    records[1][column] = "HERE"
    path = tmp_path / f"rows{suffix}"
    if suffix == ".json":
        names = {"nan": "NaN", "-inf": "-Infinity", "1e999": "1e999"}
        path.write_text(json.dumps(records).replace('"HERE"', names.get(value, f'"{value}"')))
    else:
        records[1][column] = value
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, records[0])
            writer.writeheader()
            writer.writerows(records)
    with pytest.raises(ValueError, match=rf"rows\{suffix}.*(row 2: |\[1\]\.){column} "):
        retention.load_rows(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("column", ["loss", "loss_increase"])
def test_a_row_is_of_finite_numbers(column: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{column} must be a finite number; got {value}"):
        dataclasses.replace(row("emo", "full", 1.0, 0.0), **{column: value})


BAD = {
    "loss": ("2.5", None, True, [2.5], {}, 10**400),
    "num_experts_kept": ("4", 4.5, True, None, 10**30),
    "domain": (4, None, ["french"]),
    "evaluated_on": (0.5, {}),
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in BAD.items() for v in values])
def test_a_row_of_other_types_or_columns_is_told_with_its_place(field: str, value: object, tmp_path: Path) -> None:
    records, path = [dataclasses.asdict(row) for row in MEASURED], tmp_path / "rows.json"
    records[1][field] = value
    path.write_text(json.dumps(records))
    with pytest.raises(ValueError, match=rf"rows\.json, row 2: {field} must be"):
        retention.load_rows(path)
    # a column less and another one
    path.write_text(json.dumps(records).replace(f'"{field}"', '"other"'))
    with pytest.raises(ValueError, match=rf"rows\.json, .*{field}"):
        retention.load_rows(path)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("emo,french,french,0.25,4.5,mean_prob,2.5,0.5,100,1,some", "4.5"),
        ("emo,french,french,,4,mean_prob,2.5,0.5,100,1,some", "keep_fraction"),
        ("emo,french,french,0.25,4", "row 1"),
        ("emo,french,french,7,4,mean_prob,2.5,0.5,100,1,some", "keep_fraction"),
        ('emo,"french', "end of data"),
        ("emo,french,french,0.25,4,mean_prob,2.5,0.5,100,1,some,more", "None"),
    ],
)
def test_a_line_of_csv_is_told_with_its_place(line: str, what: str, tmp_path: Path) -> None:
    header = ",".join(field.name for field in dataclasses.fields(RetentionRow))
    (tmp_path / "a.csv").write_text(f"{header}\n{line}\n")
    with pytest.raises(ValueError, match=rf"a\.csv.*{what}"):
        retention.load_rows(tmp_path / "a.csv")


def test_files_with_other_endings_hold_no_rows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.csv or \.json"):
        retention.load_rows(tmp_path / "retention.txt")
