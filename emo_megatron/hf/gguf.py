"""Write GGUF files for llama.cpp, and read them back.

llama.cpp's architecture `bailingmoe` computes an EMO model exactly: a softmax-routed mixture of experts in every layer,
top-k probabilities that are renormalised if the file says so, and a shared expert of weight 1 without a gate.
(`qwen2moe` of llama.cpp always has a gate and never renormalises.) Differences from the tensors of mapping.py:

- The experts of a layer are stacked in one tensor.
- llama.cpp rotates neighbouring rows of q and k; Hugging Face rotates rows that are half a head apart. The rows of q
  and k are therefore reordered.
- The width of the shared expert is a multiple of the width of a routed expert. Other widths are filled up with zeros,
  which changes no output. A model without shared expert gets a shared expert of zeros.
- The output projection is always stored, also where it shares the weights of the embedding.
- Norms, biases and routers are rounded to the chosen dtype and stored in float32, as llama.cpp's converter does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from emo_megatron.finite import check_named_weight
from emo_megatron.hf.formats import EMBEDDING, Entry, head_dim_problems, to_file
from emo_megatron.hf.gguf_vocabulary import Vocabulary
from emo_megatron.hf.mapping import Architecture, tensors_of

FILE = "model.gguf"
"""Name of the file in the folder of an export."""
KINDS = {torch.float32: Kind.F32, torch.float16: Kind.F16, torch.bfloat16: Kind.BF16}
_ARCHITECTURE = gguf.MODEL_ARCH.BAILINGMOE
_NAME = gguf.MODEL_ARCH_NAMES[_ARCHITECTURE]


def problems(architecture: Architecture) -> list[str]:
    """Properties of an architecture that the GGUF architecture cannot express, one sentence each."""
    a = architecture
    found = head_dim_problems(a, why=f"the sizes of llama.cpp's {_NAME} are not written for other widths")
    if a.dense_layers:
        found.append(
            f"every layer must have experts (--moe-layer-freq); got dense layers {[n + 1 for n in a.dense_layers]}: "
            f"llama.cpp's {_NAME} gives every layer experts"
        )
    if a.shared_gate:
        found.append(
            "the shared expert must have no gate (--moe-shared-expert-gate): the shared expert of llama.cpp's "
            f"{_NAME} has weight 1"
        )
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """A tensor of the file."""

    name: str
    shape: tuple[int, ...]
    """In PyTorch's order of the axes; GGUF itself lists the axes in reverse."""
    weights: tuple[str, ...]
    """The weights of mapping.py that the tensor stacks: one per expert, or one; none for a tensor of zeros."""
    weight_shape: tuple[int, ...]
    """Of each weight."""
    heads: int
    """Number of heads whose rows are reordered; 0: no row is."""

    @property
    def is_single(self) -> bool:
        """Whether the tensor is stored in float32 whatever the dtype."""
        return len(self.shape) == 1 or ".ffn_gate_inp." in self.name


def _parts(architecture: Architecture) -> Iterator[_Part]:
    a = architecture
    names = gguf.get_tensor_name_map(_ARCHITECTURE, a.num_layers)
    heads = {".q_proj.": a.num_heads, ".k_proj.": a.num_kv_heads}
    shared_width = shared_count(a) * a.expert_hidden
    for tensor in tensors_of(a):
        if tensor.is_constant and tensor.row.needs != "shared_hidden":
            continue
        per_expert = len(tensor.row.weights)
        all_weights = list(tensor.weights.items())
        for index, axes in enumerate(tensor.row.weights.values()):
            weight, shape = all_weights[index]
            stacked = tuple(name for name, _ in all_weights[index::per_expert])
            plain = weight.replace(".experts.0.", ".experts.") if tensor.row.is_of_experts else weight
            full = tuple(shared_width if axis == "S" else size for axis, size in zip(axes, shape, strict=True))
            if tensor.row.is_of_experts:
                full = (len(stacked), *full)
            yield _Part(
                name=str(names.get_name(plain, try_suffixes=(".weight", ".bias"))),
                shape=full,
                weights=() if tensor.is_constant else stacked,
                weight_shape=shape,
                heads=next((count for part, count in heads.items() if part in weight), 0),
            )
    if a.tied:
        shape = (a.vocab_size, a.hidden_size)
        embedding = (EMBEDDING,)
        yield _Part(name="output.weight", shape=shape, weights=embedding, weight_shape=shape, heads=0)


def shared_count(architecture: Architecture) -> int:
    """Width of the shared expert in widths of a routed expert, rounded up; 1 for a model without shared expert."""
    return max(1, math.ceil(architecture.shared_hidden / architecture.expert_hidden))


def write(
    path: Path,
    *,
    architecture: Architecture,
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
    vocabulary: Vocabulary | None,
    name: str,
) -> None:
    """Write a file; one tensor is in memory at a time.

    Args:
        path: of the new file.
        architecture, dtype: of the model; `problems` must be empty. The dtype is one of `KINDS`.
        read: returns a weight by its name in `mapping.weight_shapes`.
        vocabulary: of the model's tokenizer; None: the file has no tokenizer, and llama.cpp reads only token ids.
        name: title of the model.

    Raises:
        ValueError: a weight is not finite, or does not fit into the dtype.
    """
    parts = list(_parts(architecture))
    writer = gguf.GGUFWriter(path, _NAME)
    writer.add_name(name)
    _add_sizes(writer, architecture)
    if vocabulary is None:
        writer.add_tokenizer_model("none")
    else:
        vocabulary.add_to(writer)
    for part in parts:
        kind = Kind.F32 if part.is_single else KINDS[dtype]
        size = math.prod(part.shape) * (4 if kind == Kind.F32 else 2)
        # the second dtype is ignored, because the first is given
        writer.add_tensor_info(part.name, part.shape, np.dtype(np.float32), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for part in tqdm(parts, desc="exporting", unit="tensor", disable=None):
        tensor = _stored(part, read, dtype=dtype)
        # NumPy has no bfloat16; the file holds the bits
        writer.write_tensor_data((tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy())
    writer.close()


def _add_sizes(writer: gguf.GGUFWriter, architecture: Architecture) -> None:
    a = architecture
    writer.add_block_count(a.num_layers)
    writer.add_context_length(a.max_positions)
    writer.add_embedding_length(a.hidden_size)
    # llama.cpp asks for the width of dense layers, which the model does not have
    writer.add_feed_forward_length(a.expert_hidden * a.top_k)
    writer.add_head_count(a.num_heads)
    writer.add_head_count_kv(a.num_kv_heads)
    writer.add_layer_norm_rms_eps(a.norm_eps)
    writer.add_rope_freq_base(a.rope_theta)
    writer.add_rope_dimension_count(a.head_dim)
    writer.add_vocab_size(a.vocab_size)
    writer.add_leading_dense_block_count(0)
    writer.add_expert_count(a.num_experts)
    writer.add_expert_used_count(a.top_k)
    writer.add_expert_feed_forward_length(a.expert_hidden)
    writer.add_expert_shared_count(shared_count(a))
    writer.add_expert_weights_norm(a.renormalise)
    writer.add_expert_weights_scale(1.0)


def _stored(part: _Part, read: Callable[[str], Tensor], *, dtype: torch.dtype) -> Tensor:
    """The tensor of the file, in float32 or in `dtype`."""
    entries = [Entry(name=part.name, shape=part.weight_shape, weight=weight) for weight in part.weights]
    # checked and rounded as for the other formats
    weights = [to_file(entry, read, dtype=dtype) for entry in entries]
    if not weights:
        tensor = torch.zeros(part.shape, dtype=dtype)
    elif len(part.shape) > len(part.weight_shape):
        tensor = torch.stack(weights)
    else:
        missing = [whole - given for whole, given in zip(part.shape, part.weight_shape, strict=True)]
        # `pad` takes the axes in reverse, with the number of zeros before and after
        tensor = pad(weights[0], [n for count in reversed(missing) for n in (0, count)])
    if part.heads:
        tensor = _swapped(tensor, part.heads, 2)
    return tensor.to(torch.float32 if part.is_single else dtype).contiguous()


def _swapped(tensor: Tensor, heads: int, halves: int) -> Tensor:
    """Reorder the rows of every head: with `halves` 2 into pairs of neighbours, with head width / 2 back."""
    return tensor.reshape(heads, halves, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


class GGUFFile:
    """A file that `write` wrote; everything comes from the file.

    Attributes:
        path: of the file.
        architecture: of the stored model: the shared expert is as wide as stored, and the output projection is not
            tied.
        dtype: of the stored matrices.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        reader = gguf.GGUFReader(path)
        self.fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        stored = {tensor.name: tensor for tensor in reader.tensors}
        if (found := self.fields["general.architecture"]) != _NAME:
            raise ValueError(f"{path}: general.architecture must be {_NAME}; got {found}")
        kind = stored["token_embd.weight"].tensor_type
        self.dtype = next(dtype for dtype, stored_as in KINDS.items() if stored_as == kind)
        self.architecture = self._architecture(has_bias="blk.0.attn_q.bias" in stored)
        parts = {part.name: part for part in _parts(self.architecture)}
        if parts.keys() != stored.keys():
            raise ValueError(f"{path} has other tensors than its sizes ask for: {sorted(parts.keys() ^ stored.keys())}")
        self._stored = stored
        self._places = {weight: (part, n) for part in parts.values() for n, weight in enumerate(part.weights)}

    def _architecture(self, *, has_bias: bool) -> Architecture:
        of = {name.removeprefix(f"{_NAME}."): value for name, value in self.fields.items()}
        hidden, heads, expert_hidden = (
            of[name] for name in ("embedding_length", "attention.head_count", "expert_feed_forward_length")
        )
        return Architecture(
            vocab_size=of["vocab_size"],
            hidden_size=hidden,
            num_layers=of["block_count"],
            num_heads=heads,
            num_kv_heads=of["attention.head_count_kv"],
            head_dim=hidden // heads,
            num_experts=of["expert_count"],
            top_k=of["expert_used_count"],
            expert_hidden=expert_hidden,
            shared_hidden=of["expert_shared_count"] * expert_hidden,
            renormalise=of["expert_weights_norm"],
            rope_theta=of["rope.freq_base"],
            max_positions=of["context_length"],
            norm_eps=of["attention.layer_norm_rms_epsilon"],
            qkv_bias=has_bias,
        )

    def weight(self, weight: str) -> Tensor:
        """A weight, by its name in `mapping.weight_shapes`, in `dtype`; NotFiniteError if a value is not finite."""
        part, place = self._places[weight]
        data = self._stored[part.name].data
        bits = torch.from_numpy(np.array(data[place] if len(part.weights) > 1 else data))
        # the reader returns bfloat16 as bytes
        tensor = bits.view(torch.float32 if part.is_single else self.dtype).reshape(part.weight_shape)
        if part.heads:
            tensor = _swapped(tensor, part.heads, self.architecture.head_dim // 2)
        check_named_weight(weight, tensor, said=f"{part.name} of {self.path}")
        return tensor.to(self.dtype)
