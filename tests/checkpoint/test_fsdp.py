"""Checkpoints of Megatron-FSDP, as torch's own writer and Megatron's names make them, become torch_dist."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from support import checkpoints
from support.pretraining import logged, pretrain

from emo_megatron import cli
from emo_megatron.checkpoint import fsdp
from emo_megatron.checkpoint.bridge_flags import RUN_CONFIG, read_run_config
from emo_megatron.checkpoint.fsdp import convert
from emo_megatron.checkpoint.reader import MegatronCheckpoint
from emo_megatron.experts.placement import Placement
from emo_megatron.experts.selection import Selection

DATA = Path(__file__).resolve().parents[1] / "data"


def _save(folder: str, is_grouped: bool, num_experts: int = 8, is_bridge: bool = False) -> dict[str, torch.Tensor]:
    """What Megatron-FSDP would write of a small model, by itself or in Bridge; its weights by the reader's names."""
    built = checkpoints.model({"num_layers": 2}, layout={})
    state: dict[str, Any] = {}
    for name, value in built.state_dict().items():
        if "_extra_state" in name:
            continue
        halves = {"": value}
        if ".mlp." in name and ".linear_fc1.weight" in name:
            halves = dict(zip(("_w", "_v"), value.chunk(2), strict=True))
        if is_grouped:
            name = re.sub(r"local_experts\.(\d+)\.(linear_fc\d\.weight)", r"\2\1", name)
        state |= {f"module.{name}{half}": part.clone() for half, part in halves.items()}
    options = checkpoints.ARGS | {"num_experts": num_experts}
    args = argparse.Namespace(**options, transformer_impl="local", use_megatron_fsdp=True)
    optimizer = {"state": {"module.decoder.final_layernorm.weight": {"exp_avg": torch.ones(32)}}}
    held = {"model": state, "optimizer": optimizer, "args": args, "iteration": 7}
    if is_bridge:
        del held["args"]
    dcp.save(held, checkpoint_id=folder, no_dist=True)
    if is_bridge:
        sizes = {"num_layers": 2, "hidden_size": 32, "num_moe_experts": num_experts}
        config = read_run_config(DATA / "bridge_run_config.yaml")
        (Path(folder) / RUN_CONFIG).write_text(yaml.safe_dump({"model": config["model"] | sizes}))
    return checkpoints.expected(built)


COMMANDS = {
    "extract": {"--checkpoint": "fsdp", "--selection": "fsdp/selection.json"},
    "reorder": {"--checkpoint": "fsdp", "--placement": "placement.json"},
    "export": {"--checkpoint": "fsdp"},
    "merge": {"--parent": "fsdp", "--modules": "fsdp"},
    "compose": {"--parent": "fsdp", "--modules": "fsdp"},
}
"""The commands that open a Megatron checkpoint in their own process, and their inputs."""


RANKS: dict[str, list[str]] = {
    "stats": [],
    "select": ["--keep", "50%"],
    "retention": ["--keep", "50%", "--validation-data", "validation.jsonl"],
}
"""The commands that open a Megatron checkpoint in ranks, and their options beside --data."""


def _unconverted(source: Path, *, has_tracker: bool = True) -> Path:
    """A folder that Megatron-FSDP wrote, as far as a command looks before the command refuses the folder."""
    folder = source / "iter_0000007" if has_tracker else source
    folder.mkdir(parents=True)
    (folder / ".metadata").touch()
    if has_tracker:
        (source / "latest_checkpointed_iteration.txt").write_text("7")
    return source


@pytest.mark.parametrize("has_tracker", [True, False], ids=["run", "iteration"])
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_name_the_conversion(command, has_tracker, tmp_path, capsys):
    source = _unconverted(tmp_path / "fsdp", has_tracker=has_tracker)
    common: dict[str, Any] = {"num_experts": 4, "layers": (1,), "model": "0" * 64}
    Selection(**common, experts=((0, 1),), method="mean_prob", seed=None).save(source / "selection.json")
    order = ((3, 2, 1, 0),)
    Placement(**common, order=order, num_ranks=2, method="load", max_imbalance=1.1).save(tmp_path / "placement.json")
    inputs = [part for flag, name in COMMANDS[command].items() for part in (flag, str(tmp_path / name))]
    assert cli.main([command, *inputs, "--output", str(tmp_path / "out")]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert f"python -m emo_megatron.checkpoint.fsdp --checkpoint {source} " in told
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("command", "processes"), [*((name, 1) for name in RANKS), ("stats", 2)])
def test_commands_in_ranks_name_the_conversion(command, processes, tmp_path, monkeypatch, capfd):
    source = _unconverted(tmp_path / "fsdp")
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("numbers.jsonl", "validation.jsonl")):
        Path(name).write_text(json.dumps({"text": f"{number} 2"}) + "\n")
    before = sorted(tmp_path.rglob("*"))
    options = ["--checkpoint", str(source), "--data", "numbers.jsonl", "--nproc-per-node", str(processes)]
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, *options, *RANKS[command], "--output", "out"])
    assert stopped.value.code == 2
    (told,) = capfd.readouterr().err.splitlines()
    assert f"python -m emo_megatron.checkpoint.fsdp --checkpoint {source} " in told
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("is_grouped", [False, True], ids=["one by one", "grouped"])
def test_every_weight_is_written_again(ranks, tmp_path, is_grouped):
    source = tmp_path / "fsdp"
    (weights,) = ranks(1).run(_save, folder=str(source), is_grouped=is_grouped)
    with pytest.raises(ValueError, match=r"emo_megatron\.checkpoint\.fsdp --checkpoint"):
        MegatronCheckpoint(source)
    written = MegatronCheckpoint(convert(source, tmp_path / "again"))
    assert set(written.names) == set(weights)
    for name, value in weights.items():
        assert torch.equal(written.read(name), value), name
    assert not written.args.use_megatron_fsdp
    assert written.args.num_experts == 8


def test_a_checkpoint_of_bridge_gets_the_flags_of_its_run_config(ranks, tmp_path):
    source = tmp_path / "fsdp"
    (weights,) = ranks(1).run(_save, folder=str(source), is_grouped=True, is_bridge=True)
    with pytest.raises(ValueError, match=r"emo_megatron\.checkpoint\.fsdp --checkpoint"):
        MegatronCheckpoint(source)
    written = MegatronCheckpoint(convert(source, tmp_path / "again"))
    assert all(torch.equal(written.read(name), value) for name, value in weights.items())
    assert (written.args.num_experts, written.args.hidden_size, written.args.ckpt_format) == (8, 32, "torch_dist")


def test_a_checkpoint_without_some_experts_is_refused(ranks, tmp_path):
    source = tmp_path / "fsdp"
    ranks(1).run(_save, folder=str(source), is_grouped=True, num_experts=9)
    with pytest.raises(ValueError, match="all 9 experts"):
        convert(source, tmp_path / "again")


@pytest.mark.parametrize(
    ("stored", "is_local", "name"),
    [
        ("layers.0.input_layernorm.weight", True, "layers.0.self_attention.linear_qkv.layer_norm_weight"),
        ("layers.0.input_layernorm.weight", False, "layers.0.input_layernorm.weight"),
        ("layers.0.mlp.linear_fc1.layer_norm_weight", False, "layers.0.mlp.linear_fc1.layer_norm_weight"),
        ("layers.0.mlp.experts.linear_fc1.bias3_v", False, "layers.0.mlp.experts.experts.3.linear_fc1.bias_v"),
        ("layers.0.mlp.shared_experts.linear_fc1.weight_w", True, "layers.0.mlp.shared_experts.linear_fc1.weight_w"),
    ],
)
def test_names(stored, is_local, name):
    assert fsdp._name(f"model.module.module.decoder.{stored}", is_local=is_local) == f"decoder.{name}"


def _validated(output: str) -> list[str]:
    return re.findall(r"on validation set \| lm loss value: ([\d.E+-]+)", output)


def _flags(*, saved: Path, steps: int) -> tuple[list[object], list[object]]:
    """Of a run, and of Megatron-FSDP in it."""
    flags: list[object] = ["--pool-min", 3, "--bf16", "--calculate-per-token-loss"]
    flags += ["--use-distributed-optimizer", "--no-gradient-accumulation-fusion"]
    flags += ["--train-iters", steps]
    sharded: list[object] = ["--use-megatron-fsdp", "--ckpt-format", "fsdp_dtensor"]
    sharded += ["--data-parallel-sharding-strategy", "optim_grads_params"]
    return flags, [*sharded, "--save", saved, "--save-interval", 2]


needs_einops = pytest.mark.skipif(
    importlib.util.find_spec("einops") is None, reason="Megatron-FSDP needs einops, which is not installed"
)


@pytest.mark.slow
@needs_einops
def test_a_run_of_megatron_fsdp_resumes(tmp_path):
    flags, sharded = _flags(saved=tmp_path, steps=4)
    whole = pretrain(1, *flags, *sharded, "--lr", 1e-2, data=None)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    rest = pretrain(1, *flags, *sharded, "--lr", 1e-2, "--load", tmp_path, data=None)
    for name in ("grad norm", "pool_size"):
        assert logged(rest, name) == logged(whole, name)[2:], name
    # of weights that the loaded optimizer moved; Megatron keeps the first loss of a run in the mean of the next
    losses, (_, last) = logged(whole), logged(rest)
    assert last == pytest.approx(sum(losses[2:]) / 2, abs=1e-6)


@pytest.mark.slow
@needs_einops
def test_two_processes_of_megatron_fsdp_train_as_data_parallel_ones(tmp_path):
    flags, sharded = _flags(saved=tmp_path, steps=4)
    sharded = sharded[: sharded.index("--save")]
    outputs = [pretrain(2, *flags, *more, data=None) for more in ([], sharded)]
    plain, fsdp_ = (logged(output) for output in outputs)
    assert len(plain) == 4
    # in bf16, whose gradients are summed in another order
    assert fsdp_ == pytest.approx(plain, abs=2e-3)
    assert plain[0] - plain[-1] > 0.02
    plain, fsdp_ = (logged(output, "grad norm") for output in outputs)
    assert fsdp_ == pytest.approx(plain, abs=5e-3)


@pytest.mark.slow
@needs_einops
@pytest.mark.parametrize(("processes", "more"), [(1, []), (2, ["--no-save-optim"])])
def test_a_run_of_megatron_fsdp_goes_on_without_it(processes, more, tmp_path):
    flags, sharded = _flags(saved=tmp_path / "fsdp", steps=2)
    flags += ["--eval-iters", 1, "--eval-interval", 2]
    trained = pretrain(processes, *flags, *sharded, *more, "--lr", 1e-2, data=None)
    convert(tmp_path / "fsdp", tmp_path / "again")
    still = ["--lr", 0, "--min-lr", 0]
    loaded = ["--load", tmp_path / "again", "--finetune", "--no-load-optim"]
    again = pretrain(1, *flags, *still, *loaded, data=None)
    fresh = pretrain(1, *flags, *still, data=None)
    (want, found, other) = (float(_validated(output)[0]) for output in (trained, again, fresh))
    assert found == pytest.approx(want, rel=1e-4)
    assert other != pytest.approx(want, rel=1e-3)


def test_another_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="fsdp_dtensor"):
        convert(tmp_path, tmp_path / "again")
