"""A Selection: the routed experts that each layer of a model keeps, the origin of the choice, and the JSON file.

Shapes: L MoE layers in model order, E routed experts of the parent. Shared experts are always kept and not listed.
"""

from __future__ import annotations

import hashlib
import re
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emo_megatron import __version__
from emo_megatron.files import whole
from emo_megatron.json_files import are_layers, is_a, read_own, to_json

FORMAT = "emo_megatron.selection.1"
"""First entry of the file; it distinguishes a file of another kind from a damaged file."""
MOST_EXPERTS = 2**20
"""Largest accepted number of experts per layer; a file with a larger number is damaged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """The routed experts that each MoE layer keeps; construction raises ValueError that names every invalid field."""

    num_experts: int
    """Routed experts per layer of the parent."""
    experts: tuple[tuple[int, ...], ...]
    """For each MoE layer in model order, the kept routed experts, ascending."""
    layers: tuple[int, ...]
    """Number of each MoE layer among all layers of the model, from 1, ascending."""
    method: str
    """The method that chose the experts: mean_prob, frequency, layerwise, easy_ep, reap, random, ..."""
    seed: int | None
    """Seed of a random choice; None for other methods."""
    model: str
    """`router_fingerprint` of the parent."""
    data: dict[str, Any] = field(default_factory=dict)
    """The calibration data: files, numbers of documents and tokens. Any JSON object."""
    created_by: str = f"emo_megatron {__version__}"

    def __post_init__(self) -> None:
        problems = _problems(self)
        if problems:
            raise ValueError("this is not a valid Selection: " + "; ".join(problems))

    @classmethod
    def from_mask(cls, keep_mask_LE: Tensor, **rest: Any) -> Selection:
        """The Selection of a mask, [L, E] bool with True = keep; `rest` are the other fields."""
        experts = tuple(tuple(row.nonzero().flatten().tolist()) for row in keep_mask_LE)
        return cls(num_experts=int(keep_mask_LE.shape[1]), experts=experts, **rest)

    def keep_mask(self) -> Tensor:
        """[L, E] bool, True = keep."""
        mask_LE = torch.zeros(len(self.layers), self.num_experts, dtype=torch.bool)
        for row_E, kept in zip(mask_LE, self.experts, strict=True):
            row_E[list(kept)] = True
        return mask_LE

    @property
    def by_layer(self) -> dict[int, tuple[int, ...]]:
        """Layer number -> kept experts."""
        return dict(zip(self.layers, self.experts, strict=True))

    @property
    def num_kept(self) -> tuple[int, ...]:
        """Number of routed experts kept in each MoE layer."""
        return tuple(len(kept) for kept in self.experts)

    def only(self, layers: Sequence[int]) -> Selection:
        """The same choice for some of the layers, given by their numbers."""
        return replace(self, layers=tuple(layers), experts=tuple(self.by_layer[layer] for layer in layers))

    def keep_k(self, *, num_shared: int) -> int:
        """Kept experts per layer in the paper's count, which includes shared experts."""
        return self.uniform_count(purpose="one keep-k") + num_shared

    def uniform_count(self, *, purpose: str) -> int:
        """The single number of routed experts kept per layer. Otherwise ValueError, which names `purpose`."""
        low, high = min(self.num_kept), max(self.num_kept)
        if low < high:
            raise ValueError(
                f"{purpose} needs the same number of experts in every layer; this Selection keeps {low} to {high}: "
                "select with --keep, which keeps the same number in every layer"
            )
        return low

    def check_model(
        self, fingerprint: str, *, num_experts: int, layers: Sequence[int], prediction_layers: Sequence[int] = ()
    ) -> None:
        """Raise ValueError if this Selection was made for another model.

        Args:
            fingerprint: `router_fingerprint` of the model.
            num_experts: routed experts per layer of the model.
            layers: numbers of the model's MoE layers, from 1.
            prediction_layers: the part of `layers` that belongs to multi-token prediction, for the error message.
        """
        if num_experts != self.num_experts:
            difference = f"this model has {num_experts} routed experts, the Selection's model {self.num_experts}"
        elif tuple(layers) != self.layers:
            difference = f"this model has the MoE layers {_short(layers)}, the Selection's model {_short(self.layers)}"
            difference += _of_prediction(tuple(layers), self.layers, tuple(prediction_layers))
        elif fingerprint != self.model:
            difference = (
                f"the routers of this model have the fingerprint {fingerprint[:12]}, those of the Selection's model "
                f"{self.model[:12]}"
            )
        else:
            return
        raise ValueError(
            f"this Selection was made from another model ({difference}): run stats and select on this model"
        )

    def save(self, path: Path | str) -> Path:
        """Write the file, complete or not at all; return the path."""
        path = Path(path)
        text = to_json({"format": FORMAT} | asdict(self), indent=1)
        # the experts of a layer on one line, for human readers
        text = re.sub(r"\[\s+(-?\d+(?:,\s+-?\d+)*)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
        with whole(path) as unfinished:
            unfinished.write_text(text + "\n", encoding="utf-8")
        return path


def load_selection(path: Path | str) -> Selection:
    """Read a Selection file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged or of another version; the error names the path.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no Selection file {path}: write one with select")
    names = [f.name for f in fields(Selection)]
    stored = read_own(path, kind="a Selection", format=FORMAT, fields=names, made_by="select")
    try:
        experts = tuple(tuple(layer) for layer in stored.pop("experts"))
        return Selection(experts=experts, layers=tuple(stored.pop("layers")), **stored)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def load_selection_of_module(path: Path, *, num_experts: int, layers: Sequence[int], wanted: str) -> Selection:
    """Read the Selection that a module was cut with.

    Args:
        path: the file.
        num_experts: routed experts per layer of the module.
        layers: numbers of the module's MoE layers, from 1.
        wanted: what to change if the Selection is of another module, for the error message.

    Raises:
        FileNotFoundError, ValueError: as `load_selection`.
        ValueError: the Selection keeps other numbers of experts, or has other layers.
    """
    selection = load_selection(path)
    kept = selection.uniform_count(purpose=f"the Selection of a module ({path})")
    if kept != num_experts or selection.layers != tuple(layers):
        raise ValueError(
            f"{path} keeps {kept} experts in layers {_short(selection.layers)}; this model has {num_experts} in "
            f"{_short(layers)}: {wanted}"
        )
    return selection


def router_fingerprint(router_weights: Iterable[Tensor]) -> str:
    """Fingerprint of a model: sha256, in hex, of the router weights of its MoE layers in model order.

    Each weight is a complete [E, h] tensor of any dtype, and is converted to float32.
    """
    digest = hashlib.sha256()
    for weight in router_weights:
        # one layer at a time; float32 because numpy has no bfloat16
        digest.update(weight.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _of_prediction(layers: tuple[int, ...], selected: tuple[int, ...], predicting: tuple[int, ...]) -> str:
    """The part of the error message for two models that differ in layers of multi-token prediction only, or ""."""
    if predicting and selected == layers[: -len(predicting)]:
        return f"; {_short(predicting)} are layers of multi-token prediction, of which the Selection names none"
    if layers and selected[: len(layers)] == layers:
        return (
            f"; if {_short(selected[len(layers) :])} are layers of multi-token prediction, this model was made without "
            "them"
        )
    return ""


def _problems(selection: Selection) -> list[str]:
    problems = []
    num_experts = selection.num_experts
    if not is_a(num_experts, int) or not 1 <= num_experts <= MOST_EXPERTS:
        return [f"num_experts must be a whole number in [1, {MOST_EXPERTS}]; got {num_experts!r}"]
    layers = selection.layers
    if not layers or not are_layers(layers):
        problems.append(f"layers must be ascending numbers from 1; got {_short(layers)}")
    if len(selection.experts) != len(layers):
        problems.append(
            f"experts and layers must have one entry per MoE layer; got {len(selection.experts)} and {len(layers)}"
        )
    for layer, kept in zip(layers, selection.experts, strict=False):
        is_ascending = all(is_a(expert, int) for expert in kept) and list(kept) == sorted(set(kept))
        if not kept or not is_ascending or kept[0] < 0 or kept[-1] >= num_experts:
            problems.append(
                f"layer {layer} must keep at least one expert of 0 to {num_experts - 1}, ascending; got {_short(kept)}"
            )
            break
    for name in ("method", "model", "created_by"):
        value: Any = getattr(selection, name)
        if not isinstance(value, str) or not value:
            problems.append(f"{name} must be a text; got {reprlib.repr(value)}")
    if selection.seed is not None and not is_a(selection.seed, int):
        problems.append(f"seed must be a whole number or null; got {reprlib.repr(selection.seed)}")
    data: Any = selection.data
    if not isinstance(data, dict):
        problems.append(f"data must be an object; got {reprlib.repr(data)}")
    return problems


def _short(numbers: Sequence[object]) -> str:
    head = ", ".join(map(reprlib.repr, numbers[:8]))
    return f"[{head}, ... {len(numbers)} in all]" if len(numbers) > 8 else f"[{head}]"
