"""benchmarks/fidelity.py: it fits its steps to the time, keeps every stage, and compares what is comparable only."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import experts, made_up, words

from demo import intervals, recipe
from demo.corpus import CorpusConfig, prepare_corpus
from demo.packed import pack
from emo_megatron.experts.calibration import Documents
from emo_megatron.mcore.args import add_pool_args, pool_config_from_args
from emo_megatron.runners.cache import NoCache

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
SCRIPT = BENCHMARKS / "fidelity.py"
QUARTER = 2
"""Of the 8 routed experts of the quick size."""
SLOW = {"step_ms": 1500.0, "wait": 0.25}
"""By the log too slow for the seconds that `made` gives; and slow enough to be stopped before its end."""


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The modules of the script."""
    pytest.importorskip("megatron.core")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import fidelity
    import fidelity_bounds
    import fidelity_page
    import fidelity_plan
    import fidelity_results
    import fidelity_stages
    import fidelity_text

    return SimpleNamespace(
        main=fidelity,
        bounds=fidelity_bounds,
        page=fidelity_page,
        plan=fidelity_plan,
        results=fidelity_results,
        stages=fidelity_stages,
        text=fidelity_text,
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus of three alphabets."""
    texts = words.write_alphabets(tmp_path_factory.mktemp("texts"))
    output = tmp_path_factory.mktemp("corpus")
    prepare_corpus(output, CorpusConfig(corpus_dir=texts, min_documents=12, min_document_chars=50, vocab_size=400))
    return output


@pytest.fixture
def made(scripts: SimpleNamespace, corpus: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs the whole script on stand-ins for training and evaluation; gives the stored result and the page."""
    monkeypatch.setattr(scripts.stages, "PRETRAIN", Path(made_up.__file__))
    monkeypatch.setattr(scripts.stages, "MEASURE", Path(made_up.__file__))
    monkeypatch.setenv("MADE_UP_FLAGS", str(tmp_path / "flags"))

    def run(model: str, *, step_ms: float = 10.0, wait: float = 0.0, **options: Any) -> Any:
        monkeypatch.setenv("MADE_UP_MS", str(step_ms))
        monkeypatch.setenv("MADE_UP_WAIT", str(wait))
        output = tmp_path / "results" / f"{model}{len(list(tmp_path.glob('results/*')))}"
        given = {"partners": tmp_path, "corpus": corpus, "seconds": 100.0} | options
        scripts.main.main(
            scripts.main.Options(model=model, output=output, quick=True, device="cpu", **given),
            started=time.monotonic(),
        )
        stored = json.loads((output / f"fidelity-{model}-quick.json").read_text())
        flags = (tmp_path / "flags").read_text().splitlines()
        return SimpleNamespace(
            output=output,
            stored=stored,
            page=(output / f"fidelity-{model}-quick.md").read_text(),
            flags=dict(itertools.pairwise(flags)),
        )

    return run


def _expected_gap(first: str, second: str, *, method: str = "full", kept: int = 8) -> float:
    losses = [
        made_up.row(first, "one", "one", method, kept, 8)["loss"],
        made_up.row(second, "one", "one", "full", 8, 8)["loss"],
    ]
    return float(losses[0]) - float(losses[1])  # type: ignore[arg-type]


def test_three_calls_compare_themselves_in_any_order(made: Any, scripts: SimpleNamespace, tmp_path: Path) -> None:
    small = made("small")
    assert small.stored["is_finished"]
    assert small.page.count("partner not found") == 2
    emo = made("emo")
    assert emo.stored["stages"] == [
        *("begun", "trained", "all experts", "1/2 of the experts", "1/4 of the experts"),
        "all experts at 60%",
    ]
    quarter = _expected_gap("emo", "small", method="mean_prob", kept=QUARTER)
    assert f"{quarter:+.3f}" in emo.page
    # the others are found in an archive, too, and nothing is unpacked
    with tarfile.open(tmp_path / "results.tgz", "w:gz") as archive:
        for result in (small, emo):
            archive.add(result.output, arcname=f"../{result.output.name}")
            for file in result.output.iterdir():
                file.unlink()
    standard = made("standard")
    assert "partner not found" not in standard.page
    assert f"| mean | {_expected_gap('emo', 'standard'):+.3f} ± " in standard.page
    assert f"{quarter:+.3f}" in standard.page
    assert not list(tmp_path.glob("results/*/../*.json"))
    total = sum(f.stat().st_size for f in standard.output.iterdir())
    assert total < 1 << 20


def test_slow_first_steps_mean_fewer_steps_and_shorter_schedules(made: Any) -> None:
    fast = made("emo")
    assert fast.stored["settings"]["size"]["steps"] == fast.stored["plan"]["planned_steps"] == 24
    slow = made("emo", **SLOW)
    steps = slow.stored["settings"]["size"]["steps"]
    assert 4 <= steps < 20
    assert slow.stored["plan"]["planned_steps"] == 24
    assert slow.stored["settings"]["tokens"] == steps * 8 * 128
    assert slow.flags["--train-iters"] == str(steps)
    assert slow.flags["--save-interval"] == str(round(0.6 * steps))
    assert slow.flags["--pool-min-decay-samples"] == str(round(0.6 * steps * 8))
    assert slow.stored["step_seconds"] == pytest.approx(1.5)
    assert slow.stored["tokens_per_second"] is None
    # a partner takes over the number, and is comparable
    other = made("standard", partners=slow.output)
    assert other.stored["plan"]["planned_steps"] == steps
    assert other.flags["--train-iters"] == str(steps)
    assert "EMO minus standard" in other.page


@pytest.mark.parametrize(
    ("change", "difference"), [({"seed": 1}, "seed is 1234 there and 1 here"), (SLOW, "steps is 24")]
)
def test_models_that_differ_otherwise_are_not_compared(made: Any, change: dict[str, Any], difference: str) -> None:
    emo = made("emo")
    standard = made("standard", **change)
    assert emo.stored["settings"] != standard.stored["settings"]
    assert difference in standard.page
    assert "±" not in standard.page


def test_what_is_no_result_is_passed_over(made: Any, tmp_path: Path) -> None:
    good = made("emo")
    text = next(good.output.glob("*.json")).read_bytes()
    (tmp_path / "fidelity-cut.json").write_bytes(text[: len(text) // 2])
    (tmp_path / "fidelity-other.json").write_text('{"format": "x"}')
    (tmp_path / "fidelity-list.json").write_text("[1]")
    (tmp_path / "results.tgz").write_bytes(b"\x1f\x8b but no archive")
    with tarfile.open(tmp_path / "links.tgz", "w:gz") as archive:
        link = tarfile.TarInfo("fidelity-link.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    standard = made("standard")
    assert str(good.output) in standard.page
    assert "±" in standard.page


def test_losses_of_documents_are_kept_beside_the_loss(scripts: SimpleNamespace) -> None:
    from demo.measure import DocumentLosses

    model = experts.MadeUpModel()
    model.document_nats = lambda documents, *, allowed_LE: torch.tensor([6.0, 0.0, 3.0]).double()
    losses = DocumentLosses(model, NoCache())
    assert losses.metadata == model.metadata
    found = losses.loss(Documents(tokens=(torch.zeros(4), torch.zeros(1), torch.zeros(7)), source={"sha256": "0"}))
    assert (found.nats, found.num_tokens) == (1.0, 9)
    assert losses.of_documents == [([6.0, 0.0, 3.0], [3, 0, 6])]


def test_sigterm_leaves_what_is_known_in_whole_files(made: Any, corpus: Path, tmp_path: Path) -> None:
    """During training: the plan and the log so far; no process and no work folder stays."""
    driver = (
        "import runpy, sys, pathlib; sys.path.insert(0, sys.argv[1])\n"
        "import fidelity_stages\n"
        "fidelity_stages.PRETRAIN = pathlib.Path(sys.argv[2])\n"
        "sys.argv = sys.argv[3:]; runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    output, temporary = tmp_path / "out", tmp_path / "tmp"
    temporary.mkdir()
    flags = ("--quick", "--device", "cpu", "--seconds", "900", "--corpus", corpus)
    command = [BENCHMARKS, made_up.__file__, SCRIPT, "standard", *flags, "--output", output]
    process = subprocess.Popen(
        [sys.executable, "-c", driver, *map(str, command)],
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "TMPDIR": str(temporary), "MADE_UP_WAIT": "0.3", "MADE_UP_HANG": "12"}
        | {"MADE_UP_MS": "600", "MADE_UP_FLAGS": str(tmp_path / "flags")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    page = output / "fidelity-standard-quick.md"
    for _ in range(600):
        if page.exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM, said
    stored = json.loads((output / "fidelity-standard-quick.json").read_text())
    assert stored["stages"] == ["begun"]
    assert not stored["is_finished"]
    assert "Not finished" in page.read_text()
    assert sorted(p.suffix for p in output.iterdir()) == [".json", ".md"]
    assert not list(temporary.iterdir())
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(temporary).encode() in _content(path)]
    # such a result has nothing to compare with, and that is no error
    emo = made("emo", partners=output)
    assert "ended before its losses" in emo.page


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_failed_training_tells_its_end_and_leaves_nothing(
    made: Any, scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text('raise SystemExit("out of memory")')
    monkeypatch.setattr(scripts.stages, "PRETRAIN", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        made("standard")
    assert not list(tmp_path.glob("results/*/*"))


def test_bad_input_is_one_line_and_leaves_nothing(
    scripts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    good = {"model": "emo", "output": Path("out"), "seconds": 100.0, "device": "cpu", "quick": True}
    for word, change in {
        "huge": {"model": "huge"},
        "--seconds": {"seconds": 3.0},
        "nan": {"seconds": math.nan},
        "--corpus": {"corpus": Path("missing")},
        "--partners": {"partners": Path("missing")},
        "--output": {"output": Path("full")},
        "neither": {"output": Path("full/file")},
        "cannot be written": {"output": Path("full/file/out")},
    }.items():
        with pytest.raises(ValueError, match=word) as raised:
            scripts.main.main(scripts.main.Options(**good | change), started=0.0)
        assert "\n" not in str(raised.value)
    assert sorted(map(str, Path().rglob("*"))) == ["full", "full/file"]


def _speed(scripts: SimpleNamespace, **changes: float) -> Any:
    return scripts.plan.Speed(**{"steps": 100, "step_seconds": 0.5, "startup_seconds": 20.0} | changes)


def _choose(scripts: SimpleNamespace, **changes: Any) -> int:
    given = {
        "seconds_left": 500.0,
        "after": 40.0,
        "speed": _speed(scripts),
        "limits": scripts.plan.LIMITS,
        "reserve": 0.0,
    }
    return int(scripts.plan.choose_steps(915, **given | changes))


def test_steps_fit_into_the_time(scripts: SimpleNamespace) -> None:
    other = scripts.plan.OTHER_SECONDS
    # 815 steps of half a second are left
    assert _choose(scripts, seconds_left=407.5 + 40 + other) == 915
    fewer = _choose(scripts, seconds_left=407 + 40 + other)
    assert fewer == (407 - 20) * 2 // 10 * 10
    assert _choose(scripts, seconds_left=407.5 + 40 + other, reserve=0.1) < fewer
    assert _choose(scripts, seconds_left=407.5 + 80 + other, after=80.0) == 915
    slow = _speed(scripts, step_seconds=2.0)
    assert _choose(scripts, speed=slow) == int((500 - 40 - other - 20) / 2) // 10 * 10
    with pytest.raises(ValueError, match="--seconds"):
        _choose(scripts, speed=_speed(scripts, step_seconds=6.0))


def test_the_log_is_read_as_megatron_writes_it(scripts: SimpleNamespace, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert scripts.plan.read_log(log) == []
    log.write_text("\n".join(made_up.LINE.format(n, 24, n, 100.0 * n, 2.5) for n in (1, 6, 8, 9)))
    lines = scripts.plan.read_log(log)
    assert [line.iteration for line in lines] == [1, 6, 8, 9]
    assert [line.loss for line in lines] == [2.5] * 4
    assert scripts.plan.step_seconds(lines[:2]) is None
    # two steps of .8 s and one of .9 s; the line of step 6 holds the first step, too
    assert scripts.plan.step_seconds(lines) == pytest.approx((2 * 0.8 + 0.9) / 3)
    log.write_text(made_up.LINE.format(1, 24, 1, 100.0, 2.5).replace("lm loss", "other"))
    assert scripts.plan.read_log(log)[0].loss is None


def test_the_gap_is_paired_over_documents(scripts: SimpleNamespace) -> None:
    rng = random.Random(3)
    tokens = {"a": [100.0] * 400, "b": [float(rng.randint(20, 900)) for _ in range(400)]}
    second = {d: [n * rng.gauss(3, 1) for n in tokens[d]] for d in tokens}
    first = {d: [x + n * rng.gauss(0.05, 0.2) for x, n in zip(second[d], tokens[d], strict=True)] for d in tokens}
    found = intervals.paired(first, second, tokens)
    # of documents of one length, the standard error of a mean
    apart = [(x - y) / 100 for x, y in zip(first["a"], second["a"], strict=True)]
    assert found["a"].nats == pytest.approx(fmean(apart))
    assert found["a"].error == pytest.approx(stdev(apart) / math.sqrt(400))
    # of any, what drawing the documents again says
    again = []
    for _ in range(400):
        places = rng.choices(range(400), k=400)
        total = sum(tokens["b"][p] for p in places)
        again.append(sum(first["b"][p] - second["b"][p] for p in places) / total)
    assert found["b"].error == pytest.approx(stdev(again), rel=0.15)
    mean = intervals.mean_of(found)
    assert mean.nats == pytest.approx((found["a"].nats + found["b"].nats) / 2)
    assert mean.error == pytest.approx(math.hypot(found["a"].error, found["b"].error) / 2)
    alone = intervals.paired({"a": [1.0]}, {"a": [2.0]}, {"a": [3.0]})["a"]
    assert math.isnan(alone.error)
    assert "nan" not in str(alone)
    with pytest.raises(ValueError, match="domains"):
        intervals.paired(first, {"a": second["a"]}, tokens)


def test_a_corpus_is_whole_and_known_by_its_tokens(scripts: SimpleNamespace, corpus: Path, tmp_path: Path) -> None:
    found = scripts.text.open_corpus(corpus)
    assert len(found.domains) == 3
    assert scripts.text.hash_corpus(found) == scripts.text.hash_corpus(found)
    (tmp_path / "corpus.json").write_text((corpus / "corpus.json").read_text())
    with pytest.raises(ValueError, match=r"train\.bin"):
        scripts.text.open_corpus(tmp_path)
    (tmp_path / "corpus.json").write_text("[]")
    with pytest.raises(ValueError, match="--corpus"):
        scripts.text.open_corpus(tmp_path)


def test_a_packed_corpus_gives_the_results_of_its_folder(
    made: Any, scripts: SimpleNamespace, corpus: Path, tmp_path: Path
) -> None:
    packed = tmp_path / "corpus.tar.xz"
    pack(scripts.text.open_corpus(corpus), packed)
    of_file, of_folder = made("emo", corpus=packed), made("emo", partners=None)
    assert of_file.stored["settings"] == of_folder.stored["settings"]
    assert of_file.stored["corpus"] == of_folder.stored["corpus"]
    packed.write_bytes(packed.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"--corpus must be .* ends too early"):
        made("emo", corpus=packed)
    assert not list(tmp_path.glob("results/emo2/*"))


def test_bounds_are_judged_when_all_models_are_there(
    made: Any, scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    made("small")
    emo = made("emo")
    assert emo.page.count("| not judged: results of standard are missing |") == 3
    standard = made("standard")
    section = standard.page.partition("## Bounds")[2]
    gap = _expected_gap("emo", "standard")
    quarter = _expected_gap("emo", "small", method="mean_prob", kept=QUARTER)
    assert "+0.020" in section
    outcomes = {line.split("|")[1].strip(): line.split("|")[4].strip() for line in section.splitlines() if "|" in line}
    # made up: EMO's experts are as hard to remove as the standard model's
    assert outcomes["loss increase at a quarter, EMO divided by standard"] == "**does not hold**"
    assert outcomes["gap of the full model, EMO minus standard"] == ("holds" if gap <= 0.02 else "**does not hold**")
    assert outcomes["EMO's quarter minus the small model"] == ("holds" if quarter < 0 else "**does not hold**")
    kept = scripts.bounds.Bounds(gap=1.0, increase_ratio=1.01, quarter_gap=1.0)
    monkeypatch.setattr(scripts.bounds, "BOUNDS", kept)
    assert made("standard").page.count("| holds |") == 3


def test_the_bounds_are_those_fixed_before_the_run(scripts: SimpleNamespace) -> None:
    bounds = scripts.bounds.BOUNDS
    assert (bounds.gap, bounds.increase_ratio, bounds.quarter_gap) == (0.02, 1 / 5, 0.0)


def _parameters(flags: list[str]) -> tuple[int, int]:
    """All parameters of a model with these flags, and those that one token uses, computed by hand."""
    value = {flag: int(after) for flag, after in itertools.pairwise(flags) if flag[:2] == "--" and after.isdigit()}
    width, vocabulary = value["--hidden-size"], 16_384
    expert = 3 * width * value["--moe-ffn-hidden-size"]
    shared = 3 * width * value["--moe-shared-expert-intermediate-size"]
    # attention, two norms, the router
    rest = 4 * width * width + 2 * width + value["--num-experts"] * width
    outside = vocabulary * width + value["--max-position-embeddings"] * width + width
    total, active = (
        value["--num-layers"] * (experts * expert + shared + rest)
        for experts in (value["--num-experts"], value["--moe-router-topk"])
    )
    # the output layer has its own weights; a token looks up one row of the embeddings
    return total + outside + vocabulary * width, active + vocabulary * width + 3 * width


@pytest.mark.parametrize(
    ("model", "total", "active"), [("standard", 233e6, 36e6), ("emo", 233e6, 36e6), ("small", 82e6, 36e6)]
)
def test_the_models_for_a_gpu_have_their_size(
    scripts: SimpleNamespace, tmp_path: Path, model: str, total: float, active: float
) -> None:
    size = scripts.plan.ON_GPU
    (found,) = (m for m in recipe.main_models(size, seed=1) if m.name == model)
    counted = _parameters(recipe.megatron_flags(size, found, corpus=tmp_path, run_dir=tmp_path))
    assert counted == (pytest.approx(total, rel=0.02), pytest.approx(active, rel=0.02))
    assert size.tokens == pytest.approx(120e6, rel=0.01)


@pytest.mark.slow
def test_megatron_trains_and_measures_both(corpus: Path, tmp_path: Path) -> None:
    """The whole script on Megatron, tiny: the second call finds the first and compares."""
    flags = ("--quick", "--device", "cpu", "--seconds", "550", "--corpus", str(corpus))
    for model in ("standard", "emo"):
        more = ("--partners", str(tmp_path), "--output", str(tmp_path / model))
        subprocess.run(
            [sys.executable, str(SCRIPT), model, *flags, *more],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            check=True,
            timeout=580,
        )
    stored = json.loads((tmp_path / "emo" / "fidelity-emo-quick.json").read_text())
    page = (tmp_path / "emo" / "fidelity-emo-quick.md").read_text()
    assert stored["is_finished"]
    assert stored["early"].keys() == stored["document_tokens"].keys()
    own = {row["keep_fraction"] for row in stored["rows"] if row["method"] == "mean_prob"}
    assert own == {0.5, 0.25}
    for row in stored["rows"]:
        if row["method"] == "full":
            nats = sum(stored["nats"]["full 8"][row["domain"]])
            assert nats / row["tokens"] == pytest.approx(row["loss"])
    # it learned, and the earlier checkpoint is another one
    assert fmean(stored["early"].values()) > fmean(row["loss"] for row in stored["rows"] if row["method"] == "full")
    assert page.count("±") == 4


def _flags(size: Any, model: Any) -> list[str]:
    return recipe.megatron_flags(size, model, corpus=Path("corpus"), run_dir=Path("run"))


def _pool(size: Any, model: Any) -> Any:
    parser = add_pool_args(argparse.ArgumentParser(allow_abbrev=False))
    return pool_config_from_args(parser.parse_known_args(_flags(size, model))[0])


@pytest.mark.parametrize("name", ["ON_GPU", "ON_GPU_QUICK"])
def test_a_step_of_several_micro_batches_balances_over_them(scripts: SimpleNamespace, name: str) -> None:
    size = getattr(scripts.plan, name)
    assert size.rows % size.micro_batch_size == 0 < size.rows - size.micro_batch_size
    emo, *others = recipe.main_models(size, seed=1)
    assert _pool(size, emo).pool_balance == "running"
    for model in (emo, *others):
        flags = _flags(size, model)
        given = dict(itertools.pairwise(flags))
        assert given["--micro-batch-size"] == str(size.micro_batch_size)
        assert given["--global-batch-size"] == str(size.rows)
        assert given["--transformer-impl"] == "local"
        assert "--bf16" in flags


def test_fewer_steps_shorten_every_schedule(scripts: SimpleNamespace) -> None:
    size = replace(scripts.plan.ON_GPU, steps=200)
    emo = recipe.main_models(size, seed=1)[0]
    flags = dict(itertools.pairwise(_flags(size, emo)))
    assert flags["--train-iters"] == "200"
    assert int(flags["--lr-warmup-iters"]) == 50 < scripts.plan.ON_GPU.warmup
    assert _pool(size, emo).pool_min_decay_samples == 120 * size.rows
    assert size.tokens == 200 * 128 * 1024


def test_another_corpus_is_not_compared(scripts: SimpleNamespace, made: Any, corpus: Path, tmp_path: Path) -> None:
    made("emo")
    other = shutil.copytree(corpus, tmp_path / "other")
    changed = bytearray((other / "train.bin").read_bytes())
    changed[0] ^= 1
    (other / "train.bin").write_bytes(changed)
    standard = made("standard", corpus=other)
    assert "corpus is" in standard.page
    assert "±" not in standard.page


@pytest.mark.slow
def test_every_stage_is_kept_when_it_is_done(
    made: Any, scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[list[str]] = []
    save = scripts.results.Result.save

    def watch(result: Any, path: Path) -> None:
        save(result, path)
        kept.append(json.loads(path.read_text())["stages"])

    monkeypatch.setattr(scripts.results.Result, "save", watch)
    stages = made("standard", wait=0.5).stored["stages"]
    assert len(stages) == 6
    for number in range(1, 7):
        assert stages[:number] in kept


def test_the_comparable_partner_with_most_stages_is_taken(made: Any, scripts: SimpleNamespace, tmp_path: Path) -> None:
    found = made("emo")
    parse, folder = scripts.results.Result.parse, tmp_path / "several"
    stored = next(found.output.glob("*.json")).read_bytes()
    good, partial, other = parse(stored), parse(stored), parse(stored)
    partial.stages, partial.nats = ["begun"], {}
    other.settings["seed"] += 1
    other.stages.append("one more")
    for place, result in {"a": other, "b": good, "c": partial, "d": other}.items():
        result.save(folder / place / "fidelity-emo.json")

    def find() -> Any:
        return scripts.results.find_partners(folder, model="standard", settings=found.stored["settings"])["emo"]

    assert find().place == str(folder / "b" / "fidelity-emo.json")
    (folder / "b" / "fidelity-emo.json").unlink()
    assert find().place == str(folder / "c" / "fidelity-emo.json")
    (folder / "c" / "fidelity-emo.json").unlink()
    seed = found.stored["settings"]["seed"]
    assert find().differing == (f"seed is {seed + 1} there and {seed} here",)
    assert scripts.results.find_partners(folder, model="emo", settings=good.settings) == {}
    assert scripts.results.find_partners(None, model="small", settings=good.settings) == {}


def test_the_text_is_not_read_too_often(scripts: SimpleNamespace) -> None:
    from fidelity_plan import ON_GPU

    def steps(train_tokens: int) -> int:
        return int(scripts.plan.planned_steps(ON_GPU, train_tokens=train_tokens, limits=scripts.plan.LIMITS))

    assert steps(100_000_000) == 915
    assert steps(9_000_000) == scripts.plan.PASSES * 9_000_000 // (128 * 1024) < 915
    assert steps(1000) == scripts.plan.LIMITS.fewest_steps


def test_a_partner_that_was_stopped_is_compared_in_what_it_has(made: Any, scripts: SimpleNamespace) -> None:
    emo, small = (
        scripts.results.Result.parse(next(made(model).output.glob("*.json")).read_bytes()) for model in ("emo", "small")
    )
    emo.rows = [row for row in emo.rows if row.method == "full"]
    emo.nats = {name: nats for name, nats in emo.nats.items() if name.startswith("full")}
    partner = scripts.results.Partner(result=emo, place="there", differing=())
    page = scripts.page.page(small, {"emo": partner})
    assert "not measured yet" in page
    assert "±" not in page


def test_an_evaluation_is_longer_with_more_to_measure(scripts: SimpleNamespace) -> None:
    from fidelity_plan import ON_GPU

    def seconds(**changes: Any) -> float:
        size = replace(ON_GPU, evaluation_tokens=changes.pop("tokens", 65536))
        given = {"num_domains": 8, "fractions": (0.5, 0.25)} | changes
        return float(scripts.plan.evaluation_seconds(size, _speed(scripts), **given))

    assert seconds(fractions=()) < seconds() < seconds(fractions=(0.5, 0.25, 0.125))
    assert seconds() < seconds(num_domains=9)
    assert seconds() < seconds(tokens=100_000)
    assert seconds(fractions=(), tokens=0) == 2 * 20.0
