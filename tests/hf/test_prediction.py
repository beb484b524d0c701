"""Exports of models with multi-token prediction: dropped, or beside the model where no loader finds the layers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import checkpoints

from emo_megatron.checkpoint.reader import MegatronCheckpoint
from emo_megatron.experts.selection import load_selection
from emo_megatron.files import whole
from emo_megatron.hf.folder import INDEX, HuggingFaceFolder
from emo_megatron.hf.mapping import FUSED_NORM, OWN_NORM
from emo_megatron.hf.prediction import FILE, Prediction

CONFIG = {"mtp_num_layers": 2, "moe_router_pre_softmax": True}
SIZES = {"num_kv_heads": 4, "num_experts": 8, "max_positions": 64}
PROJECTION = "mtp.layers.0.eh_proj.weight"
KEPT = [[1, 2, 6, 7], [0, 3, 4, 6], [0, 1, 4, 5], [2, 3, 5, 7]]


def _saved(ranks, folder, config):
    ranks(1).run(checkpoints.save_run, folder=str(folder), layout={}, config=config, **SIZES)
    return folder


@pytest.fixture(scope="module")
def trained(ranks, tmp_path_factory):
    return _saved(ranks, tmp_path_factory.mktemp("trained") / "run", CONFIG)


def there_and_back(folder: str, output: str) -> dict[str, Any]:
    """Export in both ways, and import what was kept, for both kinds of Megatron's layers."""
    from transformers import Qwen2MoeForCausalLM

    from emo_megatron.commands import export, import_

    checkpoint, root = Path(folder), Path(output)
    said, loaded = {}, {}
    for mtp in ("drop", "keep"):
        options = export.Options(checkpoint=checkpoint, output=root / mtp, mtp=mtp, parity_tokens=16)
        said[mtp] = str(export.run(options))
        _, loaded[mtp] = Qwen2MoeForCausalLM.from_pretrained(root / mtp, output_loading_info=True)
    for engine in ("local", "transformer_engine"):
        how = {"transformer_impl": engine, "parity_tokens": 16 if engine == "local" else 0}
        import_.run(import_.Options(folder=root / "keep", output=root / engine, **how))
    import_.run(import_.Options(folder=root / "drop", output=root / "without", parity_tokens=0))
    return {"said": said, "loaded": {mtp: {k: sorted(v) for k, v in info.items()} for mtp, info in loaded.items()}}


@pytest.mark.parametrize("repeated", [False, True], ids=["a layer per depth", "one layer"])
def test_there_and_back(ranks, trained, tmp_path, repeated):
    folder = _saved(ranks, tmp_path / "run", CONFIG | {"mtp_use_repeated_layer": True}) if repeated else trained
    (answer,) = ranks(1).run(there_and_back, folder=str(folder), output=str(tmp_path))
    assert not any(found for info in answer["loaded"].values() for found in info.values()), "transformers sees nothing"
    before = MegatronCheckpoint(folder)
    for mtp, word in (("drop", "dropped"), ("keep", FILE)):
        assert word in answer["said"][mtp]
        assert word in (tmp_path / mtp / "README.md").read_text()
        assert (tmp_path / mtp / FILE).exists() == (mtp == "keep")
        # with an index vLLM and SGLang load only the files that the index names
        assert (tmp_path / mtp / INDEX).exists() == (mtp == "keep")
    index = json.loads((tmp_path / "keep" / INDEX).read_text())["weight_map"]
    assert set(index.values()) == {"model.safetensors"}
    assert not any(name.startswith("mtp") for name in index)
    again, other, without = (MegatronCheckpoint(tmp_path / name) for name in ("local", "transformer_engine", "without"))
    assert again.names == before.names
    for name in before.names:
        assert torch.equal(again.read(name), before.read(name)), name
        assert torch.equal(other.read(name.replace(FUSED_NORM, OWN_NORM)), before.read(name)), name
    assert again.fingerprint == before.fingerprint == other.fingerprint
    for flag in ("mtp_num_layers", "mtp_use_repeated_layer"):
        assert getattr(again.args, flag) == getattr(before.args, flag)
    assert (without.moe_layers, without.args.mtp_num_layers) == ((1, 2), None)


def exported_module(folder: str, output: str, kept: list[list[int]]) -> None:
    """A module with these experts, exported with its layers in bfloat16; and without, imported and exported again."""
    from emo_megatron.commands import export, extract, import_

    root = Path(output)
    selection = checkpoints.selection_of(Path(folder), kept).save(root / "kept.json")
    extract.run(extract.Options(checkpoint=Path(folder), selection=selection, output=root / "module"))
    options = {"dtype": "bfloat16", "mtp": "keep", "parity_tokens": 0}
    export.run(export.Options(checkpoint=root / "module", output=root / "hf", **options))
    export.run(export.Options(checkpoint=root / "module", output=root / "dropped", parity_tokens=0))
    import_.run(import_.Options(folder=root / "dropped", output=root / "imported", parity_tokens=0))
    import_.run(import_.Options(folder=root / "hf", output=root / "kept", parity_tokens=0))
    export.run(export.Options(checkpoint=root / "imported", output=root / "again", parity_tokens=0))


def test_a_module_is_exported_with_its_layers(ranks, trained, tmp_path):
    ranks(1).run(exported_module, folder=str(trained), output=str(tmp_path), kept=KEPT)
    stored, before = load_file(tmp_path / "hf" / FILE), MegatronCheckpoint(trained)
    for name in ("mlp.router.weight", "mlp.experts.experts.linear_fc1.weight"):
        name = f"mtp.layers.1.transformer_layer.{name}"
        assert torch.equal(stored[name], before.read(name, KEPT[3]).bfloat16())
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert HuggingFaceFolder(tmp_path / "hf").architecture.num_experts == 4
    for name, layers in (("hf", (1, 2, 3, 4)), ("kept", (1, 2, 3, 4)), ("dropped", (1, 2)), ("again", (1, 2))):
        selection = load_selection(tmp_path / name / "selection.json")
        assert selection.by_layer == {layer: tuple(KEPT[layer - 1]) for layer in layers}
        assert selection.model == before.fingerprint


def refused(folder: str, output: str, format: str = "qwen2_moe") -> str:
    """What is said of --mtp keep for a model without prediction, or a format without a place for it."""
    from emo_megatron.commands import export

    options = {"checkpoint": Path(folder), "output": Path(output), "mtp": "keep", "parity_tokens": 0}
    try:
        export.run(export.Options(**options, format=format))
    except ValueError as error:
        return str(error)
    return ""


def test_nothing_can_be_kept_of_a_model_without_prediction(ranks, tmp_path):
    plain = _saved(ranks, tmp_path / "plain", {"moe_router_pre_softmax": True})
    (said,) = ranks(1).run(refused, folder=str(plain), output=str(tmp_path / "new"))
    assert "--mtp keep" in said
    assert not (tmp_path / "new").exists()


def test_a_file_for_llama_cpp_has_no_place_for_prediction(ranks, trained, tmp_path):
    (said,) = ranks(1).run(refused, folder=str(trained), output=str(tmp_path / "new"), format="gguf")
    assert "--mtp keep" in said
    assert "--format gguf" in said
    assert not (tmp_path / "new").exists()


def refused_for_a_shape(folder: str, output: str) -> tuple[str, list[str]]:
    """What export says of a projection that lost a row, and the outputs that export began to write."""
    from emo_megatron.checkpoint.writer import write_checkpoint
    from emo_megatron.commands import export

    stored, root = MegatronCheckpoint(folder), Path(output)
    weights = {name: stored.read(name) for name in stored.names}
    weights[PROJECTION] = weights[PROJECTION][1:]
    changed = write_checkpoint(root / "changed", weights, args=stored.args)
    written: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "whole", lambda path, **_how: written.append(str(path)) or whole(path, is_new=True))
        said = refused(str(changed), str(root / "new"))
    return said, written


def test_another_shape_is_refused_before_anything_is_written(ranks, trained, tmp_path):
    ((said, written),) = ranks(1).run(refused_for_a_shape, folder=str(trained), output=str(tmp_path))
    assert PROJECTION in said
    assert "[32, 64]" in said
    assert "[31, 64]" in said
    assert "\n" not in said
    assert written == []
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def kept(ranks, trained, tmp_path_factory):
    root = tmp_path_factory.mktemp("kept")
    ranks(1).run(exported_module, folder=str(trained), output=str(root), kept=KEPT)
    return root / "hf"


REPEATED = '{"mtp_num_layers": 2, "mtp_use_repeated_layer": "maybe"}'


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tensors, header: tensors.pop("mtp.layers.0.enorm.weight"), "missing.*enorm"),
        (lambda tensors, header: tensors.update(more=torch.zeros(1).bfloat16()), "no place.*more"),
        (lambda tensors, header: header.pop("emo_megatron"), "export --mtp keep"),
        (lambda tensors, header: header.update(flags='{"mtp_num_layers": 1}'), "no place"),
        (lambda tensors, header: header.update(flags='{"mtp_num_layers": 9999}'), "mtp_num_layers"),
        (lambda tensors, header: header.update(flags="[]"), "mtp_num_layers"),
        (lambda tensors, header: header.update(flags=REPEATED), "mtp_use_repeated_layer"),
        (lambda tensors, header: header.update(flags="{"), FILE),
        (lambda tensors, header: tensors.update({n: t.float() for n, t in tensors.items()}), "bfloat16"),
        (lambda tensors, header: tensors.update({n: t[1:] for n, t in tensors.items()}), "shape"),
    ],
)
def test_another_file_is_named(kept, tmp_path, change, told):
    copy = shutil.copytree(kept, tmp_path / "copy")
    source = HuggingFaceFolder(copy)
    whole = {"architecture": source.architecture, "dtype": source.dtype}
    assert Prediction(copy, **whole).flags == {"mtp_num_layers": 2, "mtp_use_repeated_layer": False}
    tensors = load_file(copy / FILE)
    with safe_open(copy / FILE, framework="pt") as opened:
        header = opened.metadata()
    change(tensors, header)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, copy / FILE, metadata=header)
    with pytest.raises(ValueError, match=told) as error:
        Prediction(copy, **whole)
    assert FILE in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_was_cut_is_named(kept, tmp_path):
    copy = shutil.copytree(kept, tmp_path / "copy")
    (copy / FILE).write_bytes((copy / FILE).read_bytes()[:-100])
    source = HuggingFaceFolder(copy)
    with pytest.raises(ValueError, match=f"{FILE} is damaged"):
        Prediction(copy, source.architecture, dtype=source.dtype)
