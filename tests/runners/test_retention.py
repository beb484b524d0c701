"""What is measured with fewer experts, and that a second call measures what is missing; on a made-up model."""

from __future__ import annotations

import dataclasses
import json

import pytest
from support import experts

from emo_megatron.commands.retention_options import DomainFiles, RetentionOptions, domain_files
from emo_megatron.finite import NotFiniteError
from emo_megatron.runners.retention import FULL, check_output, conditions, measure_retention, read_rows

METHODS = ("mean_prob", "frequency", "layerwise", "easy_ep", "reap")


@pytest.fixture
def texts(tmp_path):
    """Two folders with files of three domains; the reader below makes documents of their names."""
    for split in ("calibration", "held-out"):
        (tmp_path / split).mkdir()
        for domain in ("a", "b", "c"):
            (tmp_path / split / f"{domain}.jsonl").touch()
    return tmp_path


def options(texts, **changes):
    fields = {
        "checkpoint": texts / "checkpoint",
        "data": texts / "calibration",
        "held_out": texts / "held-out",
        "output": texts / "out",
        "keep": ("5", "3"),
    }
    return RetentionOptions(**fields | changes)


def read(path, calibration):
    return experts.documents(3, name=f"{path.parent.name}-{path.stem}")


class CountingModel(experts.MadeUpModel):
    """A model whose loss tells the experts, and that notes what it was asked."""

    def __init__(self, **changes):
        super().__init__(lambda kept: 4.0 - kept / 8, **changes)
        self.losses = []

    def loss(self, documents, *, allowed_LE=None):
        kept = None if allowed_LE is None else tuple(map(tuple, allowed_LE.tolist()))
        self.losses.append(kept)
        return super().loss(documents, allowed_LE=allowed_LE)


def test_conditions_by_hand():
    rows = conditions(
        ["a", "b", "c"], num_experts=8, methods=["mean_prob", "reap"], kept=[4, 2], crossed=[2], elsewhere=1
    )
    keys = [row.key for row in rows]
    assert keys[:3] == ["a|a|8|full", "b|b|8|full", "c|c|8|full"]
    assert keys[3:9] == [f"{d}|{d}|{k}|random" for k in (4, 2) for d in "abc"]
    assert keys[9:12] == ["a|a|4|mean_prob", "a|a|2|mean_prob", "a|b|2|mean_prob"]
    # the last domain goes on to the first
    assert keys[-1] == "c|a|2|reap"
    assert len(keys) == len(set(keys)) == 3 + 6 + 3 * 2 * 3
    everywhere = conditions(["a", "b", "c"], num_experts=8, methods=["reap"], kept=[2], crossed=[2])
    assert [r.key for r in everywhere if r.domain == "b" and r.method == "reap"] == [
        "b|b|2|reap",
        "b|c|2|reap",
        "b|a|2|reap",
    ]
    (whole,) = conditions(["a"], num_experts=8, methods=["reap"], kept=[], crossed=[])
    assert (whole.method, whole.num_kept) == (FULL, 8)


def test_every_method_is_measured_with_its_own_experts(texts):
    model = CountingModel()
    chosen = options(texts, methods=METHODS, keep=("5",), elsewhere=0)
    measure_retention(chosen, model=model, read=read)
    rows = read_rows(chosen.rows_file)
    assert len(rows) == len(model.losses) == 3 * 7
    assert {row["method"] for row in rows} == {FULL, "random", *METHODS}
    # four routed experts and the shared one
    (row,) = [r for r in rows if (r["method"], r["domain"]) == ("reap", "b")]
    assert (row["num_experts_kept"], row["keep_fraction"]) == (4, 0.5)
    assert (row["loss"], row["tokens"], row["evaluated_on"]) == (3.5, 10, "b")
    kept = {row["method"]: mask for row, mask in zip(rows, model.losses, strict=True)}
    assert kept[FULL] is None
    # the made-up model scores frequency like probability, and outputs the other way round
    assert kept["mean_prob"] == kept["frequency"]
    assert len({kept[m] for m in ("mean_prob", "layerwise", "reap", "random")}) == 4
    assert len(list((texts / "out" / "stats").iterdir())) == 3


def test_an_interrupted_measurement_goes_on_and_gives_the_same(texts):
    whole = options(texts, output=texts / "whole")
    measure_retention(whole, model=CountingModel(), read=read)
    part = options(texts)
    with pytest.raises(KeyboardInterrupt):
        # statistics of the third domain
        measure_retention(part, model=CountingModel(fails_at=2), read=read)
    done = read_rows(part.rows_file)
    assert 0 < len(done) < len(read_rows(whole.rows_file))
    model = CountingModel()
    measure_retention(part, model=model, read=read)
    assert json.loads(part.rows_file.read_text()) == json.loads(whole.rows_file.read_text())
    assert len(model.losses) == len(read_rows(whole.rows_file)) - len(done)
    # more is added; what is there stays
    more = dataclasses.replace(part, methods=("mean_prob", "frequency"))
    again = CountingModel()
    measure_retention(more, model=again, read=read)
    assert len(again.losses) == 3 * 2 * 3
    assert again.seen == []


def test_a_rank_is_told_which_rows_there_are(texts):
    chosen = options(texts, keep=("5",), elsewhere=0)
    measure_retention(chosen, model=CountingModel(), read=read)
    rows = json.loads(chosen.rows_file.read_text())
    missing = rows.pop("b|b|4|mean_prob")
    elsewhere = dataclasses.replace(chosen, output=texts / "elsewhere")
    # the rows but one, and no statistics
    other = experts.OtherRank(rows, None)
    measure_retention(elsewhere, model=other, read=read)
    assert other.num_losses == 1
    assert rows["b|b|4|mean_prob"]["domain"] == missing["domain"]
    assert not elsewhere.output.exists()


@pytest.mark.parametrize("stored", ["[1]", '{"a": 1}', "{"])
def test_an_output_that_rows_cannot_be_added_to_is_refused(texts, stored):
    chosen = options(texts)
    chosen.output.mkdir()
    check_output(chosen)
    chosen.rows_file.write_text(stored)
    with pytest.raises(ValueError, match=r"rows\.json.*remove it"):
        check_output(chosen)
    with pytest.raises(ValueError, match=r"--output must be a folder; .*rows\.json is a file"):
        check_output(dataclasses.replace(chosen, output=chosen.rows_file))


@pytest.mark.parametrize("loss", ["NaN", "Infinity", "1e999", "null", '"3.2"', "true"])
def test_rows_without_a_finite_loss_are_refused_by_name(texts, loss):
    chosen = options(texts, elsewhere=0)
    measure_retention(chosen, model=CountingModel(), read=read)
    rows = json.loads(chosen.rows_file.read_text())
    rows["b|b|8|full"]["loss"] = "HERE"
    chosen.rows_file.write_text(json.dumps(rows).replace('"HERE"', loss))
    for look in (
        lambda: read_rows(chosen.rows_file),
        lambda: check_output(chosen),
        lambda: measure_retention(chosen, model=CountingModel(), read=read),
    ):
        with pytest.raises(ValueError, match=r"rows\.json.*b\|b\|8\|full(: |\.)loss "):
            look()
    del rows["b|b|8|full"]["loss"]
    chosen.rows_file.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"b\|b\|8\|full lacks loss"):
        read_rows(chosen.rows_file)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_no_row(texts, value):
    chosen = options(texts, elsewhere=0)
    with pytest.raises(NotFiniteError, match=f"got {value}"):
        measure_retention(chosen, model=experts.MadeUpModel(lambda kept: value), read=read)
    assert not chosen.rows_file.exists()
    # where modules alone are not finite, what was measured before stays
    model = experts.MadeUpModel(lambda kept: 3.0 if kept > 4 else value)
    with pytest.raises(NotFiniteError, match=f"got {value}"):
        measure_retention(chosen, model=model, read=read)
    assert [row["method"] for row in read_rows(chosen.rows_file)] == ["full"] * 3


def test_rows_of_something_else_are_refused(texts):
    first = options(texts, elsewhere=0)
    measure_retention(first, model=CountingModel(), read=read)
    before = first.rows_file.read_bytes()
    other = CountingModel(facts=dataclasses.replace(experts.FACTS, fingerprint="beef"))
    for changes, model in (
        ({}, other),
        ({"seed": 1}, CountingModel()),
        ({"seq_length": 7}, CountingModel()),
        ({"checkpoint": texts / "tuned"}, CountingModel()),
        ({}, CountingModel(setting=dataclasses.replace(experts.SETTING, megatron="--x 1"))),
    ):
        with pytest.raises(ValueError, match=r"another model, other text, another seed or .*--output"):
            measure_retention(dataclasses.replace(first, **changes), model=model, read=read)
        assert model.losses == []
    with pytest.raises(ValueError, match="another model, other text"):
        measure_retention(
            first, model=CountingModel(), read=lambda path, calibration: experts.documents(3, name=path.stem)
        )
    assert first.rows_file.read_bytes() == before
    first.rows_file.write_text("[1]")
    with pytest.raises(ValueError, match=r"rows\.json.*remove it"):
        measure_retention(first, model=CountingModel(), read=read)


@pytest.mark.parametrize("size", ["10", "2", "5%", "many"])
def test_impossible_sizes_are_refused_before_anything_is_measured(texts, size):
    model = CountingModel()
    with pytest.raises(ValueError, match="--keep must"):
        measure_retention(options(texts, keep=("5", size)), model=model, read=read)
    assert model.losses == model.seen == []
    assert not (texts / "out").exists()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"methods": ("best",)}, "--methods must be of mean_prob.*got best"),
        ({"methods": ()}, "--methods must name"),
        ({"cross": ("25%",)}, "--cross must be sizes of --keep.*25%"),
        ({"elsewhere": -1}, "--elsewhere must be 0 or more; got -1"),
        ({"max_rise": "some"}, "--max-rise must be"),
        ({"max_rise": "nan%"}, "--max-rise must be"),
        ({"name": " "}, "--name must"),
        ({"rows": 0}, "--rows must be 1 or more"),
    ],
)
def test_options_that_cannot_be(texts, changes, what):
    with pytest.raises(ValueError, match=what):
        options(texts, **changes)


def test_text_that_chose_the_experts_is_not_held_out(texts):
    with pytest.raises(ValueError, match="not --data"):
        options(texts, held_out=texts / "calibration")


def test_domains_are_files_of_the_same_names(texts):
    data, held_out = texts / "calibration", texts / "held-out"
    assert list(domain_files(data, held_out)) == ["a", "b", "c"]
    one = domain_files(data / "a.jsonl", held_out / "b.jsonl")
    assert one == {"a": DomainFiles(calibration=data / "a.jsonl", held_out=held_out / "b.jsonl")}
    (held_out / "d.idx").touch()
    with pytest.raises(ValueError, match=r"same names; only one of .* has d$"):
        domain_files(data, held_out)
    (data / "d.safetensors").touch()
    # an indexed dataset goes by its prefix
    assert domain_files(data, held_out)["d"].held_out == held_out / "d"
    (data / "a.safetensors").touch()
    with pytest.raises(ValueError, match="two files of the domain a"):
        domain_files(data, held_out)
    with pytest.raises(ValueError, match="two files or two folders"):
        domain_files(data, held_out / "a.jsonl")
    (texts / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no \.jsonl"):
        domain_files(texts / "empty", held_out)
