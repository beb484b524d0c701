"""The loss of one model on one file of documents, quantised by NVIDIA ModelOpt in one format: one process per number.

    .venv/bin/python benchmarks/quantized_loss.py --checkpoint MODULE --format int8 --data CALIBRATION \
        --validation-data VALIDATION --output loss.json

Takes a Megatron checkpoint or a Hugging Face folder. The quantisation is simulated: weights and inputs are rounded to
the format, and the products are computed in the dtype of the model. `make modelopt` installs ModelOpt.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import find_demo  # noqa: F401
import torch
import tyro

from demo.recipe import run_step
from emo_megatron.experts.calibration import Calibration
from emo_megatron.files import whole
from emo_megatron.json_files import to_json
from emo_megatron.runners.open import is_hugging_face, open_hugging_face, open_megatron
from emo_megatron.variables import ALONE, DEFAULTS

UNQUANTIZED = ("stored", "bfloat16")
FORMATS = {
    "int8": "INT8_DEFAULT_CFG",
    "fp8": "FP8_DEFAULT_CFG",
    "int4": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "nvfp4": "NVFP4_DEFAULT_CFG",
}
"""Format -> ModelOpt's configuration. int8, fp8 and nvfp4 round weights and inputs, int4 rounds weights only."""
MODELOPT = Path(__file__).resolve().parents[1] / ".venv" / "modelopt-0.47.0"
EXPERT_QUANTIZER = re.compile(r"\.mlp\.experts\.")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure one quantised model."""

    checkpoint: Path
    format: str
    """One of stored, bfloat16, int8, fp8, int4, nvfp4."""
    data: Path
    """Calibration documents, which give the range of every quantised input."""
    validation_data: Path
    output: Path
    """A JSON file."""
    tokens: int = 8192
    """Calibration tokens."""
    validation_tokens: int = 16384
    seq_length: int | None = None
    micro_batch_size: int = 4


def measure(options: Options) -> dict[str, Any]:
    """Loss, and the numbers of quantisers."""
    if options.format not in (*UNQUANTIZED, *FORMATS):
        raise ValueError(f"--format must be one of {', '.join((*UNQUANTIZED, *FORMATS))}; got {options.format}")
    kinds = {"tokenizer": None, "seq_length": options.seq_length, "micro_batch_size": options.micro_batch_size}
    texts = [options.data, options.validation_data]
    is_bfloat16 = options.format == "bfloat16"
    if is_hugging_face(options.checkpoint):
        runner, read = open_hugging_face(options.checkpoint, texts=texts, **kinds)
        if is_bfloat16:
            runner.model.to(torch.bfloat16)
    else:
        os.environ.update(DEFAULTS | ALONE)
        more = ["--bf16"] * is_bfloat16
        runner, read = open_megatron(options.checkpoint, layout=[], more=more, texts=texts, **kinds)
    calibration, validation = (
        read(path, Calibration(num_tokens=tokens)).tokens
        for path, tokens in zip(texts, (options.tokens, options.validation_tokens), strict=True)
    )
    found: dict[str, Any] = {"quantizers": 0, "quantizers_of_experts": 0}
    try:
        if options.format in FORMATS:
            found = quantize(runner.model, options.format, lambda _: runner.loss(calibration))
        # not through a CachedRunner: its key is the weights as opened, so it would give the stored loss
        return found | asdict(runner.loss(validation))
    except AssertionError as error:
        if "CUDA" not in str(error):
            raise
        return found | {"needs_gpu": str(error)}


def find_modelopt() -> None:
    """Put the folder of `make modelopt` on the path, if ModelOpt is not installed otherwise."""
    if importlib.util.find_spec("modelopt") is None:
        # behind all other packages, because the folder holds only what the others lack
        sys.path.append(str(MODELOPT))


def quantize(model: torch.nn.Module, format: str, forward_loop: Any) -> dict[str, int]:
    """Quantise a model in place; the numbers of active quantisers, in all and on routed experts."""
    find_modelopt()
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.nn import TensorQuantizer

    mtq.quantize(model, getattr(mtq, FORMATS[format]), forward_loop)
    active = [n for n, m in model.named_modules() if isinstance(m, TensorQuantizer) and m.is_enabled]
    of_experts = sum(bool(EXPERT_QUANTIZER.search(name)) for name in active)
    if not of_experts:
        # another version of ModelOpt or transformers: the loss would be that of experts that are not quantised
        version = importlib.metadata.version("nvidia-modelopt")
        raise ValueError(
            f"--format {format}: nvidia-modelopt {version} quantised no routed expert of this model; expected version "
            "0.47.0 and a model with routed experts"
        )
    return {"quantizers": len(active), "quantizers_of_experts": of_experts}


def main(options: Options) -> None:
    """Measure, and write the file."""
    result = measure(options)
    with whole(options.output) as path:
        path.write_text(to_json(result, indent=1), encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    arguments = tyro.cli(Options)
    run_step(lambda: main(arguments))
