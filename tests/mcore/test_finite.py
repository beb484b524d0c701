"""No command writes a checkpoint or a folder of weights that are not finite: each names weight, layer and expert."""

from __future__ import annotations

import contextlib
import io
import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import checkpoints, decoder
from support.checkpoints import placement_of, selection_of

from emo_megatron.checkpoint import writer
from emo_megatron.checkpoint.reader import MegatronCheckpoint
from emo_megatron.checkpoint.writer import write_checkpoint
from emo_megatron.cli import main
from emo_megatron.commands import compose, export, extract, import_, merge
from emo_megatron.finite import NotFiniteError
from emo_megatron.hf.folder import HuggingFaceFolder, write_folder
from emo_megatron.hf.formats import FORMATS
from emo_megatron.runners import parity as hf_parity
from emo_megatron.runners.parity import measure_parity

KEPT = [[1, 2, 6, 7], [0, 3, 4, 6]]
FC2 = "decoder.layers.1.mlp.experts.experts.linear_fc2.weight"
PLACES = {
    FC2: " (layer 2, expert 6)",
    "decoder.layers.0.mlp.router.weight": " (layer 1, expert 6)",
    "decoder.layers.0.self_attention.linear_qkv.weight": " (layer 1)",
    "decoder.final_layernorm.weight": "",
}
"""Weights, and where the seventh row of each lies."""


@pytest.fixture(scope="module")
def parent(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finite") / "parent"
    ranks(1).run(checkpoints.save, folder=str(folder), layout={}, config={})
    return folder


@pytest.fixture
def rewritten(monkeypatch):
    """Writes a checkpoint's weights, changed, as nobody should: without a look at them."""

    def write(folder, source, change, *, notes=None):
        checkpoint = MegatronCheckpoint(source)
        weights = {name: change(name, checkpoint.read(name)) for name in checkpoint.names}
        with monkeypatch.context() as patched:
            patched.setattr(writer, "check_weight", lambda *args, **options: None)
            return write_checkpoint(folder, weights, args=checkpoint.args, notes=notes)

    return write


def spoiled(name, *, row=6, value=math.nan):
    def change(other, weight):
        if other == name:
            weight[row] = value
        return weight

    return change


def cut(parent, folder):
    """A module of a parent, and its Selection."""
    selection = selection_of(parent, KEPT)
    file = selection.save(folder.with_suffix(".json"))
    output = extract.run(extract.Options(checkpoint=parent, selection=file, output=folder))
    return output, selection


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", PLACES)
def test_a_checkpoint_of_such_a_weight_is_not_written(parent, tmp_path, name, value):
    checkpoint = MegatronCheckpoint(parent)
    weights = {other: checkpoint.read(other) for other in checkpoint.names}
    weights[name][6] = value
    with pytest.raises(NotFiniteError) as told:
        write_checkpoint(tmp_path / "new", weights, args=checkpoint.args)
    assert f"{name}{PLACES[name]} holds {value}" in str(told.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", PLACES)
def test_what_is_made_of_a_parent_is_told_by_the_parents_numbers(parent, rewritten, tmp_path, name):
    broken = rewritten(tmp_path / "broken", parent, spoiled(name))
    module, _ = cut(parent, tmp_path / "module")
    selection = selection_of(broken, KEPT).save(tmp_path / "s.json")
    placement = placement_of(broken).save(tmp_path / "p.json")
    # a module knows its parent by the routers
    module_selection = selection_of(broken, KEPT).save(tmp_path / "m.json")
    new = tmp_path / "new"
    for command in (
        ["extract", "--checkpoint", broken, "--selection", selection],
        ["reorder", "--checkpoint", broken, "--placement", placement],
        ["merge", "--parent", broken, "--modules", module, "--selections", module_selection],
        [
            *("compose", "--parent", broken, "--modules", module),
            *("--selections", module_selection, "--router", "parent"),
        ],
    ):
        assert _main([*command, "--output", new]).count(f"{name}") == 1, command
        assert PLACES[name] in _main([*command, "--output", new])
        assert not new.exists()
    assert not list(tmp_path.glob(".*"))


def _main(command):
    """What a command says that cannot be done."""
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        assert main([str(part) for part in command]) == 2
    (error,) = [line for line in told.getvalue().splitlines() if line.startswith("error: ")]
    return error


def test_a_broken_module_is_told_before_its_disagreements(parent, rewritten, tmp_path):
    module, selection = cut(parent, tmp_path / "module")
    notes = {"selection.json": selection.save}
    # the module's third row is the parent's expert 4 in the second layer
    broken = [rewritten(tmp_path / name, module, spoiled(FC2, row=2), notes=notes) for name in ("one", "two")]
    for modules in (broken[:1], broken):
        with pytest.raises(NotFiniteError, match=r"of .*one.* \(layer 2, expert 4\)"):
            merge.run(merge.Options(parent=parent, modules=tuple(modules), output=tmp_path / "new"))
        with pytest.raises(NotFiniteError, match=r"of .*one.* \(layer 2, expert 4\)"):
            compose.run(compose.Options(modules=tuple(modules), output=tmp_path / "new", shared="one"))
    assert not (tmp_path / "new").exists()


def test_experts_that_are_finite_can_be_cut_out_of_others(parent, rewritten, tmp_path):
    broken = rewritten(tmp_path / "broken", parent, spoiled(FC2, row=7))
    module, _ = cut(broken, tmp_path / "module")
    found, wanted = MegatronCheckpoint(module).read(FC2), MegatronCheckpoint(parent).read(FC2)
    assert torch.equal(found, wanted[KEPT[1]])


def test_what_becomes_infinite_on_the_way_is_not_written(parent, rewritten, tmp_path):
    """The mean of two finite weights, whose sum is not."""
    module, selection = cut(parent, tmp_path / "module")
    modules = tuple(
        rewritten(tmp_path / name, module, spoiled(FC2, row=2, value=value), notes={"selection.json": selection.save})
        for name, value in (("one", 3e38), ("two", 2e38))
    )
    options = merge.Options(parent=parent, modules=modules, output=tmp_path / "new", conflict="average")
    with pytest.raises(NotFiniteError, match=r"linear_fc2.weight \(layer 2, expert 4\) holds inf"):
        merge.run(options)
    assert not (tmp_path / "new").exists()


def folder_of(path, *, format="qwen2_moe", change=lambda tensors: None):
    """A Hugging Face folder, changed after it was written."""
    model = decoder.architecture()
    path.mkdir()
    write_folder(
        path,
        format=FORMATS[format],
        architecture=model,
        read=decoder.random_weights(model).__getitem__,
        dtype=torch.float32,
        extra_config={},
    )
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.1.mlp.experts.4.down_proj.weight", " (layer 2, expert 4)"),
        ("model.layers.2.mlp.gate.weight", " (layer 3, expert 3)"),
        ("lm_head.weight", ""),
    ],
)
def test_a_folder_of_such_a_weight_is_not_imported(tmp_path, format, name, place):
    def change(tensors):
        tensors[name][3, 0] = -math.inf

    source = folder_of(tmp_path / "source", format=format, change=change)
    with pytest.raises(NotFiniteError) as told:
        import_.run(import_.Options(folder=source, output=tmp_path / "new"))
    assert f"{name}{place} holds -inf" in str(told.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("format", FORMATS)
def test_a_checkpoint_of_such_a_weight_is_not_exported(rewritten, tmp_path, format):
    source = folder_of(tmp_path / "source")
    whole = tmp_path / "whole"
    import_.run(import_.Options(folder=source, output=whole, parity_tokens=0))
    broken = rewritten(tmp_path / "broken", whole, spoiled(FC2, row=5))
    wide = rewritten(tmp_path / "wide", whole, spoiled(FC2, row=5, value=1e6))
    name = "model.layers.1.mlp.experts.5.down_proj.weight"
    new = {"output": tmp_path / "new", "format": format}
    with pytest.raises(NotFiniteError, match=rf"{name} \(layer 2, expert 5\) holds nan"):
        export.run(export.Options(checkpoint=broken, **new))
    with pytest.raises(ValueError, match=rf"{name} does not fit .*float16.* 1e\+06"):
        export.run(export.Options(checkpoint=wide, dtype="float16", **new))
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("megatron", "hugging_face", "which"),
    [(math.inf, math.inf, "whole"), (math.inf, 1.0, "whole"), (1.0, math.nan, "source")],
)
def test_logits_that_are_not_finite_are_no_parity(monkeypatch, rewritten, tmp_path, megatron, hugging_face, which):
    folder = HuggingFaceFolder(folder_of(tmp_path / "source"))
    whole = tmp_path / "whole"
    import_.run(import_.Options(folder=folder.path, output=whole, parity_tokens=0))
    broken = rewritten(tmp_path / "broken", whole, spoiled(FC2, row=5))
    for name, value in (("megatron_logits", megatron), ("hugging_face_logits", hugging_face)):
        logits_TV = torch.ones(4, 80)
        logits_TV[2, 3] = value
        monkeypatch.setattr(hf_parity, name, lambda *args, found=logits_TV, **options: found)
    with pytest.raises(NotFiniteError, match=re.escape(str(tmp_path / which))):
        measure_parity(MegatronCheckpoint(whole), folder, tokens=4)
    # where a weight is to blame it is told
    with pytest.raises(NotFiniteError, match=r"linear_fc2.weight \(layer 2, expert 5\) holds nan"):
        measure_parity(MegatronCheckpoint(broken), folder, tokens=4)


def test_numbers_of_commands_are_in_their_range(tmp_path):
    for value in (math.nan, math.inf, -math.inf, 0.0, -1.0):
        with pytest.raises(ValueError, match="--shard-gb"):
            export.Options(checkpoint=tmp_path, output=tmp_path / "new", shard_gb=value)
    places = {"output": tmp_path / "new", "parity_tokens": -1}
    for options, source in ((export.Options, "checkpoint"), (import_.Options, "folder")):
        with pytest.raises(ValueError, match="--parity-tokens must"):
            options(**{source: tmp_path}, **places)


def test_a_running_model_names_its_weights_as_its_checkpoint_does(ranks, tmp_path):
    config = checkpoints.UNEQUAL | checkpoints.BIASED
    layouts = [{"expert_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}]
    ranks(2).run(checkpoints.save, folder=str(tmp_path / "c"), layout=layouts[0], config=config)
    names = MegatronCheckpoint(tmp_path / "c").names
    for layout in layouts:
        found = [
            weight
            for weights in ranks(2).run(checkpoints.weights_of, layout=layout, config=config)
            for weight in weights
        ]
        assert {name for name, _, _ in found} == set(names)
        for name in (name for name in names if ".experts.experts." in name):
            assert {e for other, _, e in found if other == name} == set(range(8))
