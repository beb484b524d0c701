"""Read the pools of a run from the run_config.yaml of a Bridge checkpoint, and write the file without pools."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import yaml

from emo_megatron.bridge.pooled import POOL_FIELDS
from emo_megatron.checkpoint.bridge_flags import RUN_CONFIG, read_run_config
from emo_megatron.config import PoolConfig
from emo_megatron.files import whole
from emo_megatron.mcore.resume import require_same_pools


def check_resume(checkpoint: Any, asked: PoolConfig, *, step: int) -> None:
    """Raise a ValueError if a resumed run has other pools than before. Fine-tuning is a new run with its own pools.

    Args:
        checkpoint: the section `checkpoint` of a recipe.
        asked: the pools of the resumed run.
        step: the step of the checkpoint that is loaded; 0: no checkpoint is loaded.
    """
    if step == 0 or checkpoint.load is None or checkpoint.finetune:
        return
    folders = (Path(checkpoint.load), Path(checkpoint.load) / f"iter_{step:07d}")
    path = next((f / RUN_CONFIG for f in folders if (f / RUN_CONFIG).is_file()), None)
    if path is None:
        warnings.warn(
            f"checkpoint.load {checkpoint.load} has no {RUN_CONFIG} at step {step}: cannot check the pools of that run",
            stacklevel=2,
        )
        return
    require_same_pools(
        stored_pool_config(path),
        asked,
        run=f"checkpoint.load {checkpoint.load}",
        remedy="Give the same fields; or set checkpoint.finetune=true to start a new run from the weights",
        name_of="model.{}".format,
    )


def step_to_load(checkpoint: Any) -> int:
    """Step of the checkpoint that Bridge will load; 0: there is no checkpoint."""
    if checkpoint.load is None or checkpoint.ckpt_step is not None:
        return checkpoint.ckpt_step or 0
    last = Path(checkpoint.load) / "latest_checkpointed_iteration.txt"
    step = last.read_text().strip() if last.is_file() else ""
    return int(step) if step.isdecimal() else 0


def stored_pool_config(path: Path) -> PoolConfig:
    """The pools of the run that wrote this run_config.yaml; pools are off if the file has no pool fields."""
    model = read_run_config(path)["model"]
    return PoolConfig(**{name: model[name] for name in POOL_FIELDS if name in model})


def stock_run_config(path: Path, output: Path) -> None:
    """Convert the run_config.yaml of a run with pools to stock Bridge, for use without this package.

    The weights need no conversion, because pools add no weights. `output` may be `path`.
    """
    from emo_megatron.bridge.recipe import PROVIDERS

    config = read_run_config(path)
    stock = {
        f"{cls.__module__}.{cls.__qualname__}": f"{base.__module__}.{base.__qualname__}"
        for base, cls in PROVIDERS.items()
    }
    model = config["model"]
    target = model.get("_target_")
    if target not in stock:
        raise ValueError(f"{path}: model._target_ must be one of {', '.join(stock)}; got {target!r}")
    config["model"] = {
        name: value for name, value in (model | {"_target_": stock[target]}).items() if name not in POOL_FIELDS
    }
    if "inter_document_masking" in config.get("dataset", {}):
        # Bridge's own step misreads the batches that this option gives
        config["dataset"]["inter_document_masking"] = False
    with whole(output) as part:
        part.write_text(yaml.safe_dump(config, sort_keys=False))
