"""A Selection: the routed experts each layer of a model keeps, where that choice came from, and its JSON file.

Shapes: L MoE layers in model order, E routed experts of the parent. Shared experts are always kept and not listed.
"""

from __future__ import annotations

import hashlib
import re
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emo_megatron import __version__
from emo_megatron.files import whole
from emo_megatron.json_files import are_layers, is_a, read_own, to_json

FORMAT = "emo_megatron.selection.1"
"""First entry of the file, so that another file is told apart from a damaged one."""
MOST_EXPERTS = 2**20
"""Of a layer; a file that says more is damaged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """The routed experts that each MoE layer keeps; an error on construction names every field that cannot be."""

    num_experts: int
    """Routed experts of the parent, a layer."""
    experts: tuple[tuple[int, ...], ...]
    """For each MoE layer in model order the kept routed experts, ascending."""
    layers: tuple[int, ...]
    """Number of each MoE layer among all layers of the model, from 1, ascending."""
    method: str
    """What chose them: mean_prob, frequency, layerwise, easy_ep, reap, random, ..."""
    seed: int | None
    """Of a random choice; None if there was none."""
    model: str
    """`router_fingerprint` of the parent."""
    data: dict[str, Any] = field(default_factory=dict)
    """The calibration data: what it was and how many documents and tokens. Any JSON."""
    created_by: str = f"emo_megatron {__version__}"

    def __post_init__(self) -> None:
        problems = _problems(self)
        if problems:
            raise ValueError("this is no Selection: " + "; ".join(problems))

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
        """The kept experts by the number of their layer."""
        return dict(zip(self.layers, self.experts, strict=True))

    @property
    def num_kept(self) -> tuple[int, ...]:
        """Routed experts kept in each MoE layer."""
        return tuple(len(kept) for kept in self.experts)

    def keep_k(self, *, num_shared: int) -> int:
        """Experts kept a layer as the paper counts them, the shared ones included."""
        return self.uniform_count(purpose="one keep-k") + num_shared

    def uniform_count(self, *, purpose: str) -> int:
        """Routed experts kept in every layer; `purpose` says in an error what needs one number."""
        low, high = min(self.num_kept), max(self.num_kept)
        if low < high:
            raise ValueError(
                f"{purpose} needs as many experts in every layer; this Selection keeps {low} to {high}. "
                "Select with --keep, which keeps the same number everywhere."
            )
        return low

    def check_model(self, fingerprint: str, *, num_experts: int, layers: Sequence[int]) -> None:
        """Refuse a model that this Selection was not made for.

        Args:
            fingerprint: `router_fingerprint` of the model.
            num_experts: its routed experts a layer.
            layers: numbers of its MoE layers, from 1.
        """
        if num_experts != self.num_experts:
            difference = f"it has {num_experts} routed experts and the Selection is of {self.num_experts}"
        elif tuple(layers) != self.layers:
            difference = f"its MoE layers are {_short(layers)} and the Selection's {_short(self.layers)}"
        elif fingerprint != self.model:
            difference = f"its routers have the fingerprint {fingerprint[:12]} and the Selection's {self.model[:12]}"
        else:
            return
        raise ValueError(
            f"this Selection was made from another model: {difference}. Run stats and select on this model."
        )

    def save(self, path: Path | str) -> Path:
        """Write the file, whole or not at all; returns its path."""
        path = Path(path)
        text = to_json({"format": FORMAT} | asdict(self), indent=1)
        # a layer's experts on one line: the file is read by people
        text = re.sub(r"\[\s+(-?\d+(?:,\s+-?\d+)*)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
        with whole(path) as unfinished:
            unfinished.write_text(text + "\n", encoding="utf-8")
        return path


def load_selection(path: Path | str) -> Selection:
    """Read a Selection file; one that is damaged or of another version is an error with its name."""
    path = Path(path)
    names = [f.name for f in fields(Selection)]
    stored = read_own(path, kind="a Selection", format=FORMAT, fields=names, made_by="select")
    try:
        experts = tuple(tuple(layer) for layer in stored.pop("experts"))
        return Selection(experts=experts, layers=tuple(stored.pop("layers")), **stored)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def router_fingerprint(router_weights: Iterable[Tensor]) -> str:
    """What a Selection knows its model by: sha256, in hex, of the routers of its MoE layers in model order.

    They are [E, h], whole, in any dtype, and compared as float32.
    """
    digest = hashlib.sha256()
    for weight in router_weights:
        # one layer at a time, and no numpy type for bfloat16 is needed
        digest.update(weight.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _problems(selection: Selection) -> list[str]:
    problems = []
    num_experts = selection.num_experts
    if not is_a(num_experts, int) or not 1 <= num_experts <= MOST_EXPERTS:
        return [f"num_experts must be a positive number, {MOST_EXPERTS} at most; got {num_experts!r}"]
    layers = selection.layers
    if not layers or not are_layers(layers):
        problems.append(f"layers must be ascending numbers from 1; got {_short(layers)}")
    if len(selection.experts) != len(layers):
        problems.append(f"it lists {len(selection.experts)} layers of experts and {len(layers)} layer numbers")
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
        problems.append(f"seed must be a number or null; got {reprlib.repr(selection.seed)}")
    data: Any = selection.data
    if not isinstance(data, dict):
        problems.append(f"data must be an object; got {reprlib.repr(data)}")
    return problems


def _short(numbers: Sequence[object]) -> str:
    head = ", ".join(map(reprlib.repr, numbers[:8]))
    return f"[{head}, ... {len(numbers)} in all]" if len(numbers) > 8 else f"[{head}]"
