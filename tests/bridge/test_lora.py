"""LoRA of Bridge on exported modules (support/bridge_lora.py): trained, exported for peft, imported into Megatron."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import lora

from emo_megatron.hf.folder import HuggingFaceFolder

pytest.importorskip("peft")
pytestmark = pytest.mark.slow
TOKENS_T = torch.arange(40) * 7 % 80
IMPORTED = ("trained", "gated", "dense", "experts", "down", "shared", "router", "normalised")


@pytest.fixture(scope="module")
def adapters(run_bridge: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per adapter."""
    folder = tmp_path_factory.mktemp("lora")
    run_bridge("-m", "support.bridge_lora", folder)
    return folder


@pytest.fixture(scope="module")
def errors(adapters: Path) -> dict[str, list[str]]:
    """Type and message of each export's error."""
    found: dict[str, list[str]] = json.loads((adapters / "lora.json").read_text())
    return found


@pytest.mark.parametrize("name", IMPORTED)
def test_the_merged_model_is_the_adapted_model_of_bridge(
    name: str, adapters: Path, errors: dict[str, list[str]], tmp_path: Path
) -> None:
    from emo_megatron.hf import adapter

    assert errors[name] == ["", ""]
    folder = adapters / name
    wanted_TV = load_file(folder / "adapter.safetensors")["logits"]
    with adapter.merged(HuggingFaceFolder(folder / "base"), folder / "adapter", output=tmp_path / "out") as merged:
        found_TV = lora.logits(lora.load(merged.path), TOKENS_T)
    torch.testing.assert_close(found_TV, wanted_TV, rtol=0, atol=1e-4)
    assert (lora.logits(lora.load(folder / "base"), TOKENS_T) - wanted_TV).abs().max() > 1


def test_a_trained_adapter_becomes_a_checkpoint(adapters: Path, tmp_path: Path) -> None:
    folder = adapters / "trained"
    command = [sys.executable, "-m", "emo_megatron", "import", "--folder", folder / "base"]
    command += ["--adapter", folder / "adapter", "--output", tmp_path / "out"]
    # the command compares the logits of transformers and Megatron
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "adapter_config.json").is_file()


def test_an_adapter_without_a_place_is_one_line(adapters: Path, errors: dict[str, list[str]], tmp_path: Path) -> None:
    from emo_megatron.hf import adapter

    kind, message = errors["router of the authors"]
    assert kind == "NotImplementedError"
    assert "mlp.gate" in message
    assert "qwen2_moe" in message
    assert "\n" not in message
    # peft cannot stack one of the two weights
    assert errors["gate and up"] == ["", ""]
    base = HuggingFaceFolder(adapters / "gate and up" / "base")
    with (
        pytest.raises(ValueError, match="down_proj"),
        adapter.merged(base, adapters / "gate and up" / "adapter", output=tmp_path / "out"),
    ):
        pass
