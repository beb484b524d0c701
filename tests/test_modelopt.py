"""ModelOpt, the real package: pruning to a Selection, quantised modules, and what the commands say of quantised models.

ModelOpt has a folder of its own that `make modelopt` installs. Pruning needs Transformer Engine, for which the tests
have a stand-in that computes on a CPU.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import checkpoints
from support.ranks import free_port

from emo_megatron.cli import main as run_command

ROOT = Path(__file__).resolve().parents[1]
MODELOPT = Path(os.environ.get("EMO_TEST_MODELOPT", ROOT / ".venv" / "modelopt-0.47.0"))
TE_ON_CPU = ROOT / "tests" / "support" / "te_on_cpu"
pytestmark = pytest.mark.slow
KEPT = [[1, 2, 4, 6, 7], [0, 3, 4, 5, 6]]
GROUPS = {"moe_router_num_groups": 2, "moe_router_group_topk": 1}
BIASED = checkpoints.BIASED | GROUPS
LAYOUTS = [f"{kind}_parallel_size" for kind in ("tensor_model", "expert_model", "context", "pipeline_model")]


@pytest.fixture(scope="module")
def start_modelopt():
    """Runs a command beside ModelOpt, in one rank; an error if it fails."""
    if not MODELOPT.is_dir():
        pytest.skip("needs .venv/modelopt-0.47.0: make modelopt installs it")

    def run(*command, te=False, device="cpu"):
        folders = [TE_ON_CPU] * te + [MODELOPT, ROOT, ROOT / "tests", ROOT / "benchmarks"]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, folders)),
            "OMP_NUM_THREADS": "1",
            "EMO_DEVICE": device,
            "HF_HUB_OFFLINE": "1",
            **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())},
        }
        done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout

    return run


@pytest.fixture(scope="module")
def parents(ranks, tmp_path_factory):
    """Checkpoints of two models: a plain one, and one with an expert bias and groups of experts."""
    folder = tmp_path_factory.mktemp("parents")
    for name, config in {"plain": {}, "biased": BIASED}.items():
        ranks(1).run(checkpoints.save, folder=str(folder / name), layout={}, config=config)
    return folder


@pytest.fixture(scope="module")
def pruned(start_modelopt, parents):
    """What ModelOpt made of the parents, case by case."""
    right = {name: checkpoints.selection_of(parents / name, KEPT) for name in ("plain", "biased")}
    selections = right | {
        "foreign": dataclasses.replace(right["plain"], model="0" * 64),
        "uneven": checkpoints.selection_of(parents / "plain", [KEPT[0], KEPT[1][:4]]),
        "few": checkpoints.selection_of(parents / "plain", [[1], [2]]),
    }
    for name, selection in selections.items():
        selection.save(parents / f"{name}.json")

    def case(name, selection=None, **more):
        config = (BIASED if name == "biased" else {}) | more.pop("config", {})
        file = parents / f"{selection or name}.json"
        return {"checkpoint": str(parents / name), "selection": str(file), "config": config} | more

    grouped, pool = {"moe_grouped_gemm": True}, {"pool_min": 3}
    cases = {
        "stock": case("plain", calibrate=True),
        "stock grouped": case("plain", config=grouped),
        "stock biased": case("biased"),
        "pools": case("plain", pool=pool, calibrate=True),
        "pools grouped": case("plain", pool=pool, config=grouped),
        "pools biased": case("biased", pool=pool),
        "pools dedup": case("plain", pool=pool | {"pool_dispatcher": "dedup"}),
        "wrong ranking": case("plain", wrong_ranking=True),
        "wrong weight": case("plain", wrong_weight=True),
        "prediction": case("plain", config={"mtp_num_layers": 1}),
        **{name: case("plain", selection=name) for name in ("foreign", "uneven", "few")},
        **{name: case("plain", layout={name: 2}) for name in LAYOUTS},
    }
    job = parents / "job.json"
    job.write_text(json.dumps({"cases": cases, "results": str(parents / "results.pt")}))
    start_modelopt(sys.executable, "-m", "support.modelopt_prune", job, te=True)
    return torch.load(parents / "results.pt", weights_only=True)


@pytest.fixture(scope="module")
def extracted(ranks, parents, pruned):
    """Logits of the modules that `extract` writes, in Megatron's own layers."""
    found = {}
    for name in ("plain", "biased"):
        output = parents / f"{name} module"
        options = ["--checkpoint", parents / name, "--selection", parents / f"{name}.json", "--output", output]
        assert run_command(["extract", *map(str, options)]) == 0
        config = {"num_moe_experts": 5} | (checkpoints.BIASED if name == "biased" else {})
        found[name] = ranks(1).run(checkpoints.logits, folder=str(output), layout={}, config=config)[0]
    return found


CASES = [*("stock", "stock grouped", "stock biased"), *("pools", "pools grouped", "pools biased", "pools dedup")]


@pytest.mark.parametrize("name", CASES)
def test_a_pruned_model_equals_the_extracted_module(pruned, extracted, name):
    expected = extracted["biased" if "biased" in name else "plain"]
    torch.testing.assert_close(pruned[name]["logits"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_pruned_model_keeps_its_classes_and_trains(pruned, name):
    result = pruned[name]
    assert result["classes"] == ["PoolMoELayer" if "pools" in name else "MoELayer"] * 2
    assert result["dispatcher"] == ("PoolAlltoAllDispatcher" if "dedup" in name else "MoEAlltoAllTokenDispatcher")
    # as in an extracted module
    assert result["pools"] == [False, False]
    assert result["trains"]
    assert result["asked"] == (name in ("stock", "pools"))


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("foreign", "ValueError", "fingerprint"),
        ("uneven", "ValueError", "4 to 5"),
        ("few", "ValueError", "moe_router_topk 2"),
        ("prediction", "NotImplementedError", "mtp_num_layers 1"),
        ("wrong ranking", "RuntimeError", "[1, 2]"),
        ("wrong weight", "RuntimeError", "[2]"),
        *((name, "NotImplementedError", f"{name} 1; got 2") for name in LAYOUTS),
    ],
)
def test_a_model_that_would_be_wrong_is_an_error(pruned, name, error, words):
    assert pruned[name]["error"] == error
    assert words in pruned[name]["said"]
    assert "\n" not in pruned[name]["said"]


@pytest.fixture(scope="module")
def quantized(start_modelopt, tmp_path_factory):
    """The folder of quantised models, and what was measured of them."""
    folder = tmp_path_factory.mktemp("quantized")
    start_modelopt(sys.executable, "-m", "support.modelopt_quantize", folder, "megatron", "hf")
    return folder, json.loads((folder / "results.json").read_text())


# per layer: Megatron has two matrices per expert, each with a quantiser of the weight and of the input; Hugging Face
# has two matrices of all experts, each with a quantiser per expert's weight and one of the input
QUANTIZERS = {
    "megatron": {"both": 3 * 8 * 2 * 2, "weights": 3 * 8 * 2},
    "hf": {"both": 3 * (6 + 1) * 2, "weights": 3 * 6 * 2},
}


def _check_quantised(found, kind, format):
    one = found[kind][format]
    assert one["quantizers_of_experts"] == QUANTIZERS[kind]["weights" if format == "int4" else "both"]
    assert one["quantizers"] > one["quantizers_of_experts"]
    # quantised experts change the logits less than two experts in each other's place, in whichever layer: measured
    # up to half of that, and 0.95 and more if two experts are in each other's place after quantisation
    assert 0 < one["error_of_experts"] < 0.75 * min(found[kind]["swapped"])
    # with attention and shared experts; the error of unrelated logits is 1.4
    assert one["error_of_experts"] < one["error"] < 1


@pytest.mark.parametrize("kind", ["megatron", "hf"])
@pytest.mark.parametrize("format", ["int8", "fp8", "int4"])
def test_experts_are_quantised(quantized, kind, format):
    _check_quantised(quantized[1], kind, format)


@pytest.mark.parametrize("kind", ["megatron", "hf"])
def test_eight_bits_are_closer_than_four(quantized, kind):
    for error in ("error", "error_of_experts"):
        found = {name: quantized[1][kind][name][error] for name in ("int8", "fp8", "int4")}
        assert max(found["int8"], found["fp8"]) < found["int4"]


@pytest.mark.gpu
def test_experts_are_quantised_in_the_format_that_needs_a_gpu(start_modelopt, tmp_path):
    start_modelopt(sys.executable, "-m", "support.modelopt_quantize", tmp_path, "hf", device="cuda")
    _check_quantised(json.loads((tmp_path / "results.json").read_text()), "hf", "nvfp4")


@pytest.mark.parametrize(
    ("kind", "commands", "name"),
    [("megatron", ("stats", "export"), "_quantizer"), ("hf", ("stats", "import"), "quantization_config")],
)
def test_commands_refuse_what_modelopt_has_quantised(quantized, capfd, tmp_path, kind, commands, name):
    folder = quantized[0] / kind
    for command in commands:
        options = {"--checkpoint": folder, "--output": tmp_path / command}
        if command == "stats":
            options["--data"] = folder
        if command == "import":
            options["--folder"] = options.pop("--checkpoint")
        try:
            code = run_command([command, *(str(part) for pair in options.items() for part in pair)])
        except SystemExit as ended:
            # of a command that had started a process for Megatron
            code = ended.code
        said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert code == 2
        assert len(said) == 1
        assert name in said[0]
        assert list(tmp_path.iterdir()) == []
