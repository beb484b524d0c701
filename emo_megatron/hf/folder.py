"""Read and write Hugging Face checkpoint folders, tensor by tensor: safetensors shards, their index and config.json."""

from __future__ import annotations

import contextlib
import json
import reprlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from emo_megatron.files import machine_error, one_line, writing
from emo_megatron.finite import NotFiniteError
from emo_megatron.hf.config_file import RECORD
from emo_megatron.hf.fingerprint import FIELD, digest_of, fingerprint_of
from emo_megatron.hf.formats import EMBEDDING, FORMATS, QWEN2_MOE, TIED_COPY, Format, from_file, to_file
from emo_megatron.hf.mapping import Architecture, shape_problems
from emo_megatron.json_files import checked, is_a, read_object

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
QUANTIZED = "hf_quant_config.json"
"""ModelOpt's description of a quantised model, beside config.json."""
SHARD_BYTES = 5_000_000_000
"""Largest size of a shard, as in transformers."""
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NOT_WEIGHTS = ".rotary_emb.inv_freq"


class HuggingFaceFolder:
    """A checkpoint folder in one of `FORMATS`. Everything is checked on construction, except the values of weights.

    Attributes:
        path: the folder.
        config: the content of config.json.
        format: the format of the folder.
        shapes: name -> shape of every tensor.
        dtype: of the tensors.
        architecture: of the model.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        file = self.path / CONFIG
        if not file.exists():
            raise ValueError(
                f"{self.path} is not a Hugging Face checkpoint, because the folder has no {CONFIG}: name another folder"
            )
        self.config: Mapping[str, Any] = read_object(file, kind="a model's configuration")
        check_unquantized(self.path, self.config)
        model_type = self.config.get("model_type")
        if not isinstance(model_type, str) or model_type not in FORMATS:
            raise ValueError(f"{file}: model_type must be one of {', '.join(FORMATS)}; got {reprlib.repr(model_type)}")
        self.format = FORMATS[model_type]
        self._files = _files(self.path)
        parts = {name: opened.get_slice(name) for name, opened in self._files.items()}
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(part.get_shape()) for name, part in parts.items()}
        dtypes = {part.get_dtype() for part in parts.values()}
        if len(dtypes) != 1 or not dtypes <= _FLOATS.keys():
            raise ValueError(
                f"{self.path}: all tensors must have one dtype, one of {', '.join(_FLOATS)}; got "
                f"{', '.join(sorted(dtypes)) or 'no tensor'}: save the model unquantised, in one dtype"
            )
        self.dtype = _FLOATS[dtypes.pop()]
        for name in ("num_hidden_layers", "num_experts"):
            # every layer and every expert has at least one tensor
            if is_a(self.config.get(name), int) and self.config[name] > len(self.shapes):
                raise ValueError(
                    f"{file}: {name} must be at most {len(self.shapes)}, the number of tensors in the folder; got "
                    f"{self.config[name]}"
                )
        try:
            self.architecture: Architecture = self.format.architecture(self.config, self._is_constant)
        except ValueError as error:
            raise ValueError(f"{file}: this model cannot be imported: {error}") from None
        entries = self.format.entries(self.architecture)
        # the copy of a tied embedding comes last, and is not read
        self._entries = {entry.weight: entry for entry in reversed(entries) if entry.weight is not None}
        self._check_shapes({entry.name: entry.shape for entry in entries})
        has_copy = self.architecture.tied and TIED_COPY in self.shapes
        if has_copy and not torch.equal(self.read(EMBEDDING), self.read(TIED_COPY)):
            raise ValueError(
                f"{file}: tie_word_embeddings must be false, because {TIED_COPY} differs from {EMBEDDING}: correct "
                "the field"
            )

    def read(self, name: str) -> Tensor:
        """A tensor, unchanged."""
        with _reading(self.path, what=f": {name} cannot be read"):
            tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def weight(self, weight: str) -> Tensor:
        """A weight of the model, by its name in `mapping.weight_shapes`; NotFiniteError if a value is not finite."""
        entry = self._entries[weight]
        try:
            return from_file(entry, self.read(entry.name))
        except NotFiniteError as error:
            raise NotFiniteError(f"{self.path}: {error}") from None

    @cached_property
    def fingerprint(self) -> str:
        """`fingerprint_of` the weights as they are now; reads every tensor."""
        weights = (name for name in self.shapes if not name.endswith(_NOT_WEIGHTS))
        return fingerprint_of(digest_of(name, self.read(name)) for name in weights)

    def _is_constant(self, part: str, values: set[float]) -> bool:
        seen: set[float] = set()
        for name in self.shapes:
            if part not in name:
                continue
            tensor = self.read(name).to(torch.float32)
            seen |= {float(v) for v in tensor.aminmax()} if tensor.numel() else {0.0}
            if not seen <= values or len(seen) > 1:
                return False
        return True

    def _check_shapes(self, wanted: dict[str, tuple[int, ...]]) -> None:
        stored = {name: shape for name, shape in self.shapes.items() if not name.endswith(_NOT_WEIGHTS)}
        # with "qkv_bias": false the folder has no biases, which is the same model as biases of zero
        optional = [] if self.architecture.qkv_bias else [n for n in wanted if n.endswith("_proj.bias")]
        optional += [TIED_COPY] if self.architecture.tied else []
        if problems := shape_problems(stored, wanted, optional=optional):
            raise ValueError(f"the tensors in {self.path} do not match its {CONFIG}: {'; '.join(problems)}")


def check_unquantized(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise ValueError for a quantised model, whose weights need scales that are not read here.

    transformers may load such weights without the scales, and only warn.
    """
    fields = ("quantization_config", "compression_config")
    found = [f"the field {name} in {CONFIG}" for name in fields if config.get(name)]
    found += [QUANTIZED] if (folder / QUANTIZED).exists() else []
    if found:
        raise ValueError(
            f"{folder} must hold unquantised weights; got a quantised model ({', '.join(found)}): give the model as it "
            "was before quantisation, and quantise the result"
        )


def write_folder(
    folder: Path,
    *,
    format: Format,
    architecture: Architecture,
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
    extra_config: Mapping[str, Any],
    shard_bytes: int = SHARD_BYTES,
    has_index: bool = False,
) -> None:
    """Write config.json and the weights into an existing folder; one shard is in memory at a time.

    The record in config.json holds the fingerprint of the weights.

    Args:
        folder: an existing folder.
        format, architecture, dtype: of the written model.
        read: returns a weight by its name in `mapping.weight_shapes`.
        extra_config: more fields of config.json, such as token ids; a dict is merged into the format's own dict.
        shard_bytes: largest size of a shard.
        has_index: write the index even for one file of weights, so that loaders do not read other safetensors files.
    """
    entries = {entry.name: entry for entry in format.entries(architecture)}
    plan = split_state_dict_into_shards_factory(
        {name: torch.empty(entry.shape, dtype=dtype, device="meta") for name, entry in entries.items()},
        get_storage_size=lambda tensor: tensor.numel() * tensor.element_size(),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    digests = []
    with tqdm(total=len(entries), desc="exporting", unit="tensor", disable=None) as bar:
        for file, names in plan.filename_to_tensors.items():
            shard = {}
            for name in names:
                tensor = to_file(entries[name], read, dtype=dtype)
                # safetensors does not write tensors that share memory
                shard[name] = tensor.clone() if name == TIED_COPY and architecture.tied else tensor
                digests.append(digest_of(name, shard[name]))
                bar.update()
            save_file(shard, folder / file, metadata={"format": "pt"})
    if plan.is_sharded or has_index:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        _write_json(folder / INDEX, index)
    config = format.config(architecture) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    for name, value in (*extra_config.items(), (RECORD, {FIELD: fingerprint_of(digests)})):
        config[name] = config.get(name, {}) | value if isinstance(value, dict) else value
    _write_json(folder / CONFIG, config)


class StoredModel(Protocol):
    """A written model that can be read back: a `HuggingFaceFolder` or a `gguf.GGUFFile`."""

    @property
    def path(self) -> Path:
        """Of the folder or of the file."""

    @property
    def architecture(self) -> Architecture:
        """Of the model."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""

    def weight(self, weight: str) -> Tensor:
        """A weight, by its name in `mapping.weight_shapes`."""


@contextlib.contextmanager
def as_stock(model: StoredModel, *, dtype: torch.dtype | None = None, under: Path | None = None) -> Iterator[Path]:
    """A folder that stock transformers loads: the model's own, or a temporary Qwen2-MoE copy in the folder `under`."""
    if isinstance(model, HuggingFaceFolder) and model.format is QWEN2_MOE:
        yield model.path
        return
    with tempfile.TemporaryDirectory(dir=under) as name:
        with writing(Path(name)):
            write_folder(
                Path(name),
                format=QWEN2_MOE,
                architecture=model.architecture,
                read=model.weight,
                dtype=dtype or model.dtype,
                extra_config={},
            )
        yield Path(name)


def _files(path: Path) -> dict[str, Any]:
    """Tensor name -> the open file with that tensor."""
    if (path / INDEX).exists():
        kind = "an index of files with weights"
        described = read_object(path / INDEX, kind=kind)
        weight_map = checked(described, {"weight_map": dict}, where=str(path / INDEX))["weight_map"]
        for name, file in weight_map.items():
            # only a plain file name: a path could leave the folder
            is_name = is_a(file, str) and Path(file).name == file and "\0" not in file
            if not is_name or not file.endswith(".safetensors"):
                raise ValueError(
                    f"{path / INDEX}: weight_map must give {name} the name of a .safetensors file in the folder; got "
                    f"{reprlib.repr(file)}"
                )
        if not weight_map:
            raise ValueError(f"{path / INDEX}: weight_map must name at least one tensor; got none")
        files = sorted(set(weight_map.values()))
    else:
        weight_map, files = None, [SINGLE]
    missing = [file for file in files if not (path / file).is_file()]
    if missing:
        raise ValueError(
            f"{path} is not whole: of {len(files)} files with weights, {', '.join(missing[:3])} is missing (PyTorch's "
            ".bin files are not read: save the model as safetensors)"
        )
    opened = {}
    for file in files:
        with _reading(path / file, what=" is damaged or was cut short"):
            # memory-mapped; the file is closed with its last reference
            opened[file] = safe_open(path / file, framework="pt")
    held = {name: file for file, handle in opened.items() for name in handle.keys()}  # noqa: SIM118
    if weight_map is not None and held != weight_map:
        differing = sorted(n for n in held.keys() | weight_map.keys() if held.get(n) != weight_map.get(n))
        raise ValueError(
            f"{path / INDEX} does not match its files: {differing[0]} is not in the file that the index names"
        )
    return {name: opened[file] for name, file in held.items()}


@contextlib.contextmanager
def _reading(path: Path, *, what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if refused := machine_error(error):
            raise OSError(refused.errno, refused.strerror, str(path)) from error
        raise ValueError(f"{path}{what}: {one_line(error)}") from None


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
