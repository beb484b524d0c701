"""An adapter is merged as peft computes it, into tensors of the same names; what the model cannot have is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import decoder, lora

from emo_megatron.hf.folder import HuggingFaceFolder

pytest.importorskip("peft")
TOKENS_T = torch.arange(40) * 7 % 80
ADAPTERS: dict[str, dict[str, Any]] = {
    "linear layers": {"target_modules": lora.LINEAR},
    "experts": {"target_parameters": lora.EXPERTS},
    "router": {"target_parameters": lora.ROUTER},
    "names of transformers 4": {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
    "everything": {"target_modules": lora.LINEAR, "target_parameters": lora.EXPERTS + lora.ROUTER, "use_rslora": True},
    "patterns": {"target_modules": lora.LINEAR, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "dora": {"target_modules": lora.LINEAR, "use_dora": True},
    "embedding and output": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "LoRA of the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "LoRA of the output": {"target_modules": ["q_proj", "lm_head"]},
}
TIED: dict[str, dict[str, Any]] = {
    "linear layers": {"target_modules": lora.LINEAR},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [0, 7, 14]},
    "embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder.write_folder(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder.write_folder(tmp_path_factory.mktemp("tied") / "tied", model=decoder.architecture(tied=True))


@pytest.fixture(scope="module")
def everything(base: Path) -> Path:
    return lora.train(base, base.with_name("everything"), **ADAPTERS["everything"])


def merged(base: Path, adapter: Path, output: Path) -> dict[str, torch.Tensor]:
    """The tensors of the merged folder, of which nothing is left."""
    from emo_megatron.hf import adapter as adapters

    with adapters.merged(HuggingFaceFolder(base), adapter, output=output / "new" / "out") as folder:
        tensors = {name: folder.read(name) for name in folder.shapes}
        assert folder.config == HuggingFaceFolder(base).config
    assert list(output.iterdir()) == []
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "variant", ["the paper's", "grouped queries, renormalised", "wide shared expert, dense layers"]
)
def test_an_adapter_that_changes_nothing_changes_no_bit(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = decoder.architecture(**decoder.VARIANTS[variant])
    base = decoder.write_folder(tmp_path / "base", model=model, dtype=dtype)
    adapter = lora.train(base, tmp_path / "adapter", steps=0, **ADAPTERS["everything"])
    (tmp_path / "out").mkdir()
    before, after = load_file(base / "model.safetensors"), merged(base, adapter, tmp_path / "out")
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_merged_model_is_the_adapted_one(name: str, base: Path, tmp_path: Path) -> None:
    check_logits(base, tmp_path, **ADAPTERS[name])


@pytest.mark.parametrize("name", TIED)
def test_the_merged_model_with_a_tied_output_is_the_adapted_one(name: str, tied: Path, tmp_path: Path) -> None:
    check_logits(tied, tmp_path, **TIED[name])


def check_logits(base: Path, tmp_path: Path, **config: Any) -> None:
    """Train an adapter; the logits must be those of the merged folder."""
    import peft

    adapter = lora.train(base, tmp_path / "adapter", **config)
    (tmp_path / "out").mkdir()
    tensors = merged(base, adapter, tmp_path / "out")
    plain = lora.load(base)
    before_TV = lora.logits(plain, TOKENS_T)
    wanted_TV = lora.logits(peft.PeftModel.from_pretrained(plain, adapter), TOKENS_T)
    shutil.copytree(base, tmp_path / "merged")
    save_file(tensors, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(lora.logits(lora.load(tmp_path / "merged"), TOKENS_T), wanted_TV, rtol=1e-4, atol=1e-4)
    assert (wanted_TV - before_TV).abs().max() > 0.1


def test_every_weight_is_the_base_and_the_scaled_product(base: Path, everything: Path, tmp_path: Path) -> None:
    before, after = load_file(base / "model.safetensors"), merged(base, everything, tmp_path)
    for name in before:
        change = lora.change_of(name, everything, num_experts=6, scale=8 / 4**0.5)
        torch.testing.assert_close(after[name], before[name] + change, rtol=0, atol=1e-6)
        assert torch.is_tensor(change) == any(part in name for part in ("_proj.weight", "mlp.gate."))
    # a model without gate of the shared expert has twice the weights in the folder
    model = HuggingFaceFolder(base)
    down = "model.layers.1.mlp.shared_expert.down_proj.weight"
    assert torch.equal(model.weight(down) * 2, before[down])


def write_separate(
    base: Path, folder: Path, *, kinds: tuple[str, ...] = ("gate", "up", "down"), rank: int = 3, **config: Any
) -> dict[str, torch.Tensor]:
    """An adapter as transformers 4 and Megatron-Bridge name it, of experts, routers and q_proj; the changes B A."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors, changes = {}, {}
    for name, weight in load_file(base / "model.safetensors").items():
        is_expert = ".experts." in name and any(f"{kind}_proj" in name for kind in kinds)
        if not (is_expert or ".mlp.gate." in name or "q_proj.weight" in name):
            continue
        a = torch.randn(rank, weight.shape[1], generator=generator)
        b = torch.randn(weight.shape[0], rank, generator=generator) * 0.1
        stem = name.removesuffix(".weight")
        tensors |= {f"base_model.model.{stem}.lora_A.weight": a, f"base_model.model.{stem}.lora_B.weight": b}
        changes[name] = b @ a
    save_file(tensors, folder / "adapter_model.safetensors")
    stored = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "base_model_name_or_path": str(base)}
    stored["target_modules"] = ["q_proj", "gate", *(f"{kind}_proj" for kind in kinds)]
    (folder / "adapter_config.json").write_text(json.dumps(stored | config))
    return changes


@pytest.mark.parametrize("is_rank_stabilised", [False, True])
@pytest.mark.parametrize("kinds", [("gate", "up", "down"), ("down",)], ids="-".join)
def test_tensors_with_one_name_per_expert_are_merged(
    kinds: tuple[str, ...], is_rank_stabilised: bool, base: Path, tmp_path: Path
) -> None:
    changes = write_separate(base, tmp_path / "adapter", kinds=kinds, use_rslora=is_rank_stabilised)
    (tmp_path / "out").mkdir()
    before, after = load_file(base / "model.safetensors"), merged(base, tmp_path / "adapter", tmp_path / "out")
    scale = 6 / (3**0.5 if is_rank_stabilised else 3)
    assert len(changes) == 3 * (2 + 6 * len(kinds))
    for name in before:
        wanted = before[name] + scale * changes.get(name, torch.zeros(()))
        torch.testing.assert_close(after[name], wanted, rtol=0, atol=1e-5)


def test_layers_may_have_adapters_of_different_weights(base: Path, tmp_path: Path) -> None:
    changes = write_separate(base, tmp_path / "adapter")
    without = r"layers\.1\..*\.experts\.\d+\.(gate|up)|layers\.2\..*\.experts\."
    leave_out(tmp_path / "adapter", without)
    (tmp_path / "out").mkdir()
    before, after = load_file(base / "model.safetensors"), merged(base, tmp_path / "adapter", tmp_path / "out")
    left = {name: change for name, change in changes.items() if not re.search(without, name)}
    assert len(left) == len(changes) - 6 * (2 + 3)
    for name in before:
        wanted = before[name] + 2 * left.get(name, torch.zeros(()))
        torch.testing.assert_close(after[name], wanted, rtol=0, atol=1e-5)


def test_experts_that_cannot_be_stacked_are_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for kinds in (("gate", "up"), ("gate", "down")):
        adapter = tmp_path / "-".join(kinds)
        write_separate(base, adapter, kinds=kinds)
        refused(base, adapter, tmp_path / "out", match=rf"layer 0: .*got {kinds[0]}_proj and {kinds[1]}_proj of 6 exp")
    write_separate(base, tmp_path / "layers")
    leave_out(tmp_path / "layers", r"layers\.1\..*\.experts\.\d+\.down|layers\.2\..*\.experts\.\d+\.(gate|up)")
    refused(base, tmp_path / "layers", tmp_path / "out", match=r"layer 1: .*got gate_proj and up_proj of 6 experts$")
    write_separate(base, tmp_path / "some")
    leave_out(tmp_path / "some", r"layers\.2\..*\.experts\.[05]\.")
    refused(base, tmp_path / "some", tmp_path / "out", match=r"layer 2: .*got none of 2 experts.* of 4 experts$")
    write_separate(base, tmp_path / "scales", alpha_pattern={"gate_proj": 2})
    refused(base, tmp_path / "scales", tmp_path / "out", match="alpha_pattern")
    write_separate(base, tmp_path / "ranks")
    file = tmp_path / "ranks" / "adapter_model.safetensors"
    stored = load_file(file)
    names = [name for name in stored if ".experts.5." in name]
    stored |= {name: stored[name][:2] if "lora_A" in name else stored[name][:, :2].contiguous() for name in names}
    save_file(stored, file)
    refused(base, tmp_path / "ranks", tmp_path / "out", match="rank")


def leave_out(adapter: Path, pattern: str) -> None:
    """Remove the tensors whose names match from an adapter."""
    file = adapter / "adapter_model.safetensors"
    stored = load_file(file)
    left = {name: tensor for name, tensor in stored.items() if not re.search(pattern, name)}
    assert len(left) < len(stored)
    save_file(left, file)


def refused(base: Path, adapter: Path, output: Path, *, match: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=match) as raised:
        merged(base, adapter, output)
    assert "\n" not in str(raised.value)
    assert str(adapter) in str(raised.value)
    assert list(output.iterdir()) == []


@pytest.mark.parametrize(
    ("match", "config"),
    [
        ("shared_expert_gate.*target_modules", {"target_modules": ["q_proj", "shared_expert_gate"]}),
        ("biases.*bias='none'", {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}),
        ("biases.*bias='none'", {"target_modules": ["o_proj"], "bias": "all"}),
        ("biases.*modules_to_save", {"target_modules": ["o_proj"], "modules_to_save": ["q_proj"]}),
        ("init_lora_weights.*pissa", {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}),
    ],
    ids=["gate", "biases", "all biases", "saved projection", "other start"],
)
def test_what_the_model_does_not_have_is_refused(
    match: str, config: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    adapter = lora.train(base, tmp_path / "adapter", **config)
    (tmp_path / "out").mkdir()
    error = NotImplementedError if "init" in match else ValueError
    refused(base, adapter, tmp_path / "out", match=match, error=error)


def test_a_learned_gate_and_biases_that_the_model_has_are_merged(tmp_path: Path) -> None:
    model = decoder.architecture(**decoder.VARIANTS["biases and a shared gate"])
    base = decoder.write_folder(tmp_path / "base", model=model)
    config = {"target_modules": ["q_proj", "shared_expert_gate"], "bias": "all"}
    adapter = lora.train(base, tmp_path / "adapter", **config)
    (tmp_path / "out").mkdir()
    before, after = load_file(base / "model.safetensors"), merged(base, adapter, tmp_path / "out")
    for kind in ("mlp.shared_expert_gate.weight", "self_attn.v_proj.bias"):
        assert not torch.equal(before[f"model.layers.0.{kind}"], after[f"model.layers.0.{kind}"])


def test_a_tied_output_cannot_be_trained_apart(tied: Path, tmp_path: Path) -> None:
    adapter = lora.train(tied, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"])
    (tmp_path / "out").mkdir()
    refused(tied, adapter, tmp_path / "out", match="lm_head")


@pytest.mark.parametrize(
    ("target", "config"),
    [
        ("lm_head", {"target_modules": ["q_proj", "lm_head"]}),
        ("lm_head", {"target_modules": ["lm_head"], "use_dora": True}),
        ("lm_head", {"target_parameters": ["lm_head.weight"]}),
        ("embed_tokens", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("embed_tokens and lm_head", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    ],
    ids=["output", "dora", "parameter", "embedding", "both"],
)
def test_lora_of_a_tied_weight_is_refused(target: str, config: dict[str, Any], tied: Path, tmp_path: Path) -> None:
    adapter = lora.train(tied, tmp_path / "adapter", **config)
    (tmp_path / "out").mkdir()
    refused(tied, adapter, tmp_path / "out", match=rf" {target} .*tie_word_embeddings")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_wrong_merge_is_refused(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import Linear

    base = decoder.write_folder(tmp_path / "base", dtype=dtype)
    adapter = lora.train(base, tmp_path / "adapter", **ADAPTERS["everything"])
    (tmp_path / "out").mkdir()
    assert {tensor.dtype for tensor in merged(base, adapter, tmp_path / "out").values()} == {dtype}
    of_peft = Linear.get_delta_weight
    # a fiftieth of the change is missing, of the linear layers alone
    monkeypatch.setattr(Linear, "get_delta_weight", lambda *args: of_peft(*args) * 0.98)
    refused(base, adapter, tmp_path / "out", match=r"logits .*peft")


@pytest.mark.parametrize(
    ("field", "value"),
    [("peft_type", "IA3"), ("peft_type", None), ("use_qalora", True), ("alora_invocation_tokens", [1]), ("new", 1)],
)
def test_other_kinds_of_adapters_are_refused(field: str, value: Any, base: Path, everything: Path, tmp_path) -> None:
    adapter = lora.edit(Path(shutil.copytree(everything, tmp_path / "adapter")), **{field: value})
    (tmp_path / "out").mkdir()
    refused(base, adapter, tmp_path / "out", match=field, error=NotImplementedError)


def test_an_adapter_of_other_tensors_is_refused(base: Path, everything: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(everything, tmp_path / "adapter"))
    stored = load_file(everything / "adapter_model.safetensors")
    (tmp_path / "out").mkdir()
    first = min(stored)
    for change in (
        {first: None},
        {first.replace("layers.0", "layers.7"): stored[first].clone()},
        {first: torch.cat([stored[first]] * 2)},
        {first: stored[first] * torch.nan},
    ):
        tensors = {name: tensor for name, tensor in (stored | change).items() if tensor is not None}
        save_file(tensors, adapter / "adapter_model.safetensors")
        refused(base, adapter, tmp_path / "out", match="cannot be merged")
    (adapter / "adapter_model.safetensors").unlink()
    refused(base, adapter, tmp_path / "out", match=r"--adapter .*adapter_model")


def test_an_adapter_of_another_model_of_the_same_shape_is_refused(base: Path, everything: Path, tmp_path: Path) -> None:
    model = decoder.architecture()
    other = decoder.write_folder(tmp_path / "other", weights=decoder.random_weights(model, seed=1))
    (tmp_path / "out").mkdir()
    refused(other, everything, tmp_path / "out", match=r"base_model_name_or_path .*--folder")
    # a copy of the base is the base
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    assert merged(copy, everything, tmp_path / "out")
    # what is not here cannot be compared, until the user says what it is
    adapter = lora.edit(Path(shutil.copytree(everything, tmp_path / "a")), base_model_name_or_path="me/perl")
    refused(base, adapter, tmp_path / "out", match=r"me/perl.*--folder")
    lora.edit(adapter, base_model_name_or_path=str(base))
    assert merged(base, adapter, tmp_path / "out")


def test_the_configuration_in_an_adapter_tells_the_weights(base: Path, everything: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(everything, tmp_path / "adapter"))
    lora.load(base).config.save_pretrained(adapter)
    lora.edit(adapter, base_model_name_or_path="me/perl")
    (tmp_path / "out").mkdir()
    assert merged(base, adapter, tmp_path / "out")
    # the same path, but other weights than the adapter was trained on
    model = decoder.architecture()
    weights = decoder.random_weights(model)
    weights["model.layers.2.mlp.experts.5.up_proj.weight"][0, 0] += 1
    changed = decoder.write_folder(tmp_path / "changed", weights=weights)
    lora.edit(adapter, base_model_name_or_path=str(changed))
    refused(changed, adapter, tmp_path / "out", match=r"weights_sha256.*--folder")


def test_a_fingerprint_of_earlier_weights_tells_nothing(base: Path, tmp_path: Path) -> None:
    model = lora.load(base)
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj.mul_(1.5)
    tuned = tmp_path / "tuned"
    model.save_pretrained(tuned)
    records = [json.loads((folder / "config.json").read_text())["emo_megatron"] for folder in (base, tuned)]
    assert records[0] == records[1]
    adapter = lora.train(tuned, tmp_path / "adapter", with_config=True, **ADAPTERS["linear layers"])
    (tmp_path / "out").mkdir()
    # the adapter's fingerprint is that of base, and its path says otherwise
    refused(base, adapter, tmp_path / "out", match=r"base_model_name_or_path .*--folder")
    # the weights in the folder may have been written before or after the training
    refused(tuned, adapter, tmp_path / "out", match=r"weights_sha256 .*another program .*delete")
    # an adapter of a third model has another record
    file = adapter / "config.json"
    stored = file.read_text()
    file.write_text(stored.replace(records[0]["weights_sha256"], "0" * 64))
    refused(tuned, adapter, tmp_path / "out", match=r"weights_sha256.*--folder")
    # as the error says: without the fingerprints the path decides
    for path in (file, tuned / "config.json"):
        config = json.loads(stored)
        del config["emo_megatron"]["weights_sha256"]
        path.write_text(json.dumps(config))
    assert merged(tuned, adapter, tmp_path / "out")
    refused(base, adapter, tmp_path / "out", match=r"base_model_name_or_path .*--folder")


def test_an_adapter_is_not_merged_twice(base: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "folder"))
    adapter = lora.train(folder, tmp_path / "adapter", with_config=True, **ADAPTERS["linear layers"])
    (tmp_path / "out").mkdir()
    save_file(merged(folder, adapter, tmp_path / "out"), folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, adapter, tmp_path / "out", match=r"weights_sha256 .*another program .*delete")


def test_a_fingerprint_outweighs_a_path_unless_its_folder_has_the_same(base: Path, tmp_path: Path) -> None:
    adapter = lora.train(base, tmp_path / "adapter", with_config=True, **ADAPTERS["linear layers"])
    (tmp_path / "out").mkdir()
    # a later export of another model, at the path of the time
    weights = decoder.random_weights(decoder.architecture(), seed=1)
    other = decoder.write_folder(tmp_path / "other", weights=weights)
    lora.edit(adapter, base_model_name_or_path=str(other))
    assert merged(base, adapter, tmp_path / "out")
    # what has the same fingerprint must have the same weights
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    lora.edit(adapter, base_model_name_or_path=str(copy))
    assert merged(base, adapter, tmp_path / "out")
    (copy / "model.safetensors").unlink()
    refused(base, adapter, tmp_path / "out", match=r"base_model_name_or_path .*model\.safetensors")


def test_the_fingerprint_is_of_the_weights_and_not_of_their_files(base: Path, tmp_path: Path) -> None:
    shards = decoder.write_folder(tmp_path / "shards", shard_bytes=20_000)
    assert len(list(shards.glob("*.safetensors"))) > 1
    lora.load(base).save_pretrained(tmp_path / "again")
    found = {HuggingFaceFolder(folder).fingerprint for folder in (base, shards, tmp_path / "again")}
    assert found == {json.loads((base / "config.json").read_text())["emo_megatron"]["weights_sha256"]}
    half = decoder.write_folder(tmp_path / "half", dtype=torch.bfloat16)
    assert HuggingFaceFolder(half).fingerprint not in found


def test_an_adapter_goes_into_a_folder_of_qwen2_moe(base: Path, everything: Path, tmp_path: Path) -> None:
    other = decoder.write_folder(tmp_path / "emo", "emo")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"--adapter .*qwen2_moe"):
        merged(other, everything, tmp_path / "out")


def test_the_training_on_the_page_gives_an_adapter_of_the_folder(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "update.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "peft" in block)
    (command,) = re.findall(r"^python -m emo_megatron (import .*)$", page, flags=re.MULTILINE)
    shutil.copytree(base, tmp_path / "exported" / "perl")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(code, "lora_on_perl.py", "exec"), {})
    words = command.split()
    folder, adapter = (Path(words[words.index(flag) + 1]) for flag in ("--folder", "--adapter"))
    # the path is another, and the fingerprint is the one that the snippet stored
    lora.edit(adapter, base_model_name_or_path="elsewhere")
    (tmp_path / "out").mkdir()
    before, after = load_file(folder / "model.safetensors"), merged(folder, adapter, tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".experts." in name}
