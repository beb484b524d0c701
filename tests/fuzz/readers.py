"""Every reader of a file: which files it reads, how it is called, and what is true of all that it may return."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import decoder

from emo_megatron.checkpoint.reader import MegatronCheckpoint, metadata_of
from emo_megatron.config import load_pool_config
from emo_megatron.experts.calibration import Calibration, load_documents
from emo_megatron.experts.placement import load_placement
from emo_megatron.experts.select import MaxLossIncrease
from emo_megatron.experts.selection import load_selection
from emo_megatron.experts.stats import load_stats
from emo_megatron.hf.folder import HuggingFaceFolder
from emo_megatron.hf.mapping import weight_shapes
from emo_megatron.hf.tokenizer import Tokenizer
from emo_megatron.mcore.dataset import IndexedDocuments
from emo_megatron.report.rows import load_rows
from emo_megatron.report.table import full_report


@dataclass(frozen=True, kw_only=True)
class Reader:
    files: tuple[str, ...]
    """Those that are damaged, one at a time."""
    read: Callable[[Path], Any]
    """Folder of the files -> what is read."""
    check: Callable[[Any, Path], None]
    """Fails where that cannot be right."""
    also_named: tuple[str, ...] = ()
    """What an error may name in place of the file: what is read as one."""


def are_of(kind: type, values: Iterable[Any], *, least: float = -math.inf) -> bool:
    """Whether these are of a type, finite and not below `least`; integers are numbers, bools are none."""
    kinds = (int, float) if kind is float else (kind,)
    return all(type(v) in kinds and (kind is str or least <= v < math.inf) for v in values)


def plain_safetensors(path: Path) -> dict[str, Any]:
    """Name -> array by the format's definition, for the types that are used here."""
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    kinds = {"F64": "<f8", "F32": "<f4", "I64": "<i8", "I32": "<i4", "I16": "<i2", "U8": "u1"}
    return {
        name: np.frombuffer(data[slice(*entry["data_offsets"])], kinds[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def plain_indexed(prefix: Path) -> list[list[int]]:
    """Documents of an indexed dataset by the format's definition."""
    index, data = (Path(f"{prefix}.{ending}").read_bytes() for ending in ("idx", "bin"))
    form = "<9sQBQQ"
    magic, version, code, sequences, documents = struct.unpack_from(form, index)
    assert (magic, version) == (b"MMIDIDX\x00\x00", 1)
    kind = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}[code]
    at = struct.calcsize(form)
    lengths = np.frombuffer(index, "<i4", sequences, at).tolist()
    pointers = np.frombuffer(index, "<i8", sequences, at + 4 * sequences).tolist()
    bounds = np.frombuffer(index, "<i8", documents, at + 12 * sequences).tolist()
    assert bounds == sorted(bounds), "documents that overlap"
    assert (bounds[0], bounds[-1]) == (0, sequences), "documents that are not all"
    assert min(pointers) >= 0, "before the file"
    parts = [
        np.frombuffer(data, kind, length, pointer).tolist() for length, pointer in zip(lengths, pointers, strict=True)
    ]
    return [[token for part in parts[a:b] for token in part] for a, b in pairwise(bounds)]


def documents(folder: Path, name: str) -> list[list[int]]:
    found = load_documents(
        folder / name,
        calibration=Calibration(),
        tokenizer=Tokenizer(folder / "qwen2_moe"),
        read_indexed=IndexedDocuments,
        vocab_size=decoder.SMALL["vocab_size"],
    )
    assert found.num_tokens == found.source["tokens"] == sum(map(len, found.tokens))
    return [document.tolist() for document in found.tokens]


def same_texts(documents: list[list[int]], folder: Path) -> None:
    lines = (folder / "text.jsonl").read_text().split("\n")
    texts = [json.loads(line)["text"] for line in lines if line.strip()]
    encode = Tokenizer(folder / "qwen2_moe").encode
    assert documents == [encode(text) for text in texts]


def same_tokens(documents: list[list[int]], folder: Path) -> None:
    stored = plain_safetensors(folder / "tokens.safetensors")
    assert all(stored[name].dtype.kind in "iu" for name in ("tokens", "cu_seqlens"))
    tokens, bounds = stored["tokens"].tolist(), stored["cu_seqlens"].tolist()
    assert (bounds[0], bounds[-1]) == (0, len(tokens))
    assert documents == [tokens[a:b] for a, b in pairwise(bounds) if b > a]


def same_sequences(documents: list[list[int]], folder: Path) -> None:
    assert documents == [document for document in plain_indexed(folder / "indexed") if document]


def is_selection(selection: Any, folder: Path) -> None:
    assert repr(load_selection(selection.save(folder / "again.json"))) == repr(selection)
    stored = json.loads((folder / "selection2.json").read_text())
    assert [list(kept) for kept in selection.experts] == stored["experts"]
    assert {*dataclasses.asdict(selection), "format"} == stored.keys()
    assert are_of(int, selection.layers, least=1)
    assert all(0 <= e < selection.num_experts for kept in selection.experts for e in kept)


def is_statistics(stats: Any, folder: Path) -> None:
    stored = plain_safetensors(folder / "stats.safetensors")
    assert stored.keys() == stats.tensors().keys()
    for name, tensor in stats.tensors().items():
        assert np.array_equal(tensor.numpy(), stored[name]), name
        assert bool(tensor.isfinite().all() and (tensor >= 0).all()), f"{name} cannot be a sum"
    metadata = dataclasses.asdict(stats.model)
    layers, fingerprint = metadata.pop("layers"), metadata.pop("fingerprint")
    assert are_of(int, metadata.values(), least=0), metadata
    assert are_of(int, (*layers, stats.num_documents, stats.num_tokens), least=1)
    assert are_of(str, [fingerprint])
    assert list(layers) == sorted(set(layers))
    assert 1 <= metadata["top_k"] <= metadata["num_experts"]
    assert all(isinstance(entry, dict) for entry in stats.data)


def is_placement(placement: Any, folder: Path) -> None:
    assert load_placement(placement.save(folder / "again.json")) == placement
    assert are_of(int, (placement.num_experts, placement.num_ranks, *placement.layers), least=1)
    assert are_of(int, (expert for order in placement.order for expert in order), least=0)
    assert list(placement.layers) == sorted(set(placement.layers))
    assert are_of(str, (placement.model, placement.method))
    assert are_of(float, [placement.max_imbalance], least=1)


def are_rows(rows: Any, folder: Path) -> None:
    for row in rows:
        for field in dataclasses.fields(row):
            assert are_of(field.type, [getattr(row, field.name)]), (field.name, row)
        assert min(row.tokens, row.num_experts_kept) >= 1, row
        assert 0 < row.keep_fraction <= 1, row
    assert full_report(rows, MaxLossIncrease.parse("1%"))


def are_pools(config: Any, folder: Path) -> None:
    stored = json.loads((folder / "pools.json").read_text())
    assert all(getattr(config, name) == value for name, value in stored.items())
    assert all(math.isfinite(v) for v in dataclasses.asdict(config).values() if type(v) is float)


def model(folder: Path) -> Any:
    found = HuggingFaceFolder(folder)
    shapes = weight_shapes(found.architecture)
    assert all(tuple(found.weight(name).shape) == shape for name, shape in shapes.items())
    return found.architecture


def is_architecture(architecture: Any, folder: Path) -> None:
    for field in dataclasses.fields(architecture):
        value = getattr(architecture, field.name)
        kind = {"int": int, "bool": bool, "float": float}.get(str(field.type))
        values = value if kind is None else [value]
        assert are_of(kind or int, values, least=0), (field.name, value)


def adapter(folder: Path) -> Any:
    pytest.importorskip("peft")
    from emo_megatron.hf import adapter as adapters

    with contextlib.chdir(folder):
        try:
            adapters.check(HuggingFaceFolder("qwen2_moe"), folder / "adapter")
        except NotImplementedError as error:
            # another kind of adapter is a user's error too
            raise ValueError(*error.args) from None
    return json.loads((folder / "adapter" / "adapter_config.json").read_text())


def is_adapter(config: Any, folder: Path) -> None:
    assert (config["peft_type"], config["base_model_name_or_path"]) == ("LORA", "qwen2_moe")


def is_tokenizer(tokenizer: Any, folder: Path) -> None:
    ids = tokenizer.encode("the pool of experts")
    assert are_of(int, ids, least=0)
    assert max(ids, default=0) < len(tokenizer)


def checkpoint(folder: Path) -> Any:
    found = MegatronCheckpoint(folder / "megatron")
    return metadata_of(found), found.names, {name: found.read(name) for name in found.names}


def is_checkpoint(found: Any, folder: Path) -> None:
    metadata, names, weights = found
    assert metadata.num_experts > 0
    assert all(
        (tuple(weights[name].shape), weights[name].dtype) == (info.shape, info.dtype) for name, info in names.items()
    )


def is_the_checkpoint(found: Any, folder: Path) -> None:
    is_checkpoint(found, folder)
    wanted = HuggingFaceFolder(folder / "qwen2_moe").weight("model.layers.1.mlp.gate.weight")
    assert torch.equal(found[2]["decoder.layers.1.mlp.router.weight"], wanted)


def _reader(*files: str, read: Any, check: Any, named: tuple[str, ...] = ()) -> Reader:
    return Reader(files=files, read=read, check=check, also_named=named)


_HF, _MEGATRON = "qwen2_moe/", "megatron/"
_ITERATION = "megatron/release/"
READERS = {
    "texts": _reader("text.jsonl", read=lambda f: documents(f, "text.jsonl"), check=same_texts),
    "tokens": _reader("tokens.safetensors", read=lambda f: documents(f, "tokens.safetensors"), check=same_tokens),
    "indexed dataset": _reader(
        *("indexed.idx", "indexed.bin"),
        read=lambda f: documents(f, "indexed"),
        check=same_sequences,
        named=("indexed",),
    ),
    "selection": _reader("selection2.json", read=lambda f: load_selection(f / "selection2.json"), check=is_selection),
    "statistics": _reader("stats.safetensors", read=lambda f: load_stats(f / "stats.safetensors"), check=is_statistics),
    "placement": _reader("placement.json", read=lambda f: load_placement(f / "placement.json"), check=is_placement),
    "rows, json": _reader("retention.json", read=lambda f: load_rows(f / "retention.json"), check=are_rows),
    "rows, csv": _reader("retention.csv", read=lambda f: load_rows(f / "retention.csv"), check=are_rows),
    "pools": _reader("pools.json", read=lambda f: load_pool_config(f / "pools.json"), check=are_pools),
    "qwen2_moe": _reader(
        *(f"{_HF}config.json", f"{_HF}model.safetensors.index.json"),
        f"{_HF}model-00001-of-00003.safetensors",
        read=lambda f: model(f / "qwen2_moe"),
        check=is_architecture,
        named=("/qwen2_moe",),
    ),
    "emo": _reader("emo/config.json", read=lambda f: model(f / "emo"), check=is_architecture, named=("/emo",)),
    "adapter": _reader("adapter/adapter_config.json", read=adapter, check=is_adapter, named=("/adapter",)),
    "tokenizer": _reader(
        *(f"{_HF}tokenizer.json", f"{_HF}tokenizer_config.json"),
        read=lambda f: Tokenizer(f / "qwen2_moe"),
        check=is_tokenizer,
        named=("/qwen2_moe",),
    ),
    "weights of a checkpoint": _reader(
        *(f"{_ITERATION}.metadata", f"{_ITERATION}__0_0.distcp"),
        read=checkpoint,
        check=is_checkpoint,
        named=("/megatron",),
    ),
    "place of a checkpoint": _reader(
        *(f"{_MEGATRON}latest_checkpointed_iteration.txt", f"{_ITERATION}metadata.json"),
        read=checkpoint,
        check=is_the_checkpoint,
        named=("/megatron",),
    ),
}
