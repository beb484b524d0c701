"""Statistics of Hugging Face models: against their own layers, one expert at a time, and with experts left out."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import words

transformers = pytest.importorskip("transformers")

from emo_megatron.finite import NotFiniteError  # noqa: E402
from emo_megatron.runners.huggingface import HuggingFaceRunner, load_hugging_face  # noqa: E402

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
KINDS = {
    "olmoe": {"intermediate_size": 8, "norm_topk_prob": False},
    "qwen2_moe": {
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 16,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
        "norm_topk_prob": False,
    },
    "qwen3_moe": {"moe_intermediate_size": 8, "head_dim": 4, "decoder_sparse_step": 1, "norm_topk_prob": True},
}


def documents():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 64, (n,), generator=generator) for n in (1, 7, 30, 12)]


def model(kind):
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(kind, **SIZES | KINDS[kind])
    built = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.3)
    return built


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def runner_of(built):
    return HuggingFaceRunner(built, seq_length=16, micro_batch_size=3)


def blocks(built):
    return [layer.mlp for layer in built.model.layers if hasattr(layer.mlp, "experts")]


@torch.no_grad()
def by_definition(built):
    """The sums again: piece by piece, token by token, one expert at a time."""
    seen = [[] for _ in blocks(built)]
    handles = [
        block.register_forward_hook(lambda module, inputs, output, into=into: into.append((inputs[0], output.clone())))
        for block, into in zip(blocks(built), seen, strict=True)
    ]
    for piece in (piece for document in documents() for piece in document.split(16)):
        built(input_ids=piece[None])
    for handle in handles:
        handle.remove()
    shape = (len(seen), 8)
    names = ("probability_LE", "count_LE", "gated_norm_LE", "residual_change_LE")
    sums = {name: torch.zeros(shape, dtype=torch.float64) for name in names}
    for place, (block, tokens) in enumerate(zip(blocks(built), seen, strict=True)):
        for inputs, outputs in tokens:
            for h, out in zip(inputs.flatten(0, 1), outputs.flatten(0, 1), strict=True):
                probs = (block.gate.weight @ h).softmax(0)
                gates, chosen = probs.topk(2)
                if built.config.norm_topk_prob:
                    gates = gates / gates.sum()
                change = 1 - torch.cosine_similarity(h, h + out, dim=0)
                sums["probability_LE"][place] += probs
                for gate, expert in zip(gates, chosen, strict=True):
                    one = block.experts(h[None], expert.view(1, 1), torch.ones(1, 1))
                    sums["count_LE"][place, expert] += 1
                    sums["gated_norm_LE"][place, expert] += gate * one.norm()
                    sums["residual_change_LE"][place, expert] += gate * one.norm() * change.clamp(min=0)
    return sums


def test_the_sums_are_what_the_definitions_say(kind):
    built = model(kind).eval()
    stats = runner_of(built).statistics(documents(), outputs=True)
    assert stats.num_tokens == 50
    for name, tensor in by_definition(built).items():
        torch.testing.assert_close(stats.tensors()[name].double(), tensor, rtol=1e-4, atol=1e-6)


def test_the_facts_are_the_models(kind):
    built = model(kind)
    metadata = runner_of(built).metadata
    assert (metadata.num_experts, metadata.top_k) == (8, 2)
    assert metadata.layers == ((2, 3) if kind == "qwen2_moe" else (1, 2, 3))
    # gate, up and down projection, and a router row
    assert metadata.expert_parameters == 3 * 8 * 16 + 16
    experts = metadata.expert_parameters * 8 * len(metadata.layers)
    assert metadata.other_parameters + experts == sum(p.numel() for p in built.parameters())


def by_hand(built, texts):
    """Mean loss in nats a token, piece by piece."""
    total, count = 0.0, 0
    for document in texts:
        if len(document) > 1:
            # a piece of 16 tokens sees nothing before it, and predicts the first token of the next one
            for start in range(0, len(document), 16):
                piece, labels = document[start : start + 16], document[start + 1 : start + 17]
                logits = built(input_ids=piece[None]).logits[0, : len(labels)]
                total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
                count += len(labels)
    return total / count


def reduce_to(built, kept):
    """Leave a model these experts, layer by layer."""
    for block, chosen in zip(blocks(built), kept, strict=True):
        block.gate.weight = torch.nn.Parameter(block.gate.weight[chosen])
        for name in ("gate_up_proj", "down_proj"):
            setattr(block.experts, name, torch.nn.Parameter(getattr(block.experts, name)[chosen]))
        block.experts.num_experts = len(chosen)


@torch.no_grad()
def test_the_loss_is_the_models_own(kind):
    built = model(kind).eval()
    loss = runner_of(built).loss(documents())
    assert loss.num_tokens == 46
    assert loss.nats == pytest.approx(by_hand(built, documents()), rel=1e-5)


@torch.no_grad()
def test_leaving_experts_out_is_a_model_without_them(kind):
    built = model(kind).eval()
    keep = torch.zeros(len(blocks(built)), 8, dtype=torch.bool)
    kept = [[0, 2, 3], [1, 5, 7], [2, 4, 6]][: len(keep)]
    for row, chosen in zip(keep, kept, strict=True):
        row[chosen] = True
    runner = runner_of(built)
    full = runner.loss(documents()).nats
    restricted = runner.loss(documents(), allowed_LE=keep).nats
    stats = runner.statistics(documents(), outputs=False, allowed_LE=keep)
    assert (stats.count_LE[~keep] == 0).all()
    assert (stats.probability_LE > 0).all()
    # nothing is left behind
    assert runner.loss(documents()).nats == full
    reduce_to(built, kept)
    assert runner_of(built).loss(documents()).nats == pytest.approx(restricted, rel=1e-5)
    assert abs(full - restricted) > 1e-3


def test_the_authors_format_is_studied_as_the_qwen2_moe_it_is(tmp_path):
    from emo_megatron.hf.folder import HuggingFaceFolder, write_folder
    from emo_megatron.hf.formats import EMO

    parts = KINDS["qwen2_moe"] | {"mlp_only_layers": [], "shared_expert_intermediate_size": 8}
    config = transformers.AutoConfig.for_model(
        "qwen2_moe", **SIZES | parts | {"num_key_value_heads": 4, "rms_norm_eps": 1e-6}
    )
    torch.manual_seed(3)
    built = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name.endswith("bias") or "shared_expert_gate" in name:
                parameter.zero_()
    stock, authors = tmp_path / "stock", tmp_path / "authors"
    built.save_pretrained(stock)
    authors.mkdir()
    stored = HuggingFaceFolder(stock)
    write_folder(
        authors, format=EMO, architecture=stored.architecture, read=stored.weight, dtype=torch.float32, extra_config={}
    )
    assert json.loads((authors / "config.json").read_text())["model_type"] == "emo"
    one, other = (runner_of(load_hugging_face(folder)) for folder in (stock, authors))
    assert one.metadata == other.metadata
    want = one.statistics(documents(), outputs=True)
    for name, tensor in other.statistics(documents(), outputs=True).tensors().items():
        assert torch.equal(tensor, want.tensors()[name])


def test_other_models_are_refused(tmp_path):
    config = transformers.AutoConfig.for_model("llama", hidden_size=16, num_attention_heads=4)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model_type must .*olmoe.* got llama"):
        load_hugging_face(tmp_path)


def test_a_folder_is_studied_in_one_process(tmp_path, capsys):
    from emo_megatron import cli

    model("olmoe").save_pretrained(tmp_path / "model")
    words.write_tokens(tmp_path / "d.safetensors", documents())
    files = ("--checkpoint", f"{tmp_path}/model", "--data", f"{tmp_path}/d.safetensors", "--output", f"{tmp_path}/s")
    assert cli.main(["stats", *files, "--nproc-per-node", "2"]) == 2
    assert "--nproc-per-node" in capsys.readouterr().err


@torch.no_grad()
def test_retention_of_a_folder_is_the_loss_of_the_reduced_model(tmp_path, kind):
    from emo_megatron.commands import retention

    built = model(kind).eval()
    built.save_pretrained(tmp_path / "model")
    words.write_tokens(tmp_path / "d.safetensors", documents())
    validation_data = torch.arange(1, 40) * 7 % 64
    words.write_tokens(tmp_path / "h.safetensors", validation_data.split([15, 24]))
    options = retention.Options(
        checkpoint=tmp_path / "model",
        data=tmp_path / "d.safetensors",
        validation_data=tmp_path / "h.safetensors",
        output=tmp_path / "out",
        keep=("3 routed",),
        seq_length=16,
    )
    retention.run(options)
    measured = json.loads((tmp_path / "out" / "rows.json").read_text())["rows"]
    rows = {row["method"]: row for row in measured}
    assert [row["num_experts_kept"] for row in rows.values()] == [8, 3, 3]
    assert rows["full"]["loss"] == pytest.approx(by_hand(built, validation_data.split([15, 24])), rel=1e-5)
    best_LK = by_definition(built)["probability_LE"].topk(3).indices.sort(-1).values
    reduce_to(built, best_LK)
    want = by_hand(built, validation_data.split([15, 24]))
    assert rows["mean_prob"]["loss"] == pytest.approx(want, rel=1e-5)
    assert rows["mean_prob"]["tokens"] == 14 + 23
    assert abs(want - rows["random"]["loss"]) > 1e-3


def test_routers_that_give_probabilities_as_their_logits_are_measured_alike(kind):
    built = model(kind).eval()
    keep = torch.ones(len(blocks(built)), 8, dtype=torch.bool)
    keep[:, 3] = False

    def measured():
        stats = runner_of(built).statistics(documents(), outputs=True, allowed_LE=keep)
        return stats.tensors() | {"nats": torch.tensor(runner_of(built).loss(documents()).nats)}

    want = measured()
    for block in blocks(built):
        forward = block.gate.forward
        block.gate.forward = lambda hidden, forward=forward: _with_probabilities(forward(hidden))
    for name, tensor in measured().items():
        torch.testing.assert_close(tensor, want[name])


def _with_probabilities(output):
    """What early releases of transformers 5 return for a router."""
    assert isinstance(output, tuple)
    return (output[0].float().softmax(-1), *output[1:])


def test_documents_without_a_predicted_token_have_no_loss():
    with pytest.raises(ValueError, match="two tokens or more"):
        runner_of(model("olmoe")).loss([torch.tensor([3]), torch.tensor([5])])


def test_a_folder_without_its_weights_is_said(tmp_path):
    model("olmoe").save_pretrained(tmp_path)
    (weights,) = tmp_path.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="is not whole"):
        load_hugging_face(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match="is not whole"):
        load_hugging_face(tmp_path)


SPOILED = {
    "model.layers.1.mlp.experts.5.gate_proj.weight": " (layer 2, expert 5)",
    "model.layers.1.mlp.experts.5.up_proj.weight": " (layer 2, expert 5)",
    "model.layers.2.mlp.experts.0.down_proj.weight": " (layer 3, expert 0)",
    "model.layers.2.mlp.gate.weight": " (layer 3, expert 4)",
    "model.layers.1.mlp.shared_expert.up_proj.weight": " (layer 2)",
    "model.layers.0.mlp.down_proj.weight": " (layer 1)",
    "model.layers.0.self_attn.q_proj.weight": " (layer 1)",
    "model.embed_tokens.weight": "",
    "model.norm.weight": "",
    "lm_head.weight": "",
}
"""Of the Qwen2-MoE above, by its names in a file: where the fifth row of each lies."""


def spoil(folder, name, value):
    """Put a value into the fifth row of a weight of a folder."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name][4, ...] = value
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", SPOILED)
def test_a_weight_that_is_not_finite_is_told_by_its_name_in_the_file(tmp_path, name):
    model("qwen2_moe").save_pretrained(tmp_path)
    spoil(tmp_path, name, -float("inf"))
    with pytest.raises(NotFiniteError) as told:
        runner_of(load_hugging_face(tmp_path))
    assert f"{name}{SPOILED[name]} holds -inf" in str(told.value)


def test_no_command_measures_a_weight_that_is_not_finite(tmp_path, capsys):
    from emo_megatron import cli

    folder = tmp_path / "model"
    model("qwen2_moe").save_pretrained(folder)
    words.write_tokens(tmp_path / "d.safetensors", documents())
    words.write_tokens(tmp_path / "h.safetensors", documents()[2:3])
    spoil(folder, "model.layers.2.mlp.experts.3.down_proj.weight", float("nan"))
    files = sorted(path.name for path in tmp_path.iterdir())
    data, validation_data = (
        [flag, f"{tmp_path}/{name}.safetensors"] for flag, name in (("--data", "d"), ("--validation-data", "h"))
    )
    for command in (
        ["stats", *data],
        ["stats", *data, "--outputs"],
        ["select", *data, "--keep", "4 routed"],
        ["select", *data, "--keep", "4 routed", "--method", "layerwise"],
        ["select", "--keep", "4 routed", "--method", "random"],
        ["select", *data, *validation_data, "--max-loss-increase", "5%"],
        ["retention", *data, *validation_data, "--keep", "4 routed"],
    ):
        output = tmp_path / "new" / "out"
        assert cli.main([*command, "--checkpoint", str(folder), "--output", str(output)]) == 2
        (told,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert "(layer 3, expert 3)" in told, command
        assert sorted(path.name for path in tmp_path.iterdir() if any(path.rglob("*")) or path.is_file()) == files


@torch.no_grad()
def test_an_overflow_of_finite_weights_is_told_where_it_arises(kind):
    built = model(kind).eval()
    runner = runner_of(built)
    pairs = torch.arange(1, 21).split(2)
    uses_PE = torch.stack([runner.statistics([pair], outputs=False).count_LE[0] > 0 for pair in pairs])
    # an expert that some of the pairs use and some do not
    expert = int((uses_PE.sum(0) - 5).abs().argmin())
    without = [pair for pair, uses in zip(pairs, uses_PE[:, expert], strict=True) if not uses]
    (having, *_) = [pair for pair, uses in zip(pairs, uses_PE[:, expert], strict=True) if uses]
    projection = blocks(built)[0].experts.down_proj
    kept, projection[expert] = projection[expert].clone(), 3e38
    runner = runner_of(built)
    where = f"layer {runner.metadata.layers[0]}, expert {expert}"
    for outputs in (True, False):
        with pytest.raises(NotFiniteError, match=f"{where}: gated_norm_LE"):
            runner.statistics([having], outputs=outputs)
    # one document of several is enough, and where none uses the expert there is nothing to tell
    with pytest.raises(NotFiniteError, match=where):
        runner.loss([*without, having])
    assert runner.loss(without).nats > 0
    keep = torch.ones(len(blocks(built)), 8, dtype=torch.bool)
    keep[0, expert] = False
    assert runner.loss([having], allowed_LE=keep).nats > 0
    # no hook is left behind
    projection[expert] = kept
    assert runner.loss([having]).nats == runner_of(model(kind)).loss([having]).nats


@torch.no_grad()
def test_logits_that_overflow_after_finite_layers_are_told_so():
    built = model("olmoe").eval()
    built.lm_head.weight[7] = 3e38
    runner = runner_of(built)
    assert runner.statistics(documents(), outputs=True).num_tokens == 50
    with pytest.raises(NotFiniteError, match="logits"):
        runner.loss(documents())
