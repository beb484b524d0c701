"""The model card of an export: where it comes from, which experts it kept and why, and what was measured of it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCardData

from emo_megatron import __version__
from emo_megatron.experts.selection import Selection
from emo_megatron.hf.architecture import Architecture, weight_shapes
from emo_megatron.hf.measured import MeasuredLoss


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far the exported model is from the one in Megatron, on the same random tokens in float32.

    Attributes:
        tokens: how many positions.
        max_difference: the largest difference between two logits.
        max_logit: the largest absolute logit, for comparison.
    """

    tokens: int
    max_difference: float
    max_logit: float

    def __str__(self) -> str:
        return (
            f"largest difference of a logit {self.max_difference:.1e} over {self.tokens} tokens "
            f"(largest logit {self.max_logit:.3g})"
        )


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where the weights were before.

    Attributes:
        name: of the run, by its folder.
        title: of the card; None: the name.
        iteration: of training; 0 for weights without a run.
        samples: training samples seen, None if unknown.
        seq_length: tokens a sample, None if unknown.
        pools: the document pools it was trained with, as PoolConfig's fields; empty without.
        is_module: whether it was cut out of another checkpoint, which knows how it was trained.
    """

    name: str
    iteration: int = 0
    samples: int | None = None
    seq_length: int | None = None
    pools: dict[str, Any]
    is_module: bool = False
    title: str | None = None


def model_card(
    architecture: Architecture,
    *,
    model_type: str,
    dtype: str,
    origin: Origin,
    selection: Selection | None = None,
    retention: Sequence[MeasuredLoss] = (),
    parity: Parity | None = None,
    shared_gate_value: float = 0.0,
) -> str:
    """The card, Markdown with the front matter that Hugging Face's hub reads."""
    sections = [
        _front_matter(model_type),
        f"# {origin.title or origin.name}\n",
        _origin(origin),
        _model(architecture, dtype=dtype),
        _selection(selection, architecture=architecture),
        _retention(retention, is_module=selection is not None),
        _use(architecture, model_type=model_type, dtype=dtype, shared_gate_value=shared_gate_value),
        _parity(parity),
    ]
    return "\n".join(section for section in sections if section)


def _front_matter(model_type: str) -> str:
    metadata = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=["mixture-of-experts", "emo", model_type]
    )
    return f"---\n{metadata.to_yaml()}\n---\n"


def _origin(origin: Origin) -> str:
    lines = [f"Exported from the Megatron-Core checkpoint `{origin.name}` by emo_megatron {__version__}."]
    if origin.iteration:
        trained = f"It had been trained for {origin.iteration:,} iterations"
        if origin.samples and origin.seq_length:
            tokens = origin.samples * origin.seq_length
            trained += f", {origin.samples:,} samples of {origin.seq_length:,} tokens ({tokens:,} tokens)"
        lines.append(trained + ".")
    if origin.pools:
        settings = ", ".join(f"{name} {value}" for name, value in origin.pools.items())
        lines.append(
            "Trained with document pools (EMO, arXiv 2605.06663): every document routed inside its own pool of "
            f"experts ({settings}). It runs without pools."
        )
    elif not origin.is_module:
        lines.append("Trained as a standard mixture of experts, without document pools.")
    return "\n".join(lines) + "\n"


def _model(architecture: Architecture, *, dtype: str) -> str:
    a = architecture
    sizes = {name: math.prod(shape) for name, shape in weight_shapes(a).items()}
    in_experts = sum(size for name, size in sizes.items() if ".experts." in name)
    total = sum(sizes.values())
    active = total - in_experts + in_experts * a.top_k // a.num_experts
    shared = f" and a shared MLP of width {a.shared_hidden}" if a.shared_hidden else ""
    dense = f"; {len(a.dense_layers)} layers are dense" if a.dense_layers else ""
    return (
        f"{a.num_layers} layers of width {a.hidden_size}, {a.num_heads} heads ({a.num_kv_heads} key-value), "
        f"{a.num_experts} routed experts of width {a.expert_hidden}{shared}, {a.top_k} routed experts a token{dense}. "
        f"{total:,} parameters, {active:,} of them active for a token; {dtype}.\n"
    )


def _selection(selection: Selection | None, *, architecture: Architecture) -> str:
    if selection is None:
        return ""
    kept = selection.uniform_count(purpose="an export")
    rows = "\n".join(
        f"| {layer} | {' '.join(map(str, experts))} |"
        for layer, experts in zip(selection.layers, selection.experts, strict=True)
    )
    num_shared = int(architecture.shared_hidden > 0)
    return (
        "## Selection\n\n"
        f"A module: {kept} of {selection.num_experts} routed experts in every layer "
        f"(keep-k {selection.keep_k(num_shared=num_shared)} with the shared one counted), chosen by "
        f"`{selection.method}`{f', seed {selection.seed}' if selection.seed is not None else ''}. "
        f"Calibration data: {_calibration(selection.data)}. "
        f"Parent: routers with fingerprint `{selection.model[:16]}`.\n\n"
        f"| layer | experts of the parent |\n|---|---|\n{rows}\n"
    )


def _calibration(data: dict[str, Any]) -> str:
    """The documents that chose the experts, in words where they are told as `stats` tells them."""
    files = data.get("calibration")
    if not isinstance(files, list) or not all(
        isinstance(file, dict) and {"file", "documents", "tokens"} <= file.keys() for file in files
    ):
        return f"`{json.dumps(data)}`" if data else "not recorded"
    return ", ".join(f"{file['file']} ({file['documents']:,} documents, {file['tokens']:,} tokens)" for file in files)


def _retention(rows: Sequence[MeasuredLoss], *, is_module: bool) -> str:
    if not rows:
        return "No retention was measured for this export.\n"
    methods = ", ".join(sorted({f"`{row.method}`" for row in rows}))
    model = "the parent" if is_module else "this model"
    lines = [
        "## Measured retention\n",
        f"Loss in nats a token on held-out text, without pools: {model} limited to the experts that {methods} chose.\n",
        "| text | chosen for | experts | loss | with all experts | rise | as many at random |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        random = "" if row.random_loss is None else f"{row.random_loss:.3f}"
        lines.append(
            f"| {row.text} | {row.chosen_for} | {row.kept} | {row.loss:.3f} | {row.full_loss:.3f} | "
            f"{row.loss - row.full_loss:+.3f} | {random} |"
        )
    if is_module:
        lines.append(
            "\nThat evaluation chose its experts itself: they differ from this Selection where its documents did."
        )
    return "\n".join(lines) + "\n"


def _use(architecture: Architecture, *, model_type: str, dtype: str, shared_gate_value: float) -> str:
    if model_type == "emo":
        return (
            "## Use\n\nThe released EMO format: put the authors' `configuration_emo.py` and `modeling_emo.py` into "
            "this folder and load it with `trust_remote_code=True`.\n"
        )
    notes = _engines(architecture, dtype=dtype)
    if not architecture.shared_gate and architecture.shared_hidden:
        gate = f"filled with {shared_gate_value:g}" if shared_gate_value else "zero"
        notes.append(
            f"The gate of the shared expert is {gate} and its down projection doubled: sigmoid(0) = 1/2, so the "
            "shared expert weighs 1, as in training."
        )
        if not shared_gate_value:
            notes.append("llama.cpp needs a gate that is not zero: export for it with `--nonzero-shared-gate`.")
    if architecture.renormalise:
        notes.append(
            "llama.cpp ignores `norm_topk_prob`, which is true here: it does not run this model as it was trained."
        )
    return (
        "## Use\n\nA `Qwen2MoeForCausalLM`, which needs no remote code.\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n```\n\n' + "\n".join(notes) + "\n"
    )


def _engines(architecture: Architecture, *, dtype: str) -> list[str]:
    """Which programs run the model, in sentences, and what they do with it in silence."""
    measured = (
        "such exports were run in vLLM 0.32.0 and SGLang 0.5.23 on a CPU in float32, where log-probabilities are those "
        "of transformers to 1.1e-5 and greedy text is equal. GPUs were not tried."
    )
    if architecture.dense_layers:
        notes = [
            "transformers and vLLM run this model. SGLang does not: it ignores `mlp_only_layers` and gives every layer "
            f"experts. Without dense layers {measured}"
        ]
    else:
        notes = [f"transformers, vLLM and SGLang run this model: {measured}"]
    if dtype == "float32":
        notes.append(
            "vLLM casts float32 weights to bfloat16 or float16 and says nothing; `--dtype float32` keeps them."
        )
    return notes


def _parity(parity: Parity | None) -> str:
    if parity is None:
        return "The logits were not compared with Megatron's for this export.\n"
    return f"Compared with the checkpoint in Megatron-Core, weights of the same dtype, computed in float32: {parity}.\n"
