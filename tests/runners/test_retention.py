"""The command retention on a made-up model: what is measured with fewer experts, and that a second call goes on."""

from __future__ import annotations

import dataclasses
import json

import pytest
from support import experts

from emo_megatron.commands import retention
from emo_megatron.commands.retention import Options
from emo_megatron.finite import NotFiniteError
from emo_megatron.report.rows import FULL
from emo_megatron.runners.retention import conditions, domain_files

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
        "validation_data": texts / "held-out",
        "output": texts / "out",
        "keep": ("4 routed", "2 routed"),
    }
    return Options(**fields | changes)


def read(path, calibration):
    return experts.documents(3, name=f"{path.parent.name}-{path.stem}")


@pytest.fixture
def measure(texts, monkeypatch):
    """Runs the command on a model; returns what rows.json holds."""

    def run(model, *, read=read, **changes):
        experts.open_as(monkeypatch, model, read=read)
        chosen = options(texts, **changes)
        retention.run(chosen)
        return json.loads((chosen.output / "rows.json").read_text())["rows"]

    return run


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
        ["a", "b", "c"], num_experts=8, methods=["mean_prob", "reap"], kept=[4, 2], crossed=[2], num_other_domains=1
    )
    keys = ["|".join(map(str, (r.domain, r.evaluated_on, r.num_kept, r.method))) for r in rows]
    assert keys[:3] == ["a|a|8|full", "b|b|8|full", "c|c|8|full"]
    assert keys[3:9] == [f"{d}|{d}|{k}|random" for k in (4, 2) for d in "abc"]
    assert keys[9:12] == ["a|a|4|mean_prob", "a|a|2|mean_prob", "a|b|2|mean_prob"]
    # the last domain goes on to the first
    assert keys[-1] == "c|a|2|reap"
    assert len(keys) == len(set(keys)) == 3 + 6 + 3 * 2 * 3
    everywhere = conditions(["a", "b", "c"], num_experts=8, methods=["reap"], kept=[2], crossed=[2])
    assert [r.evaluated_on for r in everywhere if r.domain == "b" and r.method == "reap"] == ["b", "c", "a"]
    (whole,) = conditions(["a"], num_experts=8, methods=["reap"], kept=[], crossed=[])
    assert (whole.method, whole.num_kept) == (FULL, 8)


def test_every_method_is_measured_with_its_own_experts(measure):
    model = CountingModel()
    rows = measure(model, methods=METHODS, keep=("4 routed",), num_other_domains=0, no_cache=True)
    assert len(rows) == len(model.losses) == 3 * 7
    # statistics of each domain once, and a pass for each of three layers
    assert len(model.seen) == 3 * (1 + 3)
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


def test_an_interrupted_measurement_goes_on_and_gives_the_same(measure, texts):
    whole = measure(CountingModel(), output=texts / "whole", no_cache=True)
    stopped, again, more = CountingModel(fails_at=0), CountingModel(), CountingModel()
    with pytest.raises(KeyboardInterrupt):
        measure(stopped)
    assert measure(again) == whole
    # the full model and random experts; then the same modules for every domain on three texts
    assert (len(stopped.losses), len(again.losses)) == (3 * 3, 3 * 2)
    # more methods in another folder: what is known is not measured again
    measure(more, output=texts / "more", methods=("mean_prob", "frequency"))
    assert (more.losses, more.seen) == ([], [])


def test_ranks_measure_alike_and_the_first_writes(measure, texts):
    other = experts.OtherRank(*[None] * 40)
    with pytest.raises(FileNotFoundError):
        measure(other, keep=("4 routed",), num_other_domains=0)
    assert (other.num_losses, len(other.seen)) == (9, 3)
    assert not (texts / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_no_row(measure, texts, value):
    for model in (
        experts.MadeUpModel(lambda kept: value),
        experts.MadeUpModel(lambda kept: 3.0 if kept > 4 else value),
    ):
        with pytest.raises(NotFiniteError, match=f"got {value}"):
            measure(model, num_other_domains=0)
        assert not (texts / "out" / "rows.json").exists()


def test_rows_of_something_else_are_not_written_over(measure, texts):
    measure(CountingModel(), num_other_domains=0)
    path = texts / "out" / "rows.json"
    before = path.read_bytes()
    tuned = CountingModel(setting=dataclasses.replace(experts.SETTING, weights="tuned"))
    for model, reads in ((tuned, read), (CountingModel(), lambda path, _: experts.documents(3, name=path.stem))):
        with pytest.raises(ValueError, match="--output"):
            measure(model, read=reads, num_other_domains=0)
        assert model.losses == []
    assert path.read_bytes() == before
    # the first format, which named the validation documents held_out
    stored = json.loads(before)
    stored["held_out"], stored["format"] = stored.pop("validation_data"), "emo_megatron.rows.1"
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="--output"):
        measure(tuned, num_other_domains=0)
    # rows of the same model and text are replaced
    assert len(measure(CountingModel(), num_other_domains=0, keep=("2 routed",))) == 9
    for stored in ("[1]", '{"a": {"loss": 1.0}}', "{", '{"format": "emo_megatron.rows.0"}'):
        path.write_text(stored)
        with pytest.raises(ValueError, match="--output"):
            measure(CountingModel(), num_other_domains=0)
        assert path.read_text() == stored
    with pytest.raises(ValueError, match="--output must be a folder"):
        measure(CountingModel(), output=path)


@pytest.mark.parametrize("size", ["10", "2", "5%", "many"])
def test_impossible_sizes_are_refused_before_anything_is_measured(measure, texts, size):
    model = CountingModel()
    with pytest.raises(ValueError, match="--keep must"):
        measure(model, keep=("4 routed", size))
    assert model.losses == model.seen == []
    assert not (texts / "out").exists()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"methods": ("best",)}, "--methods must be.*mean_prob.*got best"),
        ({"methods": ()}, "--methods must name"),
        ({"cross_sizes": ("25%",)}, "--cross-sizes must be sizes of --keep.*25%"),
        ({"num_other_domains": -1}, "--num-other-domains must be 0 or more; got -1"),
        ({"max_loss_increase": "some"}, "--max-loss-increase must be"),
        ({"max_loss_increase": "nan%"}, "--max-loss-increase must be"),
        ({"name": " "}, "--name must"),
        ({"micro_batch_size": 0}, "--micro-batch-size must be 1 or more"),
    ],
)
def test_options_that_cannot_be(texts, changes, what):
    with pytest.raises(ValueError, match=what):
        options(texts, **changes)


def test_text_that_chose_the_experts_is_not_held_out(texts):
    with pytest.raises(ValueError, match="must differ from --data"):
        options(texts, validation_data=texts / "calibration")


def test_domains_are_files_of_the_same_names(texts):
    data, validation_data = texts / "calibration", texts / "held-out"
    assert list(domain_files(data, validation_data)) == ["a", "b", "c"]
    one = domain_files(data / "a.jsonl", validation_data / "b.jsonl")
    assert one == {"a": (data / "a.jsonl", validation_data / "b.jsonl")}
    (validation_data / "d.idx").touch()
    with pytest.raises(ValueError, match=r"same names; only one of .* has d$"):
        domain_files(data, validation_data)
    (data / "d.safetensors").touch()
    # an indexed dataset goes by its prefix
    assert domain_files(data, validation_data)["d"][1] == validation_data / "d"
    (data / "a.safetensors").touch()
    with pytest.raises(ValueError, match="two files of the domain a"):
        domain_files(data, validation_data)
    with pytest.raises(ValueError, match="two files or two folders"):
        domain_files(data, validation_data / "a.jsonl")
    (texts / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no \.jsonl"):
        domain_files(texts / "empty", validation_data)
