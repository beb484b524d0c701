"""What pools do to every MoE pretraining recipe on text of the installed Megatron-Bridge, for tests."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import inspect
import io
import pkgutil
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from support import bridge_recipes  # noqa: F401  it readies the CPU before Bridge is imported
from support.bridge_stand_ins import stand_ins

with stand_ins():
    import megatron.bridge.perf_recipes
    import megatron.bridge.recipes

from megatron.bridge.models.gpt_provider import default_layer_spec, local_layer_spec
from megatron.bridge.models.hybrid.hybrid_provider import HybridModelProvider
from megatron.bridge.models.olmoe.olmoe_provider import OLMoESelfAttention, olmoe_layer_spec
from megatron.bridge.models.stepfun import step35_bridge
from megatron.bridge.training.config import GPTDatasetConfig, MockGPTDatasetConfig
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.transformer.moe import moe_layer

from emo_megatron.bridge import apply_pools
from emo_megatron.bridge.pooled import POOL_FIELDS, in_words_of_bridge, require_possible
from emo_megatron.config import PoolConfig
from emo_megatron.mcore.spec import with_pools

OF_POOLS = {"dataset.inter_document_masking", "model.pool_documents"}
"""What apply_pools says that it sets and is no option of a recipe's own."""

OF_GPUS = (
    *("apply_rope_fusion", "moe_permute_fusion", "moe_router_padding_for_quantization"),
    *("fp8_output_proj", "fp8_param"),
)
"""Options that need Transformer Engine, or a precision that is folded in later, when Bridge checks the model."""

FAMILIES = {
    "OLMoE": "olmoe",
    "Qwen3 30B-A3B": "qwen3_30b_a3b",
    "Qwen3 235B-A22B": "qwen3_235b_a22b",
    "Qwen3-Next": "qwen3_next",
    "Qwen3.5": "qwen35",
    "DeepSeek V2": "deepseek_v2",
    "DeepSeek V3": "deepseek_v3",
    "DeepSeek V4": "deepseek_v4",
    "Kimi K2": "kimi_k2",
    "Moonlight": "moonlight",
    "GLM 4.5, 5": "glm",
    "gpt-oss": "gpt_oss",
    "Nemotron 3 Nano": "nemotron_3_nano",
    "Nemotron 3.5 Lightning": "nemotron_3_5|nemotron_35",
    "Nemotron 3 Super, Ultra": "nemotron_3_(super|ultra)",
    "EXAONE": "exaone",
    "MiniMax-M3": "minimax_m3",
    "Step-3.5": "step35|step3",
}
"""Family -> a pattern in the names of its recipes."""


def recipes() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every pretraining recipe, such as "perf_recipes.NAME", without aliases."""
    with stand_ins():
        modules = [
            importlib.import_module(found.name)
            for package in (megatron.bridge.recipes, megatron.bridge.perf_recipes)
            for found in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
        ]
    for module in modules:
        if hasattr(module, "load_quantization_recipe"):
            # the wheel lacks the file that it reads, which says nothing about routing
            vars(module)["load_quantization_recipe"] = lambda *_: None
    seen = set()
    for module in modules:
        for name, function in list(vars(module).items()):
            is_own = inspect.isfunction(function) and function.__module__ == module.__name__
            if is_own and function not in seen and re.fullmatch("(?!_).*pretrain.*_config", name):
                seen.add(function)
                library = module.__name__.split(".")[2]
                yield f"{library}.{function.__name__}", function


def family_of(name: str) -> str:
    """The family of a recipe's name; an error if it is of none or of two."""
    found = [family for family, pattern in FAMILIES.items() if re.search(pattern, name)]
    if len(found) != 1:
        raise ValueError(f"FAMILIES must have one pattern for {name}; {found} match")
    return found[0]


def coverage() -> dict[str, Any]:
    """Rows of all MoE recipes on text; how many were left out, by why; and how many could not be called, by why."""
    rows, left_out, not_called = [], Counter[str](), Counter[str]()
    # specs ask which stage they are for
    with mock.patch.object(parallel_state, "get_pipeline_model_parallel_rank", return_value=0):
        for name, recipe in recipes():
            try:
                cfg = _quietly(recipe)
            except (LookupError, RuntimeError) as error:
                not_called[str(error)] += 1
                continue
            if not getattr(cfg.model, "num_moe_experts", None):
                left_out["no experts"] += 1
            elif type(cfg.dataset) not in (GPTDatasetConfig, MockGPTDatasetConfig):
                left_out[type(cfg.dataset).__name__] += 1
            else:
                rows.append(_row(name, cfg))
    return {
        "recipes": sorted(rows, key=lambda row: row["recipe"]),
        "left_out": dict(sorted(left_out.items())),
        "not_called": dict(sorted(not_called.items())),
    }


def _row(name: str, cfg: Any) -> dict[str, Any]:
    model = cfg.model
    pool = PoolConfig(pool_min=max(8, model.moe_router_topk))
    row = {
        "recipe": name,
        "family": family_of(name),
        "provider": type(model).__name__,
        "has_mtp": bool(model.mtp_num_layers),
    }
    # Bridge folds it into the model later, before it checks that
    if getattr(cfg.comm_overlap, "overlap_moe_expert_parallel_comm", None):
        model.overlap_moe_expert_parallel_comm = True
    stopped = _finalized(model)
    before = {section: dict(vars(getattr(cfg, section))) for section in ("model", "dataset")}
    try:
        # the verdict is that of a machine with Transformer Engine
        with mock.patch.object(moe_layer, "HAVE_TE", True):
            changes = _quietly(lambda: apply_pools(cfg, pool))
            require_possible(cfg.model)
    except ValueError as error:
        head, *lines = [line.strip().removeprefix("- ") for line in str(error).splitlines()]
        return row | {"verdict": "refused", "reason": lines or [head]}
    changed = sorted(set(changes) - OF_POOLS)
    return row | {
        "verdict": "started" if changed else "unchanged",
        "changed": changed,
        "untold": sorted(_differences(before, cfg) - set(changes)),
        "stopped": now if (now := _finalized(cfg.model)) != stopped else "",
        "layers": _layers(cfg.model, pool),
    }


def _finalized(model: Any) -> str:
    """What Bridge says when it checks the model before training; nothing if it is content."""
    model = copy.deepcopy(model)
    model.bf16 = True  # the recipe's precision is folded in later
    for name in OF_GPUS:
        if hasattr(model, name):
            setattr(model, name, False)
    try:
        with mock.patch.object(moe_layer, "HAVE_TE", True):
            _quietly(model.finalize)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _differences(before: dict[str, dict[str, Any]], cfg: Any) -> set[str]:
    """Fields of the recipe that have another value than before, but for the pools' own."""
    return {
        f"{section}.{name}"
        for section, values in before.items()
        for name, value in values.items()
        if name not in POOL_FIELDS and vars(getattr(cfg, section))[name] != value
    }


def _layers(model: Any, pool: PoolConfig) -> str:
    """Whether the recipe's own spec can be given pools, without Transformer Engine: "built", or the host's error."""
    model = copy.copy(model)
    model.transformer_impl = "local"
    model.pipeline_model_parallel_size = 1
    model.virtual_pipeline_model_parallel_size = model.pipeline_model_parallel_layout = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # of Megatron's flags, which a recipe does not have
            warnings.filterwarnings("error", message="--")
            with in_words_of_bridge():
                if isinstance(model, HybridModelProvider):
                    model._resolve_hybrid_stack_spec()
                else:
                    build = without_transformer_engine(model.transformer_layer_spec)
                    with_pools(build, config=model, pool=pool)(model)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return "built"


def without_transformer_engine(spec: Any) -> Any:
    """The function that builds a recipe's layers, asked for Megatron's local ones where it can build them."""
    if spec is default_layer_spec:
        return local_layer_spec
    if spec is olmoe_layer_spec:
        return _local_olmoe_layer_spec
    if spec is step35_bridge.build_step35_layer_spec:
        return _local_step35_layer_spec
    if isinstance(spec, functools.partial) and "use_transformer_engine" in spec.keywords:
        return functools.partial(spec, use_transformer_engine=False)
    return spec


def _local_olmoe_layer_spec(config: Any) -> Any:
    spec = local_layer_spec(config)
    spec.submodules.self_attention.module = OLMoESelfAttention
    return spec


def _local_step35_layer_spec(config: Any, vp_stage: int | None = None) -> Any:
    def block_spec(config: Any, *, use_transformer_engine: bool, **options: Any) -> Any:
        return get_gpt_decoder_block_spec(config, use_transformer_engine=False, **options)

    with mock.patch.multiple(
        step35_bridge,
        get_gpt_decoder_block_spec=block_spec,
        get_gpt_layer_with_transformer_engine_spec=functools.partial(get_gpt_layer_local_spec, normalization="RMSNorm"),
    ):
        return step35_bridge.build_step35_layer_spec(config, vp_stage=vp_stage)


def _quietly[Result](call: Callable[[], Result]) -> Result:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return call()
