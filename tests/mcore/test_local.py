"""The flags of a run without Transformer Engine: the page and the function agree, and Megatron trains with them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from support.pretraining import SCRIPT, logged, pretrain

from emo_megatron.mcore import cpu
from emo_megatron.mcore.cpu import local_flags

ROOT = Path(__file__).resolve().parents[2]
VALUES = {
    "transformer_impl": "local",
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_dropout_fusion": False,
    "bias_swiglu_fusion": False,
    "apply_rope_fusion": False,
    "no_persist_layer_norm": True,
}
"""What the flags set in Megatron's arguments, each another value than its default."""


def test_the_page_lists_the_flags():
    page = (ROOT / "docs" / "megatron.md").read_text()
    section = page.split("## Without Transformer Engine\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```bash\n(.*?)```", section, flags=re.DOTALL)
    assert shlex.split(block.replace("\\\n", " ")) == local_flags()


def test_megatron_parses_every_flag_to_another_value_than_its_default(monkeypatch):
    from megatron.core.transformer.enums import AttnBackend
    from megatron.training.arguments import parse_args

    def parsed(*flags: str) -> dict[str, object]:
        monkeypatch.setattr("sys.argv", ["pretrain.py", *flags])
        return vars(parse_args())

    default, found = parsed(), parsed(*local_flags())
    changed = {name: value for name, value in found.items() if default[name] != value}
    assert changed == VALUES | {"attention_backend": AttnBackend.unfused}


def test_a_cpu_adds_them_too():
    flags = iter(cpu.CPU_FLAGS)
    assert all(flag in flags for flag in local_flags()), "in their order, values behind names"


@pytest.fixture
def script_without_cpu_flags(tmp_path):
    """The entry script, to which a CPU adds nothing but what the redirected devices need."""
    script = tmp_path / "pretrain.py"
    script.write_text(
        "import runpy\nfrom emo_megatron.mcore import cpu\n"
        "cpu.CPU_FLAGS = ('--distributed-backend', 'gloo', '--use-cpu-initialization')\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    return script


def test_a_run_trains_with_them_in_half_precision(script_without_cpu_flags, data_prefix):
    flags = ["--pool-min", 3, "--bf16", *local_flags()]
    losses = logged(pretrain(1, *flags, data=data_prefix, script=script_without_cpu_flags))
    assert len(losses) == 4
    assert losses[-1] < losses[0]
