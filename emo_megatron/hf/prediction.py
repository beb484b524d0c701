"""The weights of multi-token prediction beside an exported model: one file, mtp.safetensors, with Megatron's names.

The Hugging Face formats have no multi-token prediction. The file is not in the index of the model's files, so programs
that load the model do not read the file. Names and values are those of the Megatron checkpoint
(`mtp.layers.0.transformer_layer.mlp.experts.experts.linear_fc1.weight`, [E, 2f, h]), in the dtype of the model, and the
norm of an MoE layer has the name of Megatron's local layers. The header stores the flags of FLAGS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from emo_megatron.checkpoint.names import PREDICTION
from emo_megatron.checkpoint.reader import MegatronCheckpoint
from emo_megatron.checkpoint.writer import LazyWeight
from emo_megatron.files import machine_error, one_line
from emo_megatron.finite import check_weight, first_bad
from emo_megatron.hf.mapping import FUSED_NORM, OWN_NORM, Architecture, NormPlace, shape_problems, tensors_of
from emo_megatron.json_files import from_json, is_a, to_json

FILE = "mtp.safetensors"
FORMAT = "emo_megatron.mtp.1"
FLAGS = ("mtp_num_layers", "mtp_use_repeated_layer")
"""Flags of Megatron that describe the layers."""
_INNER = "transformer_layer."


def has_prediction(checkpoint: MegatronCheckpoint) -> bool:
    """Whether a checkpoint has layers of multi-token prediction, with or without experts."""
    return any(name.startswith(PREDICTION) for name in checkpoint.names)


def check_prediction(checkpoint: MegatronCheckpoint, architecture: Architecture) -> None:
    """Raise ValueError if `save_prediction` has no place for the tensors of a checkpoint; reads names and shapes."""
    shapes = {name: checkpoint.names[stored].shape for name, stored in _stored_names(checkpoint).items()}
    _check(shapes, architecture, _flags(checkpoint), checkpoint.path)


def save_prediction(folder: Path, checkpoint: MegatronCheckpoint, *, dtype: torch.dtype) -> None:
    """Write FILE into a folder; all layers of multi-token prediction are in memory at once.

    `check_prediction` must have accepted the checkpoint. ValueError if a value is not finite in `dtype`.
    """
    tensors = {}
    for name, stored in _stored_names(checkpoint).items():
        weight = checkpoint.read(stored)
        check_weight(f"{stored} of {checkpoint.path}", weight, layer=checkpoint.layer_of(stored) or None)
        tensors[name] = weight.to(dtype).contiguous()
        if first_bad(tensors[name]) is not None:
            raise ValueError(
                f"{stored} does not fit into {dtype}; the largest absolute value is {float(weight.abs().max()):g}: "
                "export with --dtype float32"
            )
    header = {"format": "pt", "emo_megatron": FORMAT, "flags": to_json(_flags(checkpoint))}
    save_file(tensors, folder / FILE, metadata=header)


class Prediction:
    """The layers of multi-token prediction in FILE of an exported folder; ValueError if the file does not fit.

    Attributes:
        flags: the flags of FLAGS.
    """

    def __init__(self, folder: Path, architecture: Architecture, *, dtype: torch.dtype) -> None:
        self._path, self._architecture, self._dtype = folder / FILE, architecture, dtype
        try:
            with safe_open(self._path, framework="pt") as opened:
                header = opened.metadata() or {}
                parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                self._shapes = {name: tuple(part.get_shape()) for name, part in parts.items()}
                dtypes = {part[:0].dtype for part in parts.values()}
        except (OSError, SafetensorError) as error:
            if refused := machine_error(error):
                raise OSError(refused.errno, refused.strerror, str(self._path)) from error
            raise ValueError(f"{self._path} is damaged or was cut short: {one_line(error)}") from None
        if header.get("emo_megatron") != FORMAT:
            raise ValueError(
                f"{self._path} must be a file of {FORMAT}, written by export --mtp keep; got "
                f"{header.get('emo_megatron')!r}: move the file away to import the model without it"
            )
        if dtypes != {dtype}:
            raise ValueError(
                f"{self._path} must hold tensors of {dtype}, as the model; got {', '.join(sorted(map(str, dtypes)))}: "
                "export the model again"
            )
        try:
            flags = from_json(header.get("flags", "null").encode())
        except ValueError as error:
            raise ValueError(
                f"{self._path}: flags in the header must be JSON; {error}: export the model again"
            ) from None
        self.flags: dict[str, Any] = {name: flags.get(name) for name in FLAGS} if isinstance(flags, dict) else {}
        _check(self._shapes, architecture, self.flags, self._path)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Numbers of these layers that have a router, as `MegatronCheckpoint.prediction_layers`."""
        routers = sum(name.endswith(".mlp.router.weight") for name in self._shapes)
        first = self._architecture.num_layers + 1
        return tuple(range(first, first + routers))

    def weights(self, moe_norm: NormPlace) -> dict[str, LazyWeight]:
        """The tensors for a Megatron checkpoint; `moe_norm` is the name of the norm of MoE layers."""
        is_sparse = self._architecture.num_layers - 1 in self._architecture.moe_layers
        norm = moe_norm if is_sparse else FUSED_NORM
        return {
            _renamed(name, FUSED_NORM, norm): LazyWeight(shape=shape, dtype=self._dtype, rows=self._rows(name))
            for name, shape in self._shapes.items()
        }

    def _rows(self, name: str) -> Callable[[int, int], Tensor]:
        def rows(start: int, stop: int) -> Tensor:
            with safe_open(self._path, framework="pt") as opened:
                part: Tensor = opened.get_slice(name)[start:stop]
            return part

        return rows


def _flags(checkpoint: MegatronCheckpoint) -> dict[str, Any]:
    """The flags of FLAGS; None for a flag that the run did not have."""
    return {name: getattr(checkpoint.args, name, None) for name in FLAGS}


def _stored_names(checkpoint: MegatronCheckpoint) -> dict[str, str]:
    """Name in FILE -> name in the checkpoint, of every tensor of multi-token prediction."""
    stored = (name for name in checkpoint.names if name.startswith(PREDICTION))
    return {_renamed(name, OWN_NORM, FUSED_NORM): name for name in stored}


def _renamed(name: str, old: NormPlace, new: NormPlace) -> str:
    return name.removesuffix(old) + new if name.endswith(f"{_INNER}{old}") else name


def _check(
    shapes: Mapping[str, tuple[int, ...]], architecture: Architecture, flags: Mapping[str, Any], path: Path
) -> None:
    """Raise ValueError for other tensors than those of the flags: every depth has the last layer of the decoder."""
    depths: Any = flags.get("mtp_num_layers")
    if not is_a(depths, int) or depths < 1 or depths > len(shapes):
        raise ValueError(
            f"{path}: mtp_num_layers must be at least 1, and at most the number of tensors; got {depths!r}"
        )
    if not isinstance(is_repeated := flags.get("mtp_use_repeated_layer"), bool | None):
        raise ValueError(f"{path}: mtp_use_repeated_layer must be true, false or null; got {is_repeated!r}")
    width = architecture.hidden_size
    around: dict[str, tuple[int, ...]] = {"eh_proj.weight": (width, 2 * width)}
    around |= {f"{norm}.weight": (width,) for norm in ("enorm", "hnorm", "final_layernorm")}
    last = f"decoder.layers.{architecture.num_layers - 1}."
    inner = {
        _INNER + tensor.name.removeprefix(last): tensor.shape
        for tensor in tensors_of(architecture)
        if tensor.name.startswith(last) and not tensor.is_constant
    }
    layers = range(1 if is_repeated else depths)
    wanted = {f"{PREDICTION}layers.{at}.{name}": shape for at in layers for name, shape in (around | inner).items()}
    if problems := shape_problems(shapes, wanted):
        raise ValueError(f"{path}: the tensors of multi-token prediction do not match the model: {'; '.join(problems)}")
