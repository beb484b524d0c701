"""Statistics of the experts of a model on calibration documents: one file per data set; files can be merged.

Shapes: T tokens, L MoE layers in model order, E routed experts. Every stored value is a sum over tokens, so the
statistics of two sets of documents can be added.

    probability      p(e|t), the router's probability of expert e over all routed experts          arXiv 2605.06663
    count            1 where token t is routed to expert e
    coactivation     1 where token t is routed to both experts
    gated_norm       g * |f_e|, gate times L2 norm of the expert's output, where t is routed to e  arXiv 2510.13999
    residual_change  gated_norm * max(0, 1 - cos(h, h + MoE(h))), h the MoE layer's normed input   arXiv 2504.06792
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from emo_megatron import __version__
from emo_megatron.files import one_line, whole
from emo_megatron.finite import NotFiniteError
from emo_megatron.json_files import are_layers, checked, from_json, to_json

FORMAT = "emo_megatron.stats.2"
FIRST_FORMAT = "emo_megatron.stats.1"
FIRST_NAMES = {"together_LEE": "coactivation_LEE", "norm_LE": "gated_norm_LE", "change_LE": "residual_change_LE"}
"""Names of tensors in the first format -> names in the present format."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelMetadata:
    """The metadata of a model that the choice of experts needs."""

    fingerprint: str
    """`router_fingerprint` of the model."""
    num_experts: int
    """Routed experts per layer."""
    top_k: int
    """Routed experts per token."""
    layers: tuple[int, ...]
    """Numbers of the MoE layers, from 1."""
    expert_parameters: int
    """Parameters of one routed expert of one layer, including the expert's router row."""
    other_parameters: int
    """All other parameters: everything except routed experts and their router rows."""
    bytes_per_parameter: int = 2
    """Bytes per parameter of the routed experts in the checkpoint."""

    def is_same(self, other: ModelMetadata) -> bool:
        """Whether both models have equal routers; the other fields may depend on the format of the checkpoint."""
        names = ("fingerprint", "num_experts", "top_k", "layers")
        return all(getattr(self, name) == getattr(other, name) for name in names)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ExpertStatistics:
    """Sums over the tokens of calibration documents, with the metadata of the model and of the documents.

    Raises:
        ValueError: on construction, if a shape or dtype differs from those below, or a sum is negative or not finite
            (NotFiniteError, which names the layer and the expert).
    """

    model: ModelMetadata
    num_documents: int
    num_tokens: int
    probability_LE: Tensor
    """[L, E] float64, sum of router probabilities."""
    count_LE: Tensor
    """[L, E] int64, tokens routed to each expert."""
    coactivation_LEE: Tensor
    """[L, E, E] int64, tokens routed to both experts; the diagonal is `count_LE`."""
    gated_norm_LE: Tensor | None = None
    """[L, E] float64; None if outputs of experts were not measured."""
    residual_change_LE: Tensor | None = None
    """[L, E] float64; None if outputs of experts were not measured."""
    data: tuple[dict[str, Any], ...] = ()
    """The sources of the documents, one entry per data set."""
    created_by: str = field(default=f"emo_megatron {__version__}")

    def __post_init__(self) -> None:
        num_layers, num_experts = len(self.model.layers), self.model.num_experts
        for name, tensor in self.tensors().items():
            shape = (num_layers, num_experts, num_experts)[: 3 if name == "coactivation_LEE" else 2]
            dtype = torch.int64 if name in ("count_LE", "coactivation_LEE") else torch.float64
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise ValueError(f"{name} must be {list(shape)} {dtype}; got {list(tensor.shape)} {tensor.dtype}")
        self._check_finite()
        for name, tensor in self.tensors().items():
            if tensor.numel() and tensor.min() < 0:
                raise ValueError(f"{name} must not contain negative sums; got {tensor.min().item()}")

    def _check_finite(self) -> None:
        """Check layer by layer, because a value that is not finite makes the values of later layers not finite too."""
        sums = {name: t for name, t in self.tensors().items() if t.is_floating_point()}
        for place, layer in enumerate(self.model.layers):
            for name, tensor_LE in sums.items():
                bad = (~tensor_LE[place].isfinite()).nonzero().flatten().tolist()
                if bad:
                    others = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
                    raise NotFiniteError(
                        f"statistics of experts must be finite; layer {layer}, expert {bad[0]}{others}: {name} is "
                        f"{float(tensor_LE[place, bad[0]])}"
                    )

    def tensors(self) -> dict[str, Tensor]:
        """The measured sums, by name."""
        names = ("probability_LE", "count_LE", "coactivation_LEE", "gated_norm_LE", "residual_change_LE")
        found = {name: getattr(self, name) for name in names}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def mean_probability_LE(self) -> Tensor:
        """[L, E] float64, mean router probability: the paper's score."""
        return self.probability_LE / max(self.num_tokens, 1)

    @property
    def frequency_LE(self) -> Tensor:
        """[L, E] float64, share of the tokens routed to each expert; each row sums to top-k.

        The row of a layer of multi-token prediction sums to less, because the layer counts fewer tokens.
        """
        return self.count_LE.double() / max(self.num_tokens, 1)

    @property
    def reap_LE(self) -> Tensor:
        """[L, E] float64, mean of gate times output norm over the tokens of each expert (arXiv 2510.13999)."""
        return _measured(self.gated_norm_LE, "reap") / self.count_LE.clamp(min=1)

    @property
    def easy_ep_LE(self) -> Tensor:
        """[L, E] float64, gated output norm times the residual change of the layer, summed (arXiv 2504.06792)."""
        return _measured(self.residual_change_LE, "easy_ep")

    def of(self, source: dict[str, Any]) -> ExpertStatistics:
        """A copy with `source` as the source of the documents."""
        return dataclasses.replace(self, data=(source,))

    def digest(self) -> str:
        """sha256, in hex, of the measured sums."""
        digest = hashlib.sha256(f"{self.num_tokens}".encode())
        for name, tensor in self.tensors().items():
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: Path | str) -> Path:
        """Write the file, complete or not at all; return the path."""
        path = Path(path)
        described = {
            "format": FORMAT,
            "model": to_json(asdict(self.model)),
            "num_documents": str(self.num_documents),
            "num_tokens": str(self.num_tokens),
            "data": to_json(self.data),
            "created_by": self.created_by,
        }
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors().items()}
        with whole(path) as unfinished:
            save_file(tensors, unfinished, metadata=described)
        return path


def _measured(tensor: Tensor | None, method: str) -> Tensor:
    if tensor is None:
        raise ValueError(
            f"the method {method} needs the outputs of the experts, which these statistics do not include: "
            "run stats with --outputs"
        )
    return tensor


def load_stats(path: Path | str) -> ExpertStatistics:
    """Read a statistics file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a statistics file, is damaged, or contains a sum that is not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no statistics file {path}: write one with stats")
    try:
        with safe_open(path, framework="pt") as file:
            described = file.metadata() or {}
            # safe_open lists tensors only through this method
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a statistics file or was cut short: {one_line(error)}") from None
    found, name = described.get("format", ""), FORMAT.rpartition(".")[0]
    if found == FIRST_FORMAT:
        found, tensors = FORMAT, {FIRST_NAMES.get(key, key): tensor for key, tensor in tensors.items()}
    if found != FORMAT and found.startswith(f"{name}."):
        raise ValueError(f"{path} must have the format {FORMAT}; got {found}: write the file again with stats")
    if found != FORMAT:
        raise ValueError(f"{path} is not a statistics file: the format must be {FORMAT}")
    try:
        return ExpertStatistics(
            model=_metadata(from_json(described["model"].encode())),
            num_documents=_count(described, "num_documents"),
            num_tokens=_count(described, "num_tokens"),
            data=_sources(from_json(described["data"].encode())),
            created_by=described["created_by"],
            **tensors,
        )
    except NotFiniteError as error:
        raise NotFiniteError(f"{path} cannot be used, remove the file: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is a damaged statistics file: {error}") from None


def _count(described: Mapping[str, str], name: str) -> int:
    """A number of the metadata; sums over nothing are not statistics."""
    if (count := int(described[name])) < 1:
        raise ValueError(f"{name} must be at least 1; got {count}")
    return count


def _metadata(stored: object) -> ModelMetadata:
    """The model's metadata in a file."""
    kinds: dict[str, type] = {f.name: int for f in dataclasses.fields(ModelMetadata)}
    found = checked(stored, kinds | {"fingerprint": str, "layers": list}, where="model", least=0)
    layers = found["layers"]
    if not are_layers(layers):
        raise ValueError(f"model: layers must be ascending numbers from 1; got {layers}")
    if not 1 <= found["top_k"] <= found["num_experts"]:
        raise ValueError(f"model: top_k must be in [1, num_experts]; got {found['top_k']}")
    # earlier files also have num_shared
    return ModelMetadata(**{name: found[name] for name in kinds} | {"layers": tuple(layers)})


def _sources(stored: object) -> tuple[dict[str, Any], ...]:
    if not isinstance(stored, list):
        raise ValueError("data must be a list")
    return tuple(checked(entry, {}, where="an entry of data") for entry in stored)


def merge_stats(parts: Sequence[ExpertStatistics]) -> ExpertStatistics:
    """The statistics of the documents of all parts."""
    if not parts:
        raise ValueError("there are no statistics to merge: name at least one file with --stats")
    first = parts[0]
    tensors: dict[str, Any] = first.tensors()
    for part in parts[1:]:
        if not part.model.is_same(first.model):
            raise ValueError(
                "all files in --stats must be of one model; got different models: "
                f"{_difference(asdict(first.model), asdict(part.model))}"
            )
        if part.tensors().keys() != tensors.keys():
            raise ValueError(
                "only some of the files in --stats include the outputs of experts: "
                "run stats with --outputs for all or for none"
            )
        tensors = {name: tensor + part.tensors()[name] for name, tensor in tensors.items()}
    data = tuple(entry for part in parts for entry in part.data)
    marks = [entry["sha256"] for entry in data if "sha256" in entry]
    if len(set(marks)) < len(marks):
        raise ValueError(
            "files in --stats must be of different documents; two files are of the same documents, which would count "
            "twice: remove one of the two"
        )
    return ExpertStatistics(
        model=first.model,
        num_documents=sum(part.num_documents for part in parts),
        num_tokens=sum(part.num_tokens for part in parts),
        data=data,
        **tensors,
    )


def _difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    return "; ".join(f"{k} {one[k]} and {other[k]}" for k in one if one[k] != other[k])


class LayerSums:
    """The running sums of one layer, on the device of the tokens.

    Args:
        num_experts: routed experts.
        outputs: whether `add` gets `norms_TE` and `change_T`.
        device: of the tokens.
    """

    def __init__(self, num_experts: int, *, outputs: bool, device: torch.device | str) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.probability_E = zeros(num_experts)
        self.coactivation_EE = zeros(num_experts, num_experts, dtype=torch.int64)
        self.gated_norm_E = zeros(num_experts) if outputs else None
        self.residual_change_E = zeros(num_experts) if outputs else None

    def add(
        self,
        *,
        probs_TE: Tensor,
        routing_map_TE: Tensor,
        is_counted_T: Tensor,
        norms_TE: Tensor | None = None,
        change_T: Tensor | None = None,
    ) -> None:
        """Add the sums of some tokens.

        Args:
            probs_TE: [T, E] float, the router's scores over all routed experts.
            routing_map_TE: [T, E] bool, True where a token is routed to an expert.
            is_counted_T: [T] bool, False for padding.
            norms_TE: [T, E] float, gate times output norm; zero where the token is not routed to the expert.
            change_T: [T] float, `residual_change_of`.
        """
        is_padding_T1 = ~is_counted_T[:, None]
        # masked_fill, because values of padding may be NaN, and zero times NaN is NaN
        self.probability_E += probs_TE.double().masked_fill(is_padding_T1, 0.0).sum(0)
        # exact in float32 up to 2^24 tokens per call; GPUs have no matrix product of integers
        chosen_TE = (routing_map_TE & is_counted_T[:, None]).float()
        self.coactivation_EE += (chosen_TE.T @ chosen_TE).long()
        if self.gated_norm_E is not None and self.residual_change_E is not None:
            assert norms_TE is not None
            assert change_T is not None
            norms_TE = norms_TE.double().masked_fill(is_padding_T1, 0.0)
            change_T1 = change_T.double()[:, None].masked_fill(is_padding_T1, 0.0)
            self.gated_norm_E += norms_TE.sum(0)
            self.residual_change_E += (norms_TE * change_T1).sum(0)


def residual_change_of(input_TH: Tensor, output_TH: Tensor) -> Tensor:
    """[T] float64: the change of direction that an MoE layer causes, max(0, 1 - cos(h, h + MoE(h))).

    As in the code of EMO's authors, h is the normed input of the layer, and MoE(h) is the whole output of the layer,
    shared experts included.
    """
    # the cosine is close to one, so float32 would lose most digits of the difference
    before_TH, after_TH = input_TH.double(), input_TH.double() + output_TH.double()
    cosine_T = torch.nn.functional.cosine_similarity(before_TH, after_TH, dim=-1)
    return (1 - cosine_T).clamp(min=0)
