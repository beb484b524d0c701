"""The README keeps its word: every command in it runs, every path in it exists, its code does what it says."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from emo_megatron.config import PoolConfig, flag

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def _commands() -> list[str]:
    """The commands of the shell blocks and those quoted in the text."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    quoted = re.findall(r"`((?:make|python|torchrun)\b[^`]*)`", README)
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


# where each command of the README is run; the value says how
RUN_ELSEWHERE = {
    "make test": "is what runs this test; test_make_test_runs_tests starts it on one file",
    'make setup TORCH="torch==2.13.0"': "tests/test_project.py",
    "make help": "tests/test_project.py",
    "python examples/pretrain_emo.py --help": "tests/test_pretrain.py",
    "torchrun --nproc-per-node 8 examples/pretrain_emo.py --pool-min 8"
    " --dataloader-inter-document-masking ...": "tests/test_pretrain.py",
    "make demo": "the quick one below; the full one is the README's figure",
    "make demo ARGS=--quick": "below",
    "python -m emo_megatron env": "below",
}


def test_every_command_has_a_test():
    assert set(_commands()) == set(RUN_ELSEWHERE)


def test_env_runs():
    assert "megatron-core" in _run([".venv/bin/python", "-m", "emo_megatron", "env"])


def test_make_test_runs_tests():
    output = _run(["make", "test", "ARGS=tests/test_config.py -q"])
    assert re.search(r"\d+ passed", output)


@pytest.fixture(scope="module")
def quick_demo(tmp_path_factory):
    """`make demo ARGS=--quick`, its output folder and what it printed."""
    output = tmp_path_factory.mktemp("demo") / "run"
    return output, _run(["make", "demo", f"ARGS=--quick --output {output}"])


def test_the_quick_demo_leaves_its_files(quick_demo):
    output, printed = quick_demo
    for name in ("retention.csv", "retention.json", "retention.png"):
        assert (output / name).stat().st_size > 500, name
    for word in ("EMO", "standard", "small", "1/4"):
        assert word in printed


def test_a_second_call_of_the_demo_repeats_no_work(quick_demo):
    output, printed = quick_demo
    trained = (output / "emo" / "train.log").stat().st_mtime
    again = _run(["make", "demo", f"ARGS=--quick --output {output}"])
    assert (output / "emo" / "train.log").stat().st_mtime == trained
    assert again.splitlines()[-5:] == printed.splitlines()[-5:]


def test_the_demo_refuses_a_folder_of_another_run(quick_demo):
    output, _ = quick_demo
    done = subprocess.run(
        [".venv/bin/python", "-m", "emo_megatron", "demo", "--output", str(output)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert "other settings" in done.stderr
    assert "Traceback" not in done.stderr


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
    known = {flag(name) for name in PoolConfig().to_dict()}
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
    model = config.get_builder_cls()(config).build_model(
        ProcessGroupCollection.use_mpu_process_groups()
    )
    return sorted({type(m).__name__ for m in model.modules() if "Pool" in type(m).__name__})


def test_the_two_line_change_builds_the_pool_model(ranks):
    assert ranks(1).run(_two_lines)[0] == ["PoolMoELayer", "PoolRouter", "PoolTransformerLayer"]
