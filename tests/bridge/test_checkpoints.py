"""A checkpoint that Bridge trained opens in the commands, and a module that was cut out of it trains in Bridge."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import decoder, words

from emo_megatron.experts.placement import load_placement
from emo_megatron.experts.selection import load_selection
from emo_megatron.experts.stats import load_stats

KEPT = [[0, 2, 5, 7], [1, 2, 3, 6], [0, 1, 4, 7], [2, 3, 4, 5]]
FC1, CHANGED = "decoder.layers.2.mlp.experts.experts.linear_fc1.weight", 4
"""A weight, and the expert that a module of KEPT changes in it."""
MODEL = {
    "model.moe_shared_expert_intermediate_size": 32,
    "model.moe_router_load_balancing_type": "global_aux_loss",
    "model.moe_aux_loss_coeff": 0.025,
}
VOCAB = 512


def train(run_bridge: Any, folder: Path, **run: Any) -> dict[str, Any]:
    """A run of Bridge with Megatron's own layers, whose checkpoint lies in the folder `name`."""
    file = folder / f"{run['name']}.json"
    run = {"folder": str(folder / run["name"]), "spec": "bridge"} | run
    options = run.get("options", {}) if "hf" in run else MODEL | run.get("options", {})
    file.write_text(json.dumps([run | {"options": options}]))
    run_bridge("-m", "support.bridge_run", file)
    (result,) = json.loads(file.with_suffix(".results.json").read_text()).values()
    assert not any(result["codes"]), result["printed"][-4000:]
    return dict(result)


@pytest.fixture(scope="module")
def trained(run_bridge, tmp_path_factory) -> Path:
    """A folder with the checkpoint `parent`, of three steps with pools."""
    folder = tmp_path_factory.mktemp("trained")
    train(run_bridge, folder, name="parent", steps=3, pool={"pool_min": 2})
    words.write_numbers(folder / "tokenizer", size=VOCAB)
    return folder


def changed(module: Path, folder: Path) -> Path:
    """A copy of a module of KEPT, in which the expert CHANGED has other weights, as after training."""
    from emo_megatron.checkpoint.edit import SELECTION_FILE
    from emo_megatron.checkpoint.reader import MegatronCheckpoint
    from emo_megatron.checkpoint.writer import write_checkpoint

    stored = MegatronCheckpoint(module)
    weights = {name: stored.read(name) for name in stored.names}
    weights[FC1][KEPT[2].index(CHANGED)] += 1.0
    notes = {SELECTION_FILE: load_selection(module / SELECTION_FILE).save}
    return write_checkpoint(folder, weights, args=stored.args, notes=notes)


def use(folder: str) -> dict[str, Any]:
    """What the commands that need no training make of the checkpoint."""
    from support import checkpoints

    from emo_megatron.checkpoint.reader import MegatronCheckpoint
    from emo_megatron.commands import compose, export, extract, merge, reorder
    from emo_megatron.hf.megatron import architecture_of

    root = Path(folder)
    parent, tokenizer = MegatronCheckpoint(root / "parent"), root / "tokenizer"
    for name in ("qwen2_moe", "emo"):
        options = {"format": name, "tokenizer": tokenizer, "parity_tokens": 32}
        done = export.run(export.Options(checkpoint=root / "parent", output=root / name, **options))
        assert done.parity is not None
    selection, placement = root / "selection.json", root / "placement.json"
    checkpoints.selection_of(root / "parent", KEPT).save(selection)
    module = extract.run(extract.Options(checkpoint=root / "parent", selection=selection, output=root / "module"))
    merged = merge.run(merge.Options(parent=root / "parent", modules=(module,), output=root / "merged"))
    others = [sorted({*range(8)} - {*kept}) for kept in KEPT]
    checkpoints.selection_of(root / "parent", others).save(root / "others.json")
    other = extract.run(
        extract.Options(checkpoint=root / "parent", selection=root / "others.json", output=root / "other module")
    )
    trained, wanted = changed(module, root / "trained module"), {FC1: parent.read(FC1)}
    wanted[FC1][CHANGED] += 1.0
    composed = MegatronCheckpoint(
        compose.run(compose.Options(modules=(trained, other), parent=root / "parent", output=root / "composed"))
    )
    order = tuple(tuple(reversed(range(8))) for _ in KEPT)
    checkpoints.placement_of(root / "parent", order=order).save(placement)
    reordered = MegatronCheckpoint(
        reorder.run(reorder.Options(checkpoint=root / "parent", placement=placement, output=root / "reordered"))
    )
    again, router = MegatronCheckpoint(merged), "decoder.layers.2.mlp.router.weight"
    return {
        "merged": [name for name in parent.names if not torch.equal(again.read(name), parent.read(name))],
        "merged names": again.names.keys() == parent.names.keys(),
        "composed": [
            name
            for name in parent.names
            if not torch.equal(composed.read(name), wanted[name] if name in wanted else parent.read(name))
        ],
        "composed names": composed.names.keys() == parent.names.keys(),
        "reordered": torch.equal(reordered.read(router), parent.read(router).flip(0)),
        "module": torch.equal(MegatronCheckpoint(module).read(router), parent.read(router, KEPT[2])),
        "kept": MegatronCheckpoint(module).args.num_experts,
        "pools": [checkpoint.args.pool_min for checkpoint in (parent, again, MegatronCheckpoint(module))],
        "same model": architecture_of(again) == architecture_of(parent),
    }


@pytest.fixture(scope="module")
def used(trained, ranks) -> dict[str, Any]:
    (found,) = ranks(1).run(use, folder=str(trained))
    return dict(found)


def test_the_commands_open_a_checkpoint_of_bridge(used):
    assert used["merged"] == []
    assert used["merged names"]
    assert used["composed"] == []
    assert used["composed names"]
    assert used["reordered"]
    assert used["module"]
    assert used["kept"] == 4
    assert used["pools"] == [2, 2, None]
    assert used["same model"]


@pytest.mark.parametrize("format", ["qwen2_moe", "emo"])
def test_bridge_exports_the_bits_that_the_command_exports(used, trained, run_bridge, format):
    run_bridge("-m", "support.bridge_hf", trained / f"{format} of bridge", trained / format, trained / "parent")
    ours, theirs = (load_file(trained / name / "model.safetensors") for name in (format, f"{format} of bridge"))
    assert ours.keys() == theirs.keys()
    assert [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])] == []


def write_periodic(prefix: Path, tokens_T: torch.Tensor) -> str:
    """A dataset whose every sample has these tokens, because it is one document again and again."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(64):
        builder.add_document(tokens_T, [len(tokens_T)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def loss_of(folder: str, data: str) -> float:
    """The loss of a checkpoint's model on its periodic dataset, from the definition of the model in float64."""
    from emo_megatron.checkpoint.reader import MegatronCheckpoint
    from emo_megatron.hf.mapping import weight_shapes
    from emo_megatron.hf.megatron import MegatronWeights, architecture_of

    checkpoint = MegatronCheckpoint(folder)
    model = architecture_of(checkpoint)
    read = MegatronWeights(checkpoint, model).read
    tokens_T = torch.arange(64) * 11 % 500
    write_periodic(Path(data), tokens_T)
    logits_TV = decoder.logits(model, {name: read(name) for name in weight_shapes(model)}, tokens_T)
    return float(torch.nn.functional.cross_entropy(logits_TV, tokens_T.roll(-1)))


def test_a_module_trains_in_bridge_from_its_own_weights(used, trained, ranks, run_bridge):
    (wanted,) = ranks(1).run(loss_of, folder=str(trained / "module"), data=str(trained / "periodic"))
    result = train(
        run_bridge,
        trained,
        name="trained on",
        steps=2,
        load=str(trained / "module"),
        data=str(trained / "periodic"),
        pool={"pool_min": None},
        options={"model.num_moe_experts": used["kept"]},
    )
    assert result["losses"][0] == pytest.approx(wanted, rel=1e-5)
    # the loss of the next step is of weights that have moved
    assert result["losses"][1] < result["losses"][0] - 0.01


def test_an_exported_model_trains_in_bridge_with_its_pools_and_opens_again(used, trained, ranks, run_bridge):
    folder, data = trained / "qwen2_moe", trained / "periodic-parent"
    (wanted,) = ranks(1).run(loss_of, folder=str(trained / "parent"), data=str(data))
    # pools of all experts: the first loss is that of the whole model
    run = {"hf": str(folder), "data": str(data), "pool": {"pool_min": 8}}
    result = train(run_bridge, trained, name="from the export", steps=2, **run)
    assert result["losses"][0] == pytest.approx(wanted, rel=1e-5)
    assert result["losses"][1] < result["losses"][0] - 0.01
    # its run_config.yaml names Megatron's function for all layers, and the provider with pools
    ((trained_on, pool_min),) = ranks(1).run(model_in, folder=str(trained / "from the export"))
    ((parent, _),) = ranks(1).run(model_in, folder=str(trained / "parent"))
    assert trained_on == parent
    assert pool_min == 8


def model_in(folder: str) -> tuple[dict[str, Any], int]:
    """The architecture of a checkpoint's model, and the smallest pool of its run."""
    import dataclasses

    from emo_megatron.checkpoint.reader import MegatronCheckpoint
    from emo_megatron.hf.megatron import architecture_of

    checkpoint = MegatronCheckpoint(folder)
    return dataclasses.asdict(architecture_of(checkpoint)), checkpoint.args.pool_min


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tensor", "expert", "pipeline"])
def test_an_exported_model_is_loaded_in_every_layout(used, trained, ranks, run_bridge, kind):
    data = trained / f"periodic-{kind}"
    (wanted,) = ranks(1).run(loss_of, folder=str(trained / "parent"), data=str(data))
    run = {"hf": str(trained / "qwen2_moe"), "data": str(data), "pool": {"pool_min": 8}, "ranks": 2, "steps": 1}
    overrides = [f"model.{kind}_model_parallel_size=2"]
    if kind == "tensor":
        # the norms of Megatron's local layers cannot split the sequence, which MoE training requires
        run["spec"] = "of the layouts"
        overrides.append("model.sequence_parallel=true")
    result = train(run_bridge, trained, name=f"{kind} parallel", overrides=overrides, **run)
    assert result["losses"][0] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
def test_statistics_of_a_checkpoint_of_bridge_choose_a_module(trained, tmp_path):
    data, other = tmp_path / "numbers.jsonl", tmp_path / "validation" / "numbers.jsonl"
    other.parent.mkdir()
    for file, steps in ((data, range(1, 9)), (other, range(9, 13))):
        texts = (" ".join(str((n * step) % 500) for n in range(40)) for step in steps)
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = [sys.executable, "-m", "emo_megatron"]
    model = ["--checkpoint", trained / "parent", "--tokenizer", trained / "tokenizer"]
    stats, more, merged = (tmp_path / f"{name}.safetensors" for name in ("stats", "more", "merged"))
    half = ["--keep", "50%"]
    for name, *options in (
        ("stats", *model, "--data", data, "--output", stats),
        ("stats", *model, "--data", other, "--output", more),
        ("merge-stats", "--stats", stats, more, "--output", merged),
        ("place", "--stats", merged, "--ranks", 2, "--output", tmp_path / "placement.json"),
        ("select", "--stats", stats, *half, "--output", tmp_path / "chosen.json"),
        # without the cache, in which stats has stored what select measures
        ("select", *model, "--data", data, *half, "--no-cache", "--output", tmp_path / "measured.json"),
        ("retention", *model, "--data", data, "--validation-data", other, *half, "--output", tmp_path / "retention"),
    ):
        done = subprocess.run([*command, name, *map(str, options)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
    chosen, measured = (load_selection(tmp_path / f"{name}.json") for name in ("chosen", "measured"))
    assert {len(kept) for kept in chosen.experts} == {4}
    assert measured.by_layer == chosen.by_layer
    assert (tmp_path / "retention" / "retention.csv").is_file()
    parts, whole = [load_stats(path) for path in (stats, more)], load_stats(merged)
    assert whole.num_tokens == sum(part.num_tokens for part in parts)
    assert torch.equal(whole.count_LE, parts[0].count_LE + parts[1].count_LE)
    # two experts per token
    assert whole.count_LE.sum(1).tolist() == [whole.num_tokens * 2] * len(KEPT)
    placement = load_placement(tmp_path / "placement.json")
    assert placement.num_ranks == 2
    assert placement.layers == chosen.layers
    assert [sorted(order) for order in placement.order] == [[*range(8)]] * len(KEPT)
