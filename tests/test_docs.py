"""The README keeps its word: every command in it runs, every path in it exists, its code does what it says.

And the page on Megatron's scripts, which are in no wheel: its flags are Megatron's, its specs and files are ours.
"""

from __future__ import annotations

import calendar
import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from emo_megatron.config import PoolConfig, flag, load_pool_config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
DEMO = str(ROOT / "demo" / "demo.sh")
MEGATRON_PAGE = (ROOT / "docs" / "megatron.md").read_text()
MODULES_PAGE = (ROOT / "docs" / "modules.md").read_text()
SERVED = json.loads((ROOT / "benchmarks" / "results" / "serve.json").read_text())


def _commands() -> list[str]:
    """The commands of the shell blocks and those quoted in the text."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = [line.split(" #")[0] for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines = [" ".join(line.split()) for line in lines]
    quoted = re.findall(r"`((?:make|python|torchrun)\b[^`\n]*)`", README)
    return [line for line in [*lines, *quoted] if line]


def _run(command: list[str], **environment: str) -> str:
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


BALANCE = "--moe-router-load-balancing-type global_aux_loss --moe-aux-loss-coeff 0.00625 --moe-router-dtype fp32"

# where each command of the README is run
RUN_IN = {
    "make test": "test_docs.py::test_make_test_runs_tests",
    "make demo": "test_docs.py::test_make_demo_runs_the_demo",
    "make demo ARGS=--quick": "test_docs.py::test_the_quick_demo_leaves_its_files",
    "python -m emo_megatron env": "test_docs.py::test_env_runs",
    'make demo ARGS="--corpus FOLDER --output runs/mine"': "demo/test_recipe.py"
    "::test_a_folder_of_text_is_a_corpus_of_its_own",
    "make setup": "test_project.py::test_make_setup_takes_another_torch",
    "make help": "test_project.py::test_make_alone_lists_every_target",
    'make setup TORCH="torch==2.13.0"': "test_project.py::test_make_setup_takes_another_torch",
    "python examples/pretrain_emo.py --help": "test_pretrain.py::test_help_shows_the_pool_flags",
    "torchrun --nproc-per-node 8 examples/pretrain_emo.py --pool-min 8 --dataloader-inter-document-masking"
    f" {BALANCE} ...": "test_pretrain.py::test_layouts_train",
    """echo '{"pool_min": 8}' > pool.json && export EMO_POOL_CONFIG=$PWD/pool.json""": "test_docs.py::test_pools_of",
    "torchrun --nproc-per-node 8 pretrain_gpt.py --spec emo_megatron.mcore.spec pool_layer_spec"
    f" --dataloader-inter-document-masking {BALANCE} ...": "mcore/test_host_spec.py::test_a_script_that_knows",
    "torchrun --nproc-per-node 8 -m emo_megatron bridge --recipe olmoe_7b_pretrain_config model.pool_min=8"
    " dataset.data_path=data/web_text_document model.moe_router_load_balancing_type=global_aux_loss"
    " model.moe_aux_loss_coeff=0.00625": "bridge/test_page.py::test_its_commands_reach_the_recipe",
    **dict.fromkeys(
        re.findall(r"```bash\n(.*?)\n```", (ROOT / "docs" / "modules.md").read_text()),
        "test_tutorial.py::test_every_command_leaves_what_the_next_one_takes",
    ),
    "make test-serve": "serve/test_written.py::test_the_results_are_written",
    "transformers serve runs/python/hf": "test_tutorial.py::test_the_module_is_served",
}


def test_every_command_has_a_test():
    assert set(_commands()) == set(RUN_IN)
    for test in RUN_IN.values():
        file, name = test.split("::")
        assert f"def {name}" in (ROOT / "tests" / file).read_text(), test


def test_env_runs():
    assert "megatron-core" in _run([sys.executable, "-m", "emo_megatron", "env"])


# make would set up .venv, or install this checkout, editable, into the environment of another one
in_checkout = pytest.mark.skipif(
    not (ROOT / ".venv").exists() or (ROOT / ".venv").is_symlink(),
    reason="make would install into .venv, which is not here or is a link to another checkout's",
)


@in_checkout
def test_make_test_runs_tests():
    output = _run(["make", "test", "ARGS=tests/test_config.py -q -n 0"])
    assert re.search(r"\d+ passed", output)


@in_checkout
def test_make_demo_runs_the_demo():
    assert "--quick" in _run(["make", "demo", "ARGS=--help"])


@pytest.fixture(scope="module")
def quick_demo(tmp_path_factory):
    """A quick demo that was interrupted in its first training and continued; its folder and what it printed."""
    output = tmp_path_factory.mktemp("demo") / "run"
    command = [DEMO, "--quick", "--output", str(output)]
    first = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # of a test run in the background Ctrl-C is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    tracker = output / "emo" / "checkpoint" / "latest_checkpointed_iteration.txt"
    deadline = time.monotonic() + 240
    while not tracker.exists() and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.2)
    os.killpg(first.pid, signal.SIGINT)
    first.wait(timeout=60)
    return output, _run(command, PYTHON=sys.executable)


def test_the_quick_demo_leaves_its_files(quick_demo):
    output, printed = quick_demo
    rows = json.loads((output / "retention.json").read_text())
    domains = {row["domain"] for row in rows}
    assert {row["model"] for row in rows} == {"emo", "standard", "small"}
    # all experts, then chosen and random ones at 1/2 and 1/4, then each module elsewhere
    per_model = len(domains) * (1 + 2 * 2) + len(domains) * (len(domains) - 1)
    assert len(rows) == 2 * per_model + len(domains)
    assert all(0 < row["loss"] < 9 for row in rows)
    assert (output / "retention.csv").read_text().count("\n") == len(rows) + 1
    assert (output / "retention.png").stat().st_size > 20_000
    assert "1/4" in printed


def test_an_interrupted_training_went_on_from_its_checkpoint(quick_demo):
    output, _ = quick_demo
    log = (output / "emo" / "train.log").read_text()
    assert "successfully loaded checkpoint" in log
    iterations = [int(n) for n in re.findall(r"iteration\s+(\d+)/", log)]
    assert iterations[0] > 1
    assert iterations[-1] == 16


def test_a_second_call_of_the_demo_repeats_no_work(quick_demo):
    output, printed = quick_demo
    trained = (output / "emo" / "train.log").stat().st_mtime
    again = _run([DEMO, "--quick", "--output", str(output)], PYTHON=sys.executable)
    assert (output / "emo" / "train.log").stat().st_mtime == trained
    assert again.splitlines()[-5:] == printed.splitlines()[-5:]


@pytest.mark.parametrize("engine", SERVED["engines"], ids=lambda engine: engine["name"])
def test_engines_on_the_pages_are_those_that_ran(engine):
    year, month, day = SERVED["date"].split("-")
    named, version = engine["name"], engine["version"]
    difference = f"{engine['max_difference']:.1e}".replace("e-0", "e-")
    (row,) = re.findall(rf"^\| {named} \|.*$", README, flags=re.MULTILINE)
    for told in (version, difference, f"{int(day)} {calendar.month_name[int(month)]} {year}"):
        assert re.search(rf"(?<![\w.]){re.escape(told)}(?![\w.]\w)", row), told
    assert set(re.findall(r"\d+\.\d+\.\d+", row)) == {version}
    (row,) = re.findall(rf"^\| {named} {re.escape(version)} .*$", MODULES_PAGE, flags=re.MULTILINE)
    cells = [cell.strip() for cell in row.strip("| ").split("|")]
    positions = sum(model["positions"] for model in engine["models"].values())
    assert cells[:4] == [f"{named} {version}", str(len(engine["models"])), str(positions), difference]


def test_paths_exist():
    named = re.findall(r"`((?:examples|docs|tests|emo_megatron)/[\w./-]+)`", README)
    linked = re.findall(r"\]\(((?!http)[^)#]+)\)", README)
    tree = re.search(r"```\nemo_megatron/\n(.*?)```", README, flags=re.DOTALL)
    assert tree is not None
    for line in tree[1].splitlines():
        name = line.split()[0]
        named.append(f"emo_megatron/{name}" if line.startswith("  ") and name != "python" else name)
    for path in [*named, *linked]:
        assert (ROOT / path).exists(), path


def test_flags_exist():
    known = {flag(field.name) for field in dataclasses.fields(PoolConfig)}
    assert set(re.findall(r"--pool-[\w-]+", README)) <= known


def _two_lines():
    """The README's diff applied to Megatron's own model configuration."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.models.gpt import GPTModelConfig
    from support import tiny

    tiny.setup()
    namespace: dict = {"gpt_config_from_args": lambda args: args, "args": None}
    namespace["args"] = GPTModelConfig(
        transformer=tiny.transformer_config(num_moe_experts=16), vocab_size=64, seq_length=32
    )
    diff = re.search(r"```diff\n(.*?)```", README, flags=re.DOTALL)
    assert diff is not None
    code = [line[1:].strip() for line in diff[1].splitlines() if "..." not in line]
    exec("\n".join(code), namespace)
    config = namespace["model_cfg"]
    model = config.get_builder_cls()(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    return sorted({type(m).__name__ for m in model.modules() if "Pool" in type(m).__name__})


def test_the_two_line_change_builds_the_pool_model(ranks):
    assert ranks(1).run(_two_lines)[0] == ["PoolMoELayer", "PoolRouter", "PoolTransformerLayer"]


def _megatron_commands(page: str) -> list[list[str]]:
    """The words of the page's torchrun commands for a script, from the script on."""
    blocks = re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line) for line in lines if re.match(r"torchrun .*\.py ", line)]
    return [line[next(i for i, word in enumerate(line) if word.endswith(".py")) :] for line in words]


@pytest.mark.parametrize(
    "words", _megatron_commands(MEGATRON_PAGE) + _megatron_commands(README), ids=lambda words: Path(words[0]).stem
)
def test_flags_of_the_pages_are_megatrons(words, monkeypatch):
    from megatron.core.transformer.spec_utils import import_module
    from megatron.training.arguments import parse_args

    from emo_megatron.mcore.args import add_pool_args

    monkeypatch.setattr("sys.argv", [word for word in words if word != "..."])
    is_ours = words[0] == "examples/pretrain_emo.py"
    args = parse_args(add_pool_args if is_ours else None)
    assert args.dataloader_inter_document_masking
    assert args.pool_min == 8 if is_ours else callable(import_module(args.spec))
    if "hybrid" not in words[0]:
        assert args.moe_router_dtype == "fp32"
        assert args.moe_router_load_balancing_type == ["global_aux_loss"]
        assert args.moe_aux_loss_coeff


def test_pools_of_the_pages_are_pools(tmp_path):
    written = re.findall(r"```json\n(.*?)```", MEGATRON_PAGE, flags=re.DOTALL)
    written += re.findall(r"echo '(.*)' > pool.json", MEGATRON_PAGE + README)
    assert len(written) == 4
    for text in written:
        (tmp_path / "pool.json").write_text(text)
        assert load_pool_config(tmp_path / "pool.json").is_on


def test_names_on_the_megatron_page_exist():
    from importlib import import_module

    for name in set(re.findall(r"emo_megatron(?:\.\w+)+", MEGATRON_PAGE)):
        module, _, attribute = name.rpartition(".")
        assert (ROOT / (name.replace(".", "/") + ".py")).exists() or hasattr(import_module(module), attribute), name
    for path in re.findall(r"`((?:examples|tests)/[\w./]+)`", MEGATRON_PAGE):
        assert (ROOT / path).exists(), path
