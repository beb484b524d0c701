"""A LoRA adapter that peft trained on an exported module becomes a module of Megatron, and goes into the parent."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import checkpoints, decoder, lora, words

from emo_megatron.checkpoint.reader import MegatronCheckpoint
from emo_megatron.cli import main
from emo_megatron.commands import extract, merge

pytest.importorskip("peft")
KEPT = [[1, 2, 6, 7], [0, 3, 4, 6]]
TARGETS: dict[str, dict[str, Any]] = {
    "experts": {"target_parameters": lora.EXPERTS},
    "experts+router": {"target_parameters": lora.EXPERTS + lora.ROUTER},
    "all": {"target_parameters": lora.EXPERTS + lora.ROUTER, "target_modules": lora.LINEAR},
}
"""What is trained, by what of it `merge` takes."""


@pytest.fixture(scope="module")
def module(ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A module beside its parent."""
    root = tmp_path_factory.mktemp("import")
    sizes = {"num_kv_heads": 4, "num_experts": 8, "renormalise": True, "max_positions": 32}
    ranks(1).run(checkpoints.save_run, folder=str(root / "parent"), layout={}, config={}, **sizes)
    selection = checkpoints.selection_of(root / "parent", KEPT).save(root / "kept.json")
    options = extract.Options(checkpoint=root / "parent", selection=selection, output=root / "module")
    return extract.run(options)


def through_peft(module: str, root: str, config: dict[str, Any]) -> float:
    """Export, train, import; the difference of a logit between the two models of the tuned module."""
    from emo_megatron.commands import export, import_

    folder = Path(root)
    export.run(export.Options(checkpoint=Path(module), output=folder / "hf", parity_tokens=0))
    lora.train(folder / "hf", folder / "adapter", **config)
    tuned = import_.Options(folder=folder / "hf", adapter=folder / "adapter", output=folder / "tuned", parity_tokens=32)
    parity = import_.run(tuned).parity
    assert parity is not None
    return parity.max_difference


@pytest.mark.parametrize("weights", TARGETS)
def test_what_peft_trained_is_in_the_parent(ranks, module: Path, tmp_path: Path, weights: str) -> None:
    (difference,) = ranks(1).run(through_peft, module=str(module), root=str(tmp_path), config=TARGETS[weights])
    assert difference < 1e-4
    tuned = tmp_path / "tuned"
    assert (tuned / "adapter_config.json").read_bytes() == (tmp_path / "adapter" / "adapter_config.json").read_bytes()
    output = tmp_path / "merged"
    merge.run(merge.Options(parent=module.parent / "parent", modules=(tuned,), output=output, weights=weights))
    allowed = checkpoints.selection_of(module.parent / "parent", KEPT).keep_mask().tolist()
    limited, cut, before = (
        ranks(1).run(checkpoints.logits, folder=str(folder), layout={}, config=config, allowed=mask)[0]
        for folder, config, mask in (
            (output, {}, allowed),
            (tuned, {"num_moe_experts": 4}, None),
            (module, {"num_moe_experts": 4}, None),
        )
    )
    assert (limited - cut).abs().max() <= 1e-6 * cut.abs().max()
    assert (limited - before).abs().max() > 1e-2
    check_experts(MegatronCheckpoint(module.parent / "parent"), MegatronCheckpoint(output), tmp_path)


def check_experts(before: MegatronCheckpoint, after: MegatronCheckpoint, folder: Path) -> None:
    """The kept experts are those of the export and what peft added; the others are the parent's."""
    exported = load_file(folder / "hf" / "model.safetensors")
    for layer, kept in enumerate(KEPT):
        for kind, parts in (("fc1", ("gate_proj", "up_proj")), ("fc2", ("down_proj",))):
            name = f"decoder.layers.{layer}.mlp.experts.experts.linear_{kind}.weight"
            wanted = before.read(name)
            for row, expert in enumerate(kept):
                at = [f"model.layers.{layer}.mlp.experts.{row}.{part}.weight" for part in parts]
                found = [exported[n] + lora.change_of(n, folder / "adapter", num_experts=4, scale=2.0) for n in at]
                assert (torch.cat(found) - wanted[expert]).abs().max() > 1e-3
                wanted[expert] = torch.cat(found)
            torch.testing.assert_close(after.read(name), wanted, rtol=0, atol=1e-6)


def test_shared_weights_stay_the_parents_by_default(ranks, module: Path, tmp_path: Path) -> None:
    config = {"target_modules": ["o_proj"], "target_parameters": lora.EXPERTS}
    ranks(1).run(through_peft, module=str(module), root=str(tmp_path), config=config)
    parent = module.parent / "parent"
    merged = tmp_path / "merged"
    merge.run(merge.Options(parent=parent, modules=(tmp_path / "tuned",), output=merged))
    name = "decoder.layers.1.self_attention.linear_proj.weight"
    before, trained, after = (MegatronCheckpoint(path).read(name) for path in (parent, tmp_path / "tuned", merged))
    assert torch.equal(before, after)
    assert not torch.equal(before, trained)
    assert name in {row["weight"] for row in checkpoints.report(merged)["left_out"]}


def test_the_command_tells_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = decoder.write_folder(tmp_path / "hf")
    words.write_tokenizer(base)
    adapter = lora.train(base, tmp_path / "adapter", target_modules=["shared_expert_gate"])
    command = ["import", "--folder", base, "--adapter", adapter, "--output", tmp_path / "new", "--parity-tokens", 0]

    def said(*, status: int) -> str:
        capsys.readouterr()
        assert main([str(part) for part in command]) == status
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == (status != 0)
        assert (tmp_path / "new").exists() == (status == 0)
        return "".join(errors)

    assert "shared_expert_gate" in said(status=2)
    shutil.rmtree(adapter)
    lora.train(base, adapter, target_modules=["q_proj"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        patch.delitem(sys.modules, "emo_megatron.hf.adapter", raising=False)
        patch.delattr("emo_megatron.hf.adapter", raising=False)
        assert "import needs peft" in said(status=2)
    said(status=0)
    assert (tmp_path / "new" / "tokenizer").is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "hf", "new"]
