"""The commands stats, select and retention on a checkpoint of a real run: only it is named, in any layout."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from support import run_flags, words
from support.other_jobs import OTHER_JOB
from support.pretraining import VOCAB, pretrain
from support.running import Command

from emo_megatron import cli
from emo_megatron.checkpoint.reader import MegatronCheckpoint
from emo_megatron.checkpoint.writer import write_checkpoint
from emo_megatron.experts.selection import load_selection
from emo_megatron.experts.stats import load_stats
from emo_megatron.report.rows import load_rows
from emo_megatron.runners import launch
from emo_megatron.variables import IN_RANKS, process_environment


@pytest.fixture(scope="module", autouse=True)
def _in_the_middle_of_another_job():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in OTHER_JOB.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, data_prefix):
    """Trained for two steps with its experts over two ranks and its documents in pools; saved after each."""
    folder = tmp_path_factory.mktemp("run") / "checkpoint"
    flags = ("--save", folder, "--save-interval", "1", "--train-iters", "2")
    layout = ("--expert-model-parallel-size", "2", "--pool-min", "3", "--pool-eval", "3")
    pretrain(2, *flags, *layout, data=data_prefix)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The same documents as text, with a tokenizer that reads numbers, and as tokens."""
    folder = tmp_path_factory.mktemp("documents")
    documents = [[(n * 11 + i) % (VOCAB - 1) for i in range(3 + 9 * n)] for n in range(12)]
    words.write_texts(folder / "d.jsonl", [" ".join(map(str, tokens)) for tokens in documents])
    words.write_tokens(folder / "d.safetensors", [torch.tensor([*tokens, VOCAB - 1]) for tokens in documents])
    words.write_numbers(folder / "tokenizer", size=VOCAB)
    return folder


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def stats(checkpoint, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("stats") / "s.safetensors"
    arguments = ("--data", data / "d.jsonl", "--output", output, "--outputs")
    tokenizer = ("--tokenizer", data / "tokenizer")
    assert run("stats", "--checkpoint", checkpoint, *tokenizer, *arguments) == 0
    return output


def run_as(checkpoint, folder, flags):
    """The same weights, in a folder of one iteration, with other flags."""
    stored = MegatronCheckpoint(checkpoint)
    for name, value in flags.items():
        setattr(stored.args, name, value)
    weights = {name: stored.read(name) for name in stored.names}
    run = write_checkpoint(folder.parent / "run", weights, args=stored.args)
    (run / "release").rename(folder)


@pytest.mark.slow
def test_another_layout_and_format_measure_the_same(checkpoint, data, stats, tmp_path):
    output = tmp_path / "s.safetensors"
    arguments = ("--data", data / "d.safetensors", "--output", output, "--outputs", "--micro-batch-size", "2")
    layout = ("--nproc-per-node", "2", "--tensor-parallel", "2", "--expert-parallel", "2")
    more = ("--megatron-args=--seed  7",)
    # one iteration's folder is as good as the run's, whatever its name and however the run computed
    folder = tmp_path / "models" / "final"
    run_as(checkpoint, folder, run_flags.HOW_IT_RAN)
    assert run("stats", "--checkpoint", folder, *arguments, *layout, *more) == 0
    one, other = load_stats(stats), load_stats(output)
    assert one.model == other.model
    assert (one.model.num_experts, one.model.top_k) == (8, 2)
    assert one.model.layers == (2, 3, 4)
    assert one.data[0]["sha256"] == other.data[0]["sha256"]
    # measurements of other flags are told apart
    assert (one.data[0]["megatron"], other.data[0]["megatron"]) == ("", "--seed 7")
    assert torch.equal(one.coactivation_LEE, other.coactivation_LEE)
    assert (one.count_LE.sum(-1) == 2 * one.num_tokens).all()
    for name in ("probability_LE", "gated_norm_LE", "residual_change_LE"):
        torch.testing.assert_close(one.tensors()[name], other.tensors()[name], rtol=1e-5, atol=0)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
def test_the_iteration_that_is_named_runs_whatever_its_tracker_says(checkpoint, data, stats, tmp_path):
    run_folder = tmp_path / "run"
    shutil.copytree(checkpoint / "iter_0000001", run_folder / "iter_0000001")
    (run_folder / "latest_checkpointed_iteration.txt").write_text("1\n")
    beside = tmp_path / "beside"
    shutil.copytree(checkpoint, beside)
    (beside / "iter_0000001").rename(beside / "early")
    (tmp_path / "link").symlink_to(beside / "early")
    found = {}
    for name, folder in (("run", run_folder), ("early", tmp_path / "link")):
        output = tmp_path / f"{name}.safetensors"
        two = ("--nproc-per-node", "2", "--expert-parallel", "2") if name == "early" else ()
        assert run("stats", "--checkpoint", folder, "--data", data / "d.safetensors", "--output", output, *two) == 0
        found[name] = load_stats(output)
    want, got, later = found["run"], found["early"], load_stats(stats)
    assert got.model.is_same(want.model)
    assert not got.model.is_same(later.model)
    torch.testing.assert_close(got.probability_LE, want.probability_LE, rtol=1e-5, atol=0)
    assert (got.probability_LE - later.probability_LE).abs().max() > 1e-3


def test_a_model_that_megatron_did_not_load_is_an_error(checkpoint, data, tmp_path):
    output = tmp_path / "s.safetensors"
    arguments = ("stats", "--checkpoint", checkpoint, "--data", data / "d.safetensors", "--output", output)
    script = tmp_path / "loads_nothing.py"
    script.write_text(
        "from emo_megatron.mcore import cpu; cpu.activate()\n"
        "import megatron.training.training as host; host.load_checkpoint = lambda *a, **k: (0, 0)\n"
        "import sys; from emo_megatron.cli import main\n"
        "sys.exit(main())"
    )
    command = launch.python(script, *arguments)
    environment = process_environment() | {IN_RANKS: "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 2
    errors = [line for line in ran.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert re.search(r"did not load .*iter_0000002.*router of layer [234]", errors[0])
    assert not output.exists()


def test_an_indexed_dataset_is_calibration_data(checkpoint, data_prefix, tmp_path):
    output = tmp_path / "s.safetensors"
    some = ("--data", data_prefix, "--output", output, "--examples", "3", "--shots", "1")
    assert run("stats", "--checkpoint", checkpoint, *some) == 0
    assert load_stats(output).num_documents == 3
    assert load_stats(output).data[0]["num_shots"] == 1


@pytest.mark.slow
def test_selections_that_run_the_model(checkpoint, data, stats, tmp_path):
    model = ("--checkpoint", checkpoint, "--tokenizer", data / "tokenizer")
    model += ("--nproc-per-node", "2", "--pipeline-parallel", "2")
    output = tmp_path / "layerwise.json"
    how = ("--method", "layerwise", "--data", data / "d.jsonl", "--keep", "3 routed")
    assert run("select", *model, *how, "--output", output) == 0
    chosen = load_selection(output)
    assert chosen.num_kept == (3, 3, 3)
    # the first layer's choice is what statistics say, for nothing is left out before it
    by_stats = tmp_path / "mean-prob.json"
    assert run("select", "--stats", stats, "--keep", "3 routed", "--output", by_stats) == 0
    assert load_selection(by_stats).experts[0] == chosen.experts[0]
    assert load_selection(by_stats).model == chosen.model == load_stats(stats).model.fingerprint
    output = tmp_path / "smallest.json"
    validation_data = tmp_path / "held-out.jsonl"
    validation_data.write_text("\n".join((data / "d.jsonl").read_text().splitlines()[::2]))
    bound = ("--max-loss-increase", "0.01%", "--validation-data", validation_data)
    assert run("select", *model, *bound, "--stats", stats, "--output", output) == 0
    found = load_selection(output)
    losses = {int(kept): loss for kept, loss in found.data["losses"].items()}
    bound = found.data["full_loss"] * 1.0001
    assert losses[8] == found.data["full_loss"]
    assert losses[found.num_kept[0]] <= bound
    assert all(loss > bound for kept, loss in losses.items() if kept < found.num_kept[0])


@pytest.mark.slow
def test_retention_is_the_same_in_any_layout_and_what_select_measures(checkpoint, data, stats, tmp_path, capfd):
    validation_data = tmp_path / "held-out.jsonl"
    validation_data.write_text("\n".join((data / "d.jsonl").read_text().splitlines()[::-2]))
    model = ("--checkpoint", checkpoint, "--tokenizer", data / "tokenizer")
    common = ("retention", *model, "--data", data / "d.jsonl", "--validation-data")
    sizes = ("--keep", "4 routed", "2 routed", "--methods", "mean_prob", "reap", "layerwise")
    assert run(*common, validation_data, *sizes, "--output", tmp_path / "one") == 0
    printed = capfd.readouterr().out
    assert "Fewest experts within 1.0% of the loss" in printed
    assert (tmp_path / "one" / "retention.png").stat().st_size > 20_000
    layout = ("--nproc-per-node", "2", "--tensor-parallel", "2", "--expert-parallel", "2")
    beside = ("--name", "other", "--compare", tmp_path / "one" / "retention.json")
    assert run(*common, validation_data, *sizes, *layout, *beside, "--output", tmp_path / "two") == 0
    one, two = (load_rows(tmp_path / name / "retention.csv") for name in ("one", "two"))
    assert len(one) == len(two) == 1 + 2 * 4
    assert [(r.method, r.num_experts_kept) for r in one] == [(r.method, r.num_experts_kept) for r in two]
    assert [r.loss for r in two] == pytest.approx([r.loss for r in one], rel=1e-5)
    report = (tmp_path / "two" / "retention.txt").read_text()
    assert len(re.findall(r"^ *(?:other|model) +\d", report, re.MULTILINE)) == 2 * (1 + 2 * 3)
    output = tmp_path / "s.json"
    bound = ("--stats", stats, *model, "--max-loss-increase", "0", "--validation-data")
    assert run("select", *bound, validation_data, "--output", output) == 0
    losses = {int(k): v for k, v in load_selection(output).data["losses"].items()}
    measured = {r.num_experts_kept: r.loss for r in one if r.method in ("full", "mean_prob")}
    shared = losses.keys() & measured.keys()
    assert 8 in shared
    assert len(shared) > 1
    assert [losses[k] for k in shared] == pytest.approx([measured[k] for k in shared], rel=1e-6)


@pytest.mark.slow
def test_what_cannot_be_is_one_line_and_leaves_nothing(checkpoint, data, tmp_path, capfd):
    cut = tmp_path / "cut"
    shutil.copytree(checkpoint / "iter_0000002", cut / "iter_0000002")
    (cut / "latest_checkpointed_iteration.txt").write_text("2")
    part = max(cut.rglob("*.distcp"), key=lambda path: path.stat().st_size)
    part.write_bytes(part.read_bytes()[:2000])
    words.write_tokens(tmp_path / "d.safetensors", [torch.tensor([5, 600])])
    output = tmp_path / "out" / "s.safetensors"
    two = ("--nproc-per-node", "2", "--expert-parallel", "2")
    for arguments, what, *more in [
        (("--checkpoint", cut, "--data", data / "d.safetensors"), "cut short"),
        (("--checkpoint", checkpoint, "--data", tmp_path / "d.safetensors"), "vocabulary.*5 to 600"),
        (("--checkpoint", checkpoint, "--data", tmp_path / "d.safetensors", *two), "vocabulary.*5 to 600"),
        (
            ("--checkpoint", checkpoint, "--data", data / "d.safetensors", *two),
            "Megatron cannot build.*num_layers value from checkpoint .4. ",
            "--megatron-args=--num-layers 2 --moe-layer-freq [0,1]",
        ),
        (
            ("--checkpoint", checkpoint, "--data", data / "d.safetensors"),
            "unrecognized arguments: --no-such-flag",
            "--megatron-args=--no-such-flag",
        ),
    ]:
        with pytest.raises(SystemExit) as stopped:
            run("stats", *arguments, *more, "--output", output)
        assert stopped.value.code == 2
        told = capfd.readouterr().err
        errors = [line for line in told.splitlines() if "error" in line]
        assert len(errors) == 1
        assert "Traceback" not in told
        assert "FAILED" not in told
        assert re.search(what, errors[0])
    assert not output.parent.exists()


@pytest.mark.parametrize(
    ("processes", "number", "code"),
    [
        (2, signal.SIGINT, 130),
        (2, signal.SIGKILL, -9),
        pytest.param(1, signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGKILL, -9, marks=pytest.mark.slow),
        pytest.param(2, signal.SIGTERM, 143, marks=pytest.mark.slow),
    ],
)
def test_no_process_outlives_its_command(checkpoint, data, tmp_path, processes, number, code):
    output = tmp_path / "folder" / "s.safetensors"
    command = [sys.executable, "-m", "emo_megatron", "stats", "--checkpoint", checkpoint]
    command += ["--data", data / "d.safetensors", "--output", output, "--nproc-per-node", processes]
    started = Command(command)
    # with torchrun
    num_processes = {1: 2, 2: 4}[processes]
    started.wait_for(lambda: len(started.running()) == num_processes)
    assert started.end(number) == code
    log = f"{output.name}.log" + (".unfinished" if number == signal.SIGKILL else "")
    assert [path.name for path in output.parent.iterdir()] == [log]


@pytest.mark.slow
def test_layers_of_prediction_from_training_to_a_module(data, data_prefix, tmp_path):
    folder = tmp_path / "checkpoint"
    flags = ("--save", folder, "--save-interval", "2", "--train-iters", "2", "--mtp-num-layers", "2")
    pretrain(2, *flags, "--expert-model-parallel-size", "2", "--pool-min", "3", data=data_prefix)
    files = [tmp_path / f"{name}.safetensors" for name in ("one", "two")]
    layout = ("--nproc-per-node", "2", "--pipeline-parallel", "2", "--micro-batch-size", "2")
    for file, more in zip(files, ((), layout), strict=True):
        assert run("stats", "--checkpoint", folder, "--data", data / "d.safetensors", "--output", file, *more) == 0
    one, two = map(load_stats, files)
    assert one.model.layers == (2, 3, 4, 5, 6)
    assert torch.equal(one.coactivation_LEE, two.coactivation_LEE)
    torch.testing.assert_close(one.probability_LE, two.probability_LE, rtol=1e-5, atol=0)
    # a row has 64 tokens; every piece of a document is longer than the depths
    pieces = sum(-(-(4 + 9 * n) // 64) for n in range(12))
    assert (one.num_tokens - one.count_LE.sum(-1) // 2).tolist() == [0, 0, 0, pieces, 2 * pieces]
    selection, module = tmp_path / "s.json", tmp_path / "module"
    assert run("select", "--stats", files[0], "--keep", "4 routed", "--output", selection) == 0
    assert run("extract", "--checkpoint", folder, "--selection", selection, "--output", module) == 0
    output = tmp_path / "module.safetensors"
    assert run("stats", "--checkpoint", module, "--data", data / "d.safetensors", "--output", output) == 0
    assert load_stats(output).model.layers == one.model.layers
    assert load_stats(output).model.num_experts == 4
