"""What Bridge refuses of a recipe with pools, and of a run_config.yaml: `python -m support.bridge_checks CASES FOLDER`.

One process tries all cases, because importing Bridge takes longer than they do, and writes CASES.json.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

HOSTILE = (
    *("builtins.exec", "os.system", "subprocess.run"),
    "emo_megatron.bridge.apply_pools",
    "emo_megatron.bridge.recipe.apply_pools",
    "emo_megatron.bridge.pooled.pooled",
    "emo_megatron.bridge.pooled.re.compile",
    "emo_megatron.bridge.pooled.Pooled",
    "emo_megatron.bridge.providers.pooled",
    "emo_megatron.bridge.providers.PooledGPT",
    "emo_megatron.bridge.providers.GPTModelProvider",
    "emo_megatron.bridge.providers.PoolGPTModelProvider.from_hf_pretrained",
    "emo_megatron.bridge.providers.PoolGPTModelProvider.__init__",
    "emo_megatron.bridge.providers.__builtins__.exec",
    "emo_megatron.bridge.run_config.yaml.unsafe_load",
    "emo_megatron.files.whole",
    "emo_megatron.config.PoolConfig",
)
PROVIDER = "emo_megatron.bridge.providers.PoolGPTModelProvider"


def tried(call: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """What a call raises, if anything, and whether it asked for process groups before."""
    import torch

    asked = []
    init = torch.distributed.init_process_group
    torch.distributed.init_process_group = lambda *a, **k: (asked.append(1), init(*a, **k))
    try:
        call(*args, **kwargs)
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error), "groups": bool(asked)}
    finally:
        torch.distributed.init_process_group = init
    return {"error": "", "message": "", "groups": bool(asked)}


def small(folder: Path, *, spec: Any = None) -> Any:
    """The OLMoE recipe, small and without pools."""
    from megatron.bridge.models.gpt_provider import local_layer_spec
    from megatron.bridge.recipes.olmoe import olmoe_7b_pretrain_config

    from support import bridge_recipes

    cfg = bridge_recipes.shrink(olmoe_7b_pretrain_config(), folder, steps=1)
    cfg.model.transformer_layer_spec = spec or local_layer_spec
    cfg.model.qk_layernorm = False
    return cfg


def bad_input(folder: Path) -> dict[str, Any]:
    """Case -> what it raised."""
    from emo_megatron.bridge import apply_pools
    from emo_megatron.config import PoolConfig

    found = {}
    for name, pool in {"too large": {"pool_min": 100}, "below top-k": {"pool_min": 1}}.items():
        found[name] = _refused(small(folder), PoolConfig(**pool))
    cfg = small(folder)
    cfg.model.moe_router_dtype, cfg.model.moe_expert_capacity_factor = None, 1.1
    found["capacity"] = _refused(cfg, PoolConfig(pool_min=2))
    cfg = small(folder)
    cfg.train.iterations_to_skip, cfg.model.pipeline_model_parallel_size = [3], 4
    found["skipped"] = tried(apply_pools, cfg, PoolConfig(pool_min=2))
    for name in ("GPTSFTDatasetConfig", "MockVLMSFTDatasetConfig", "GPTFIMDatasetConfig", "packed"):
        cfg = small(folder)
        cfg.dataset = _dataset(name, cfg)
        found[name] = tried(apply_pools, cfg, PoolConfig(pool_min=2))
    for field in ("reset_position_ids", "reset_attention_mask"):
        cfg = small(folder)
        setattr(cfg.dataset, field, True)
        found[field] = tried(apply_pools, cfg, PoolConfig(pool_min=2))
    return found | _models(folder) | _layouts(folder) | _overrides(folder)


def _refused(cfg: Any, pool: Any, **options: Any) -> dict[str, Any]:
    """What apply_pools raises, and whether it leaves the recipe as it was."""
    from emo_megatron.bridge import apply_pools

    before = type(cfg.model), dict(vars(cfg.model)), dict(vars(cfg.dataset))
    found = tried(apply_pools, cfg, pool, **options)
    after = type(cfg.model), dict(vars(cfg.model)), dict(vars(cfg.dataset))
    return found | {"is_unchanged": repr(before) == repr(after)}


def _dataset(name: str, cfg: Any) -> Any:
    """A dataset of this class; apply_pools looks at no field of one that it does not take."""
    from megatron.bridge.data.builders import gpt_sft, mock_vlm_sft
    from megatron.bridge.training import config

    classes = {
        "packed": gpt_sft.GPTSFTDatasetConfig,
        "GPTSFTDatasetConfig": gpt_sft.GPTSFTDatasetConfig,
        "MockVLMSFTDatasetConfig": mock_vlm_sft.MockVLMSFTDatasetConfig,
        "GPTFIMDatasetConfig": config.GPTFIMDatasetConfig,
    }
    dataset = object.__new__(classes[name])
    vars(dataset).update(vars(cfg.dataset), enable_offline_packing=name == "packed")
    return dataset


def _models(folder: Path) -> dict[str, Any]:
    from types import SimpleNamespace

    from megatron.bridge.models.gpt_provider import GPTModelProvider

    from emo_megatron.bridge import apply_pools, pool_forward_step
    from emo_megatron.config import PoolConfig

    class OwnProvider(GPTModelProvider):
        """Of somebody else, who may build other layers."""

    found = {}
    cfg = small(folder)
    cfg.model.__class__ = OwnProvider
    found["own provider"] = tried(apply_pools, cfg, PoolConfig(pool_min=2))
    cfg = small(folder)
    cfg.model.moe_router_force_load_balancing = True
    found["strict"] = _refused(cfg, PoolConfig(pool_min=2), strict=True)
    state = SimpleNamespace(cfg=small(folder))
    found["no pools"] = tried(pool_forward_step, state, iter(()), None)
    return found


def _layouts(folder: Path) -> dict[str, Any]:
    """What attention that keeps to documents does not go with."""
    from megatron.bridge.models.hybrid.hybrid_provider import HybridModelProvider

    from emo_megatron.config import PoolConfig

    overlap = "overlap_moe_expert_parallel_comm"
    allgather = {"moe_token_dispatcher_type": "allgather", "expert_model_parallel_size": 2}
    models: dict[str, dict[str, Any]] = {
        "mamba": {"hybrid_layer_pattern": "ME*E", "num_layers": 4},
        "overlap": {"mtp_num_layers": 1, overlap: True},
        "uneven ranks": {"context_parallel_size": 2} | allgather,
        "exchange": {"context_parallel_size": 2, "cp_comm_type": "a2a"},
        "hybrid": {"context_parallel_size": 2, "hybrid_context_parallel": True},
    }
    found = {}
    for name, fields in models.items():
        cfg = small(folder)
        if name == "mamba":
            cfg.model.__class__ = HybridModelProvider
        vars(cfg.model).update(fields)
        found[name] = _refused(cfg, PoolConfig(pool_min=2), pool_documents="attention")
    return found


def _overrides(folder: Path) -> dict[str, Any]:
    """What comes on the command line after apply_pools, through pretrain()."""
    from megatron.bridge.training.pretrain import pretrain
    from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides

    from emo_megatron.bridge import apply_pools, pool_forward_step
    from emo_megatron.config import PoolConfig

    def run(override: str) -> None:
        cfg = small(folder)
        apply_pools(cfg, PoolConfig(pool_min=2))
        pretrain(process_config_with_overrides(cfg, cli_overrides=[override]), pool_forward_step)

    return {
        override: tried(run, override)
        for override in (
            "model.pool_mni=3",
            "model.pool_min=100",
            "model.pool_min=1",
            "model.pool_min=3.5",
            "model.pool_rule=gaussian",
            "model.pool_documents=mlp",
            "model.moe_router_dtype=null",
            "model.moe_router_force_load_balancing=true",
        )
    }


def safety(folder: Path) -> dict[str, Any]:
    """What is instantiated of a run_config.yaml and what is not, and round trips of the fields."""
    from megatron.bridge.models.gpt_provider import local_layer_spec
    from megatron.bridge.training.model_load_save import load_model_config
    from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides
    from megatron.bridge.utils.instantiate_utils import instantiate, target_allowlist

    from emo_megatron.bridge import apply_pools
    from emo_megatron.bridge.run_config import stock_run_config, stored_pool_config
    from emo_megatron.config import PoolConfig
    from support import bridge_run

    data = bridge_run.write_documents(folder / "documents", eod=511)
    pool = {"pool_min": 3, "pool_unrestricted": 0.25, "pool_eval": 4}
    run = {"folder": str(folder / "run"), "data": data, "steps": 1, "pool": pool, "spec": "bridge"}
    trained = bridge_run.start(run)
    assert trained["codes"] == [0], trained["printed"][-4000:]
    stored = folder / "run" / "iter_0000001" / "run_config.yaml"
    model, _ = load_model_config(str(stored.parent))
    (folder / "stock").mkdir()
    stock_run_config(stored, folder / "stock" / stored.name)
    sizes = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    cfg = small(folder)
    apply_pools(cfg, PoolConfig(pool_min=2))
    overrides = ["model.pool_unrestricted=0.1", "model.pool_max=5", "model.pool_mask=selection"]
    cfg = process_config_with_overrides(cfg, cli_overrides=overrides)
    mark = folder / "called"
    return {
        "model": type(model).__qualname__,
        "has recipe's spec": model.transformer_layer_spec is local_layer_spec,
        "pool": dataclasses.asdict(model.pool_config()),
        "stored": dataclasses.asdict(stored_pool_config(stored)),
        "by hand": instantiate({"_target_": PROVIDER, "pool_min": 3, **sizes}).pool_min,
        "overridden": dataclasses.asdict(cfg.model.pool_config()),
        "exact": sorted(n for n in target_allowlist.allowed_exact if "emo_megatron" in n),
        "prefixes": [p for p in target_allowlist.allowed_prefixes if "emo_megatron".startswith(p[:3])],
        "hostile": {name: tried(instantiate, {"_target_": name}) for name in HOSTILE},
        "nested": tried(instantiate, {"_target_": PROVIDER, "init_method": {"_target_": "os.system"}}),
        "read": _hostile_files(folder, mark),
        "was called": mark.exists(),
    }


def _hostile_files(folder: Path, mark: Path) -> dict[str, Any]:
    """What our readers make of files that would call os.system, if anybody instantiated them."""
    from emo_megatron.bridge.run_config import stock_run_config, stored_pool_config

    command = f"touch {mark}"
    target, tag = folder / "target.yaml", folder / "tag.yaml"
    target.write_text(f"model: {{_target_: os.system, _args_: ['{command}'], pool_min: 3}}\n")
    tag.write_text(f"model: !!python/object/apply:os.system ['{command}']\n")
    return {
        "target": stored_pool_config(target).pool_min,
        "tag": tried(stored_pool_config, tag),
        "stock target": tried(stock_run_config, target, folder / "out.yaml"),
        "stock tag": tried(stock_run_config, tag, folder / "out.yaml"),
        "was written": (folder / "out.yaml").exists(),
    }


def padding() -> dict[str, Any]:
    """What the step takes for padding, from losses as Megatron's dataset leaves them out."""
    from types import SimpleNamespace

    import torch

    from emo_megatron.bridge.step import _num_padding

    masks = torch.ones(6, 8)
    for row, num_real in enumerate((6, 7, 8)):
        masks[row, num_real - 1 :] = 0
    masks[4] = 0
    masks[5, 3] = 0
    found = _num_padding(masks, SimpleNamespace(eod_mask_loss=False))
    assert found is not None
    return {"padding": found.tolist(), "padding without ends": _num_padding(masks, SimpleNamespace(eod_mask_loss=True))}


def names() -> dict[str, Any]:
    """What Bridge's registry finds of the mappings that the product makes of the table, in layer 3 and of expert 5.

    Of each row and format the parameters' names and the weights', the weights that Bridge finds for each parameter, and
    its name for each weight. The model has every row that the format can express.
    """
    from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry

    from emo_megatron.bridge.hf_mappings import mappings_of, parameters_of
    from emo_megatron.hf.formats import EMO, QWEN2_MOE
    from emo_megatron.hf.mapping import TABLE
    from support import decoder

    dense = {"dense_layers": (0,), "dense_hidden": 20}
    models = {
        "qwen2_moe": (QWEN2_MOE, decoder.architecture(qkv_bias=True, shared_gate=True, **dense)),
        "emo": (EMO, decoder.architecture(**dense)),
    }
    found: dict[str, Any] = {}
    for kind, (format, model) in models.items():
        registry = MegatronMappingRegistry(*mappings_of(format, model))
        found[kind] = []
        for row in TABLE:
            for pattern in parameters_of(row):
                weights = [format.name(weight, model) for weight in row.weights]
                parameter, *weights = (n.replace("*", "3", 1).replace("*", "5") for n in (pattern, *weights))
                mapping: Any = registry.megatron_to_hf_lookup(parameter)
                if mapping is None:
                    found[kind].append([parameter, weights, None, None])
                    continue
                hf = mapping.hf_param
                back = [registry.hf_to_megatron_lookup(weight).megatron_param for weight in weights]
                found[kind].append([parameter, weights, [*hf.values()] if isinstance(hf, dict) else [hf], back])
        found[f"{kind} norm"] = registry.megatron_to_hf_lookup("decoder.layers.1.pre_mlp_layernorm.weight").hf_param
    return {"names": found}


def stock(folder: Path) -> dict[str, Any]:
    """What Bridge alone makes of the file that stock_run_config wrote."""
    from support.bridge_stand_ins import stand_ins

    with stand_ins():
        from megatron.bridge.training.model_load_save import load_model_config

        model, _ = load_model_config(str(folder / "stock"))
    return {
        "model": f"{type(model).__module__}.{type(model).__qualname__}",
        "num_layers": model.num_layers,
        "has pools": [name for name in vars(model) if name.startswith("pool_")],
        "imported": [name for name in sys.modules if name.startswith("emo_megatron")],
    }


def main() -> None:
    cases, folder = sys.argv[1], Path(sys.argv[2])
    if cases == "stock":
        found = stock(folder)
    else:
        from support import bridge_recipes  # noqa: F401

        # forks ranks, before anything here has threads
        found = safety(folder) | bad_input(folder) | padding() | names()
    (folder / f"{cases}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
