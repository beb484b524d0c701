"""Megatron checkpoints to Hugging Face and back, bit for bit, the same model on both sides."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import decoder, words
from support.ranks import Ranks

IMPORTED = {"wide shared expert, dense layers": "transformer_engine"}
"""Variants imported for Transformer Engine's layers; the others for local ones."""
FAST = ("the paper's", "grouped queries, renormalised", "wide shared expert, dense layers")


def hugging_face_folder(folder: Path, variant: str, *, dtype: torch.dtype = torch.float32) -> Path:
    model = decoder.architecture(**decoder.VARIANTS[variant])
    return decoder.write_folder(
        folder, model=model, dtype=dtype, extra_config={"emo_megatron": {"pools": {"pool_min": 3}}}
    )


def imported(folder: Path, variant: str, **options: Any) -> Path:
    """A Megatron checkpoint of a variant."""
    from emo_megatron.commands import import_

    given = {"parity_tokens": 0, "transformer_impl": IMPORTED.get(variant, "local")} | options
    source = hugging_face_folder(folder / "source", variant, dtype=given.pop("dtype", torch.float32))
    return import_.run(import_.Options(folder=source, output=folder / "megatron", **given)).path


def round_trip(folder: str, variant: str) -> dict[str, Any]:
    """Import, export, import; both parities against Megatron's own layers."""
    from emo_megatron.checkpoint.reader import MegatronCheckpoint
    from emo_megatron.commands import export, import_
    from emo_megatron.hf.folder import HuggingFaceFolder
    from emo_megatron.runners.parity import hugging_face_logits, megatron_logits

    root = Path(folder)
    first = MegatronCheckpoint(imported(root, variant, parity_tokens=32))
    export.run(export.Options(checkpoint=root / "megatron", output=root / "out", parity_tokens=32))
    second = import_.run(
        import_.Options(
            folder=root / "out", output=root / "again", parity_tokens=0, transformer_impl=IMPORTED.get(variant, "local")
        )
    )
    again = MegatronCheckpoint(second.path)
    tokens_T = torch.arange(40) * 7 % 80
    return {
        "same names": first.names == again.names,
        "unequal": [n for n in first.names if not torch.equal(first.read(n), again.read(n))],
        "unequal flags": sorted(
            name for name, value in vars(first.args).items() if getattr(again.args, name, None) != value
        ),
        "pool_min": again.args.pool_min,
        "megatron": megatron_logits(first, tokens_T),
        "hugging face": hugging_face_logits(HuggingFaceFolder(root / "out"), tokens_T),
    }


@pytest.mark.parametrize(
    "variant",
    [pytest.param(variant, marks=[] if variant in FAST else [pytest.mark.slow]) for variant in decoder.VARIANTS],
)
def test_there_and_back_changes_no_bit_and_both_sides_compute_the_model(
    variant: str, ranks: Callable[[int], Ranks], tmp_path: Path
) -> None:
    (result,) = ranks(1).run(round_trip, folder=str(tmp_path), variant=variant)
    assert result["same names"]
    assert result["unequal"] == []
    assert result["unequal flags"] == []
    assert result["pool_min"] == 3
    model = decoder.architecture(**decoder.VARIANTS[variant])
    expected = decoder.logits(model, decoder.random_weights(model), torch.arange(40) * 7 % 80)
    for side in ("megatron", "hugging face"):
        torch.testing.assert_close(result[side].double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result["megatron"], result["hugging face"], rtol=1e-5, atol=5e-5)


def with_other_flags(folder: str) -> dict[str, Any]:
    """Logits of a checkpoint, of its export, and of the same weights with other flags."""
    from support import run_flags

    from emo_megatron.checkpoint.reader import MegatronCheckpoint
    from emo_megatron.commands import export
    from emo_megatron.hf.folder import HuggingFaceFolder
    from emo_megatron.runners.parity import hugging_face_logits, megatron_logits

    root, tokens_T = Path(folder), torch.arange(40) * 7 % 80
    first = MegatronCheckpoint(imported(root, "grouped queries, renormalised"))
    stored = dict(vars(first.args))
    found = {"as it is": megatron_logits(first, tokens_T)}

    def flags(**changes: Any) -> MegatronCheckpoint:
        args = vars(first.args)
        args.clear()
        args.update(stored | changes)
        return first

    bf16 = {"bf16": True, "params_dtype": torch.bfloat16}
    for name, group in {"all": run_flags.HOW_IT_RAN | bf16, "pipeline": run_flags.PIPELINE}.items():
        run = write_checkpoint_of(flags(**group), root / name)
        options = {"output": root / f"{name} out", "parity_tokens": 32}
        assert export.run(export.Options(checkpoint=run, **options)).parity is not None
        found[name] = hugging_face_logits(HuggingFaceFolder(root / f"{name} out"), tokens_T)
    for name, value in {
        "rotary_base": 100,
        "rotary_percent": 0.5,
        "rotary_interleaved": True,
        "moe_router_pre_softmax": True,
        "moe_router_topk": 3,
        "moe_router_topk_scaling_factor": 2.0,
        "layernorm_epsilon": 1.0,
        "glu_linear_offset": 1.0,
        "no_rope_freq": [1, 0, 1],
    }.items():
        found[f"other {name}"] = megatron_logits(flags(**{name: value}), tokens_T)
    foreign = write_checkpoint_of(flags(spec=["mine.layers", "spec"]), root / "foreign")
    # also where no logits would tell
    with pytest.raises(ValueError, match="--spec mine"):
        export.run(export.Options(checkpoint=foreign, output=root / "foreign out", parity_tokens=0))
    assert not (root / "foreign out").exists()
    del stored["layernorm_epsilon"]
    found["older name"] = megatron_logits(flags(norm_epsilon=1.0), tokens_T)
    return found


def write_checkpoint_of(checkpoint: Any, folder: Path) -> Path:
    """The same weights with the flags that the checkpoint has now."""
    from emo_megatron.checkpoint.writer import write_checkpoint

    weights = {name: checkpoint.read(name) for name in checkpoint.names}
    return write_checkpoint(folder, weights, args=checkpoint.args)


def test_only_flags_that_change_the_function_change_the_logits(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    (found,) = ranks(1).run(with_other_flags, folder=str(tmp_path))
    want, older = found.pop("as it is"), found.pop("older name")
    torch.testing.assert_close(older, found["other layernorm_epsilon"])
    for name, got in found.items():
        if name.startswith("other "):
            assert (got - want).abs().max() > 1e-3, name
        else:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=5e-5)


def through_the_released_format(folder: str) -> dict[str, Any]:
    from emo_megatron.checkpoint.reader import MegatronCheckpoint
    from emo_megatron.commands import export, import_

    root = Path(folder)
    first = imported(root, "the paper's", dtype=torch.bfloat16)
    export.run(export.Options(checkpoint=first, output=root / "out", format="emo", parity_tokens=32))
    second = import_.run(import_.Options(folder=root / "out", output=root / "again"))
    before, after = MegatronCheckpoint(first), MegatronCheckpoint(second.path)
    return {
        "unequal": [n for n in before.names if not torch.equal(before.read(n), after.read(n))],
        "dtypes": {info.dtype for info in after.names.values()},
        "bf16": after.args.bf16,
        "config": json.loads((root / "out" / "config.json").read_text()),
    }


def test_the_released_format_there_and_back(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    (result,) = ranks(1).run(through_the_released_format, folder=str(tmp_path))
    assert result["unequal"] == []
    assert result["dtypes"] == {torch.bfloat16}
    assert result["bf16"] is True
    assert result["config"]["num_experts"] == 7
    assert result["config"]["auto_map"]["AutoModelForCausalLM"] == "modeling_emo.EmoForCausalLM"


def rounded(folder: str) -> dict[str, Any]:
    """An export of fewer bits than the checkpoint has."""
    from emo_megatron.checkpoint.reader import MegatronCheckpoint
    from emo_megatron.commands import export
    from emo_megatron.hf.folder import HuggingFaceFolder
    from emo_megatron.runners.parity import measure_parity

    root = Path(folder)
    checkpoint = imported(root, "grouped queries, renormalised")
    export.run(export.Options(checkpoint=checkpoint, output=root / "out", dtype="bfloat16"))
    written = HuggingFaceFolder(root / "out")
    parity = measure_parity(MegatronCheckpoint(checkpoint), written, tokens=32)
    return {"dtype": written.dtype, "difference": parity.max_difference}


def test_fewer_bits_are_compared_with_as_many(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    (result,) = ranks(1).run(rounded, folder=str(tmp_path))
    assert result["dtype"] == torch.bfloat16
    assert result["difference"] < 1e-3


def as_gguf(folder: str) -> dict[str, Any]:
    """Exports for llama.cpp, of a checkpoint and of its rounded weights."""
    from emo_megatron.commands import export
    from emo_megatron.hf.gguf import GGUFFile

    root = Path(folder)
    checkpoint = imported(root, "grouped queries, renormalised")
    options = {"checkpoint": checkpoint, "format": "gguf", "parity_tokens": 32}
    whole = export.run(export.Options(output=root / "out", **options))
    rounded = export.run(export.Options(output=root / "half", dtype="bfloat16", **options))
    assert whole.parity is not None
    assert rounded.parity is not None
    return {
        "files": sorted(path.name for path in whole.path.iterdir()),
        "differences": (whole.parity.max_difference, rounded.parity.max_difference),
        "dtype": GGUFFile(rounded.path / "model.gguf").dtype,
    }


def test_the_file_for_llama_cpp_is_the_model_of_megatron(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    (result,) = ranks(1).run(as_gguf, folder=str(tmp_path))
    assert result["files"] == ["README.md", "model.gguf"]
    assert result["differences"][0] < 5e-5
    assert result["differences"][1] < 1e-3
    assert result["dtype"] == torch.bfloat16


def refusals(folder: str) -> dict[str, str]:
    """What is said about models and inputs that cannot be, with what is left on disk."""
    from emo_megatron.checkpoint.reader import MegatronCheckpoint
    from emo_megatron.checkpoint.writer import write_checkpoint
    from emo_megatron.commands import export, import_
    from emo_megatron.experts.selection import Selection

    root = Path(folder)
    good = imported(root, "grouped queries, renormalised")
    checkpoint = MegatronCheckpoint(good)
    said = {}

    def fails(name: str, function: Callable[..., Any], options: Any) -> None:
        try:
            function(options)
            said[name] = "nothing"
        except (ModuleNotFoundError, RuntimeError, ValueError) as error:
            said[name] = f"{type(error).__name__}: {error}"

    def with_flags(name: str, **flags: Any) -> None:
        args = argparse.Namespace(**vars(checkpoint.args) | flags)
        weights = {n: checkpoint.read(n) for n in checkpoint.names}
        write_checkpoint(root / name, weights, args=args)
        fails(name, export.run, export.Options(checkpoint=root / name, output=root / "never"))

    with_flags("qk norm and sigmoid", qk_layernorm=True, moe_router_score_function="sigmoid")
    with_flags("latent attention and experts", multi_latent_attention=True, moe_latent_size=16)
    with_flags("positions", position_embedding_type="learned_absolute", rotary_percent=0.5)
    with_flags("expert count", num_experts=5)
    old = argparse.Namespace(**{n: v for n, v in vars(checkpoint.args).items() if n != "rotary_base"})
    write_checkpoint(root / "old", {n: checkpoint.read(n) for n in checkpoint.names}, args=old)
    fails("old", export.run, export.Options(checkpoint=root / "old", output=root / "never"))
    to = {"checkpoint": good, "output": root / "never"}
    fails("emo", export.run, export.Options(**to, format="emo"))
    tokenizer = words.write_tokenizer(root / "large", size=99)
    fails("vocabulary", export.run, export.Options(**to, tokenizer=tokenizer))
    selection = Selection(
        num_experts=9, experts=((0, 1, 2, 3),) * 3, layers=(1, 2, 3), method="m", seed=0, model="x"
    ).save(root / "selection.json")
    fails("selection", export.run, export.Options(**to, selection=selection))
    uneven = Selection(
        num_experts=9, experts=((0, 1), (2,), (3,)), layers=(1, 2, 3), method="m", seed=0, model="x"
    ).save(root / "uneven.json")
    fails("uneven", export.run, export.Options(**to, selection=uneven))
    dense = {"checkpoint": imported(root / "dense", "wide shared expert, dense layers"), "output": root / "never"}
    fails("gguf", export.run, export.Options(**dense, format="gguf"))
    fails("tokenizer", export.run, export.Options(**to, format="gguf", tokenizer=words.write_tokenizer(root / "words")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "gguf", None)
        for module in ("gguf", "gguf_vocabulary"):
            patch.delitem(sys.modules, f"emo_megatron.hf.{module}", raising=False)
        fails("no package", export.run, export.Options(**to, format="gguf"))
    fails("exists", export.run, export.Options(checkpoint=good, output=root / "source"))
    fails(
        "vocabulary of an import",
        import_.run,
        import_.Options(folder=root / "source", output=root / "never", tokenizer=tokenizer),
    )
    return said | {"left": str(sorted(p.name for p in root.glob("*never*")))}


def test_what_cannot_be_is_refused_before_anything_is_written(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    (said,) = ranks(1).run(refusals, folder=str(tmp_path))
    for name, parts in {
        "qk norm and sigmoid": ("qk_layernorm", "moe_router_score_function"),
        "latent attention and experts": ("multi_latent_attention", "moe_latent_size"),
        "positions": ("position_embedding_type", "rotary_percent"),
        "expert count": ("[5, 32]", "[6, 32]"),
        "old": ("rotary_base",),
        "emo": ("--moe-router-pre-softmax",),
        "vocabulary": ("99", "--tokenizer"),
        "selection": ("[1, 2, 3]", "--selection"),
        "uneven": ("1 to 2",),
        "gguf": ("--moe-layer-freq", "[1, 3]"),
        "tokenizer": ("--tokenizer", "WordLevel"),
        "exists": ("source exists",),
        "vocabulary of an import": ("99", "--tokenizer"),
    }.items():
        assert said[name].startswith("ValueError: "), said[name]
        assert all(part in said[name] for part in parts), said[name]
        assert "\n" not in said[name]
    assert said["no package"].startswith("ModuleNotFoundError"), said["no package"]
    assert "gguf" in said["no package"]
    assert said["left"] == "[]"


def refused_beside_the_model(folder: str) -> dict[str, str]:
    """What is said, by name, about measurements, a Selection and settings of generation that are not the model's."""
    from emo_megatron.commands import export, import_
    from emo_megatron.experts.selection import Selection
    from emo_megatron.report.rows import rows_of, save_rows

    root = Path(folder)
    good = imported(root, "grouped queries, renormalised")
    said = {}

    def fails(name: str, function: Callable[..., Any], options: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            # to write is a TypeError
            patch.setattr(import_, "write_checkpoint", None)
            patch.setattr(export, "write_folder", None)
            with pytest.raises(ValueError) as error:  # noqa: PT011
                function(options)
        said[name] = str(error.value)
        assert not (root / "never").exists(), name

    def selection(method: str, kept: int) -> Selection:
        experts = (tuple(range(kept)),) * 3
        return Selection(num_experts=9, experts=experts, layers=(1, 2, 3), method=method, seed=None, model="x")

    def rows(*, model: str, seed: int) -> list[Any]:
        counts = (("full", 9), ("mean_prob", 6), ("random", 6))
        losses = [
            {"domain": "perl", "evaluated_on": "perl", "method": method, "num_experts_kept": kept, "tokens": 9}
            | {"keep_fraction": kept / 9, "loss": 2.0}
            for method, kept in counts
        ]
        return rows_of(losses, model=model, seed=seed, versions="test")

    own = rows(model="emo", seed=0)
    to = {"output": root / "never", "parity_tokens": 0}
    chosen = selection("mean_prob", 6).save(root / "chosen.json")
    for name, others in {"models": rows(model="standard", seed=0), "training seeds": rows(model="emo", seed=7)}.items():
        _, file = save_rows([*own, *others], root / name)
        for module in (None, chosen):
            options = {"selection": module, "retention": file, "retention_domain": "perl"}
            fails(f"{name} {module is chosen}", export.run, export.Options(checkpoint=good, **to, **options))
    _, file = save_rows(own, root / "own")
    # no domain helps a module whose experts were chosen without data
    for method, domain in {"reap": "perl", "compose_union": None, "random": None}.items():
        options = {"selection": selection(method, 6).save(root / f"{method}.json"), "retention": file}
        fails(method, export.run, export.Options(checkpoint=good, **to, **options, retention_domain=domain))
    source = root / "source"
    selection("mean_prob", 4).save(source / "selection.json")
    fails("selection", import_.run, import_.Options(folder=source, **to))
    (source / "selection.json").unlink()
    words.write_tokenizer(source)
    for name, text in {"damaged": '{"eos_token_id": 1,', "eos_token_id": '{"eos_token_id": [0, 80]}'}.items():
        (source / "generation_config.json").write_text(text)
        fails(f"import {name}", import_.run, import_.Options(folder=source, **to))
        fails(f"export {name}", export.run, export.Options(checkpoint=good, tokenizer=source, **to))
    return said


def test_files_of_another_model_are_refused_before_anything_is_written(
    ranks: Callable[[int], Ranks], tmp_path: Path
) -> None:
    (said,) = ranks(1).run(refused_beside_the_model, folder=str(tmp_path))
    for name, parts in {
        "models": ("--retention", "emo, standard"),
        "training seeds": ("--retention", "0, 7"),
        "reap": ("--retention", "--methods reap"),
        "compose_union": ("remove --retention", "compose_union"),
        "random": ("remove --retention", "random"),
        "selection": ("selection.json", "4", "6"),
        "damaged": ("generation_config.json",),
        "eos_token_id": ("generation_config.json", "eos_token_id", "79"),
    }.items():
        found = [text for key, text in said.items() if name in key]
        assert found, name
        for text in found:
            assert all(part in text for part in parts), text
            assert "\n" not in text
    assert "--methods" not in said["compose_union"]


def variables_around_parity() -> list[str]:
    """The variables that Megatron sees where a model's logits are computed in the middle of another job."""
    import os

    from support.other_jobs import OTHER_JOB

    from emo_megatron.runners import parity as hf_parity

    seen: list[str] = []

    class Model(torch.nn.Module):
        def forward(self, *_: Any) -> Any:
            seen.extend(os.environ)
            return torch.zeros(1, 2, 3)

    with pytest.MonkeyPatch.context() as patch:
        for name, value in OTHER_JOB.items():
            patch.setenv(name, value)
        patch.setattr(hf_parity, "_model", lambda checkpoint: Model())
        hf_parity.megatron_logits(None, torch.arange(2))  # type: ignore[arg-type]
    assert seen
    return sorted(set(seen) & OTHER_JOB.keys())


def test_parity_is_measured_in_no_other_job(ranks):
    assert ranks(1).run(variables_around_parity) == [[]]


def wrong_export(folder: str) -> str:
    """A checkpoint beside an export of another one."""
    from emo_megatron.checkpoint.reader import MegatronCheckpoint
    from emo_megatron.hf.folder import HuggingFaceFolder
    from emo_megatron.runners.parity import measure_parity

    root = Path(folder)
    one = imported(root / "one", "the paper's")
    other = hugging_face_folder(root / "other", "grouped queries, renormalised")
    with pytest.raises(RuntimeError) as error:
        measure_parity(MegatronCheckpoint(one), HuggingFaceFolder(other), tokens=16)
    return str(error.value)


def test_another_model_is_no_parity(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    (said,) = ranks(1).run(wrong_export, folder=str(tmp_path))
    assert "are not the same model: largest difference of a logit" in said


def released_in_megatron() -> dict[str, tuple[int, ...]]:
    """Shapes of the released model's tensors as Megatron joins them, without values."""
    from emo_megatron.hf.mapping import FUSED_NORM, Architecture, weight_shapes
    from emo_megatron.hf.megatron import megatron_weights

    model = Architecture(
        vocab_size=100352,
        hidden_size=2048,
        num_layers=16,
        num_heads=16,
        num_kv_heads=16,
        head_dim=128,
        num_experts=127,
        top_k=7,
        expert_hidden=1024,
        shared_hidden=1024,
        rope_theta=5e5,
        max_positions=4096,
        norm_eps=1e-6,
    )
    shapes = weight_shapes(model)
    weights = megatron_weights(
        model, lambda name: torch.empty(shapes[name], device="meta"), dtype=torch.float32, moe_norm=FUSED_NORM
    )
    # an expert at a time: as they are written
    return {
        name: (weight.shape[0], *weight.rows(weight.shape[0] - 1, weight.shape[0]).shape[1:])
        for name, weight in weights.items()
    }


def test_the_released_1b14b_layout_in_megatron(ranks: Callable[[int], Ranks]) -> None:
    (shapes,) = ranks(1).run(released_in_megatron)
    layer = {
        "self_attention.linear_qkv.layer_norm_weight": (2048,),
        "self_attention.linear_qkv.weight": (6144, 2048),
        "self_attention.linear_proj.weight": (2048, 2048),
        "mlp.linear_fc1.layer_norm_weight": (2048,),
        "mlp.router.weight": (127, 2048),
        "mlp.experts.experts.linear_fc1.weight": (127, 2048, 2048),
        "mlp.experts.experts.linear_fc2.weight": (127, 2048, 1024),
        "mlp.shared_experts.linear_fc1.weight": (2048, 2048),
        "mlp.shared_experts.linear_fc2.weight": (2048, 1024),
    }
    expected = {
        "embedding.word_embeddings.weight": (100352, 2048),
        "decoder.final_layernorm.weight": (2048,),
        "output_layer.weight": (100352, 2048),
    } | {f"decoder.layers.{n}.{name}": shape for n in range(16) for name, shape in layer.items()}
    assert shapes == expected
