"""A folder with a small valid file of every kind that the package reads."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from support import decoder, experts, words

DOCUMENTS = ((3, 4, 0), (5, 0), (6, 7, 8, 9, 0), (1, 0))
TEXTS = ("the of experts", "pool module", "route the document \u00e9", "keeps")


def write_inputs(folder: Path) -> Path:
    """Write all of them; the checkpoint and everything about a model belong together."""
    from emo_megatron.checkpoint.reader import MegatronCheckpoint, metadata_of
    from emo_megatron.commands import extract, import_
    from emo_megatron.experts.placement import place
    from emo_megatron.experts.select import select_by_stats, selection_of
    from emo_megatron.mcore.dataset import write_indexed_dataset

    for name, texts in (("text", TEXTS), ("held", TEXTS[::-1])):
        words.write_texts(folder / f"{name}.jsonl", texts)
    words.write_tokens(folder / "tokens.safetensors", [torch.tensor(document).int() for document in DOCUMENTS])
    write_indexed_dataset(folder / "indexed", DOCUMENTS, vocab_size=decoder.SMALL["vocab_size"])
    small = decoder.architecture(num_layers=2, num_experts=4, dense_layers=(), hidden_size=16, head_dim=4)
    for format in ("qwen2_moe", "emo"):
        more = {"extra_config": {"eos_token_id": 0}, "shard_bytes": 20_000}
        decoder.write_folder(folder / format, format, model=small, **more)
    words.write_tokenizer(folder / "qwen2_moe")
    _write_adapter(folder / "adapter", base="qwen2_moe")
    import_.run(import_.Options(folder=folder / "qwen2_moe", output=folder / "megatron", parity_tokens=0))
    metadata = metadata_of(MegatronCheckpoint(folder / "megatron"))
    model = experts.MadeUpModel(metadata=metadata)
    source = experts.documents(3)
    stats = model.statistics(source.tokens, outputs=True).of(source.source)
    stats.save(folder / "stats.safetensors")
    stats.of({"file": "other", "sha256": "other"}).save(folder / "other.safetensors")
    for keep in (2, 3):
        mask_LE = select_by_stats(stats, method="mean_prob", keep=keep)
        data = {"calibration": [source.source]}
        chosen = selection_of(mask_LE, metadata, method="mean_prob", seed=0, data=data)
        chosen.save(folder / f"selection{keep}.json")
    place(stats, num_ranks=2).save(folder / "placement.json")
    extract.run(
        extract.Options(checkpoint=folder / "megatron", selection=folder / "selection3.json", output=folder / "module")
    )
    (folder / "pools.json").write_text(json.dumps({"pool_min": 2, "pool_unrestricted": 0.5}))
    _write_rows(folder)
    return folder


def _write_adapter(folder: Path, *, base: str) -> None:
    """An adapter of two projections; the base is named as the current folder sees it."""
    folder.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": base, "r": 2, "lora_alpha": 4}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"], "bias": "none"}))
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    shapes = {"A": (2, 16), "B": (16, 2)}
    tensors = {name.format(layer, part): torch.ones(shapes[part]) for layer in range(2) for part in "AB"}
    save_file(tensors, folder / "adapter_model.safetensors")


def _write_rows(folder: Path) -> None:
    """Rows as the command retention reports them."""
    from emo_megatron.report.rows import rows_of, save_rows

    measured = [
        {
            "domain": domain,
            "evaluated_on": text,
            "method": method,
            "keep_fraction": kept / 4,
            "num_experts_kept": kept,
            "loss": 5.0 + (4 - kept) / 8 + (domain != text) / 4,
            "tokens": 100,
        }
        for method, kept in (("full", 4), ("random", 2), ("mean_prob", 2))
        for domain in ("french", "perl")
        for text in (("french", "perl") if method == "mean_prob" else (domain,))
    ]
    rows = rows_of(measured, model="other", seed=0, versions="1")
    save_rows(rows, folder / "retention")
