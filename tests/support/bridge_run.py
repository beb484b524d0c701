"""Trains small recipes by Bridge's pretrain(): `python -m support.bridge_run runs.json`, or one rank of torchrun's.

Importing Bridge takes longer than a small run, so that one process imports it and every rank of every run is a fork of
it. The process that saves while training goes on is spawned and imports this module anew: nothing here imports Bridge
on top.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

from support.bridge_server import end_of, fork, kill_group

ASYNC = "checkpoint.async_save"
if __name__ == "__mp_main__" and ASYNC in os.environ:
    # the process that saves while training goes on asks for a CUDA device too
    from emo_megatron.mcore import cpu

    cpu.activate()

OVERLAP = "overlap_moe_expert_parallel_comm"


def layers(config: Any, vp_stage: int | None = None) -> Any:
    """Megatron's local layers, with norms and attention that take the input of every layout."""
    from megatron.bridge.models.gpt_provider import local_layer_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

    from emo_megatron.mcore.local import TorchNorm
    from emo_megatron.mcore.spec_rewrite import document_layer

    layer = document_layer(local_layer_spec(config), config=config, pool=config.pool_config())
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=TorchNorm)


def recipe(run: dict[str, Any]) -> Any:
    """The OLMoE recipe with pools as a run says, its overrides not yet in it.

    Args:
        run: folder and data (paths), and of these what differs: load, steps, pool (fields), documents (who gets
            boundaries), bf16, spec ("bridge": its own local layers), hf (a Hugging Face folder whose model replaces the
            recipe's), options such as "validation.eval_iters" that are set before apply_pools, exact (whether losses of
            prediction are).
    """
    import torch
    from megatron.bridge.models.gpt_provider import local_layer_spec
    from megatron.bridge.recipes.olmoe import olmoe_7b_pretrain_config
    from megatron.bridge.training.comm_overlap import CommOverlapConfig
    from megatron.bridge.training.mixed_precision import bf16_mixed

    from emo_megatron.bridge import apply_pools
    from emo_megatron.config import PoolConfig
    from support import bridge_recipes

    cfg = bridge_recipes.shrink(
        olmoe_7b_pretrain_config(),
        Path(run["folder"]),
        steps=run.get("steps", 3),
        num_layers=4,
        transformer_layer_spec=local_layer_spec if run.get("spec") == "bridge" else layers,
    )
    # OLMoE's own spans all heads, and fits one tensor-parallel rank only
    cfg.model.qk_layernorm = False
    if "hf" in run:
        cfg.model = bridge_recipes.from_folder(run["hf"])
        if run.get("spec") != "bridge":
            # AutoBridge refuses layers of others: in this process they have the name of Bridge's function
            layers.__module__, layers.__qualname__ = local_layer_spec.__module__, local_layer_spec.__qualname__
            cfg.model.transformer_layer_spec = layers
    cfg.dataset.data_path = run["data"]
    cfg.dataset.path_to_cache = str(Path(run["data"]).parent / "cache")
    cfg.dataset.split = run.get("split", "100,0,0")
    # below it a gradient counts as noise: sums in another order change the last bits of those near zero
    cfg.optimizer.adam_eps = 1e-4
    if "load" in run:
        cfg.checkpoint.load = run["load"]
        # a new run from the weights alone
        cfg.checkpoint.finetune, cfg.checkpoint.save = True, None
    if run.get("bf16"):
        cfg.mixed_precision = bf16_mixed()
        cfg.model.bf16, cfg.model.pipeline_dtype = True, torch.bfloat16
        cfg.model.params_dtype = torch.bfloat16
        cfg.comm_overlap = CommOverlapConfig(tp_comm_overlap=False, **{OVERLAP: bool(run.get(OVERLAP))})
        cfg.ddp.use_distributed_optimizer = cfg.optimizer.use_distributed_optimizer = True
    for name, value in run.get("options", {}).items():
        section, _, field = name.partition(".")
        setattr(getattr(cfg, section), field, value)
    pool = PoolConfig(**{"pool_min": 2} | run.get("pool", {}))
    apply_pools(cfg, pool, pool_documents=run.get("documents", "routers"))
    return cfg


def train(run: dict[str, Any], seen: Seen) -> None:
    """One rank of a run."""
    from megatron.bridge.training.pretrain import pretrain
    from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides

    from emo_megatron.bridge import pool_forward_step
    from emo_megatron.mcore.mtp_loss import use_exact_mtp_loss

    if run.get("exact"):
        use_exact_mtp_loss()
    cfg = process_config_with_overrides(recipe(run), cli_overrides=run.get("overrides", []))
    with seen:
        pretrain(cfg, pool_forward_step)


class Seen(contextlib.AbstractContextManager["Seen"]):
    """What a rank computes, in floats and not as printed: losses, metrics, pools, choices of its routers."""

    def __init__(self, *, kill_at: int | None = None) -> None:
        self.kill_at = kill_at
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self.metrics: dict[str, list[float]] = collections.defaultdict(list)
        self.pools: dict[str, list[int]] = {}
        """ "layer/sample/document's offset" -> experts."""
        self.chosen: dict[str, list[int]] = {}
        """The same -> how many of this rank's tokens each expert got."""
        self.eval_sizes: set[int] = set()
        self.are_predictions_masked: set[bool] = set()
        """Whether losses of multi-token prediction got the loss mask."""

    def __enter__(self) -> Seen:
        from megatron.bridge.training import train as loop
        from megatron.bridge.training.utils import train_utils
        from megatron.core.models.gpt import gpt_model

        from emo_megatron.mcore.router import PoolRouter

        log, track, route = loop.training_log, train_utils.track_moe_metrics, PoolRouter.routing
        predict = gpt_model.process_mtp_loss

        def process_mtp_loss(*args: Any, **kwargs: Any) -> Any:
            self.are_predictions_masked.add(kwargs["loss_mask"] is not None)
            return predict(*args, **kwargs)

        def training_log(losses: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self.losses += [float(loss) for name, loss in losses.items() if name == "lm loss"]
            self.grad_norms.append(float(args[6]))
            if len(self.grad_norms) == self.kill_at:
                os.kill(os.getpid(), 9)
            return log(losses, *args, **kwargs)

        def track_moe_metrics(*args: Any, **kwargs: Any) -> Any:
            return track(*args, **kwargs | {"writer": self})

        def routing(router: Any, *args: Any, **kwargs: Any) -> Any:
            answer = route(router, *args, **kwargs)
            self._record(router, answer[1])
            return answer

        loop.training_log, train_utils.track_moe_metrics = training_log, track_moe_metrics
        PoolRouter.routing, gpt_model.process_mtp_loss = routing, process_mtp_loss
        return self

    def __exit__(self, *_: Any) -> None:
        """The process ends with its run."""

    def add_scalar(self, name: str, value: Any, _: int) -> None:
        self.metrics[name].append(float(value))

    def _record(self, router: Any, routing_map: Any) -> None:
        import torch

        from emo_megatron.mcore.compat import is_in_backward

        scope = router.scope
        if is_in_backward() or router.layer_number not in scope.pools:
            return
        pool_DE, ids_T = scope.pools[router.layer_number], scope.document_ids_T
        lengths_D = torch.bincount(scope.segments.document_ids_T + 1, minlength=len(pool_DE) + 1)
        for document in lengths_D[1:].nonzero().flatten().tolist():
            place = scope.sample_positions_D[document], scope.segments.offsets_D[document]
            key = "/".join(str(int(number)) for number in (router.layer_number, *place))
            if not router.training:
                self.eval_sizes.add(int(pool_DE[document].sum()))
                continue
            self.pools[key] = pool_DE[document].nonzero().flatten().tolist()
            self.chosen[key] = routing_map[ids_T == document].sum(dim=0).tolist()

    def as_json(self) -> dict[str, Any]:
        return {name: sorted(value) if isinstance(value, set) else value for name, value in vars(self).items()}


def start(run: dict[str, Any]) -> dict[str, Any]:
    """Run all ranks as forks of this process; what they saw, together, their return codes and what they printed."""
    ranks, folder = run.get("ranks", 1), Path(run["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in range(ranks):
        for end in ("json", "txt"):
            (folder / f"rank{rank}.{end}").unlink(missing_ok=True)
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {ASYNC: "true"} if run.get("options", {}).get(ASYNC) else {}
    children = [
        fork(
            lambda rank=rank: one_rank(run, rank),
            out=folder / f"rank{rank}.txt",
            **common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]
    try:
        codes = [end_of(child) for child in children]
    finally:
        # those of a run that was interrupted
        for child in children:
            kill_group(child)
    printed = "".join((folder / f"rank{rank}.txt").read_text() for rank in range(ranks))
    # a killed rank wrote none
    files = [file for rank in range(ranks) if (file := folder / f"rank{rank}.json").exists()]
    parts = [json.loads(file.read_text()) for file in files]
    return _together(parts) | {"codes": codes, "printed": printed}


def one_rank(run: dict[str, Any], rank: int) -> None:
    """Train and write what this rank saw, even if it fails."""
    seen = Seen(kill_at=run.get("kill_at"))
    try:
        train(run, seen)
    finally:
        (Path(run["folder"]) / f"rank{rank}.json").write_text(json.dumps(seen.as_json()))


def _together(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """All ranks' values; several ranks' tokens of a document count together, and must have had one pool."""
    whole: dict[str, Any] = {"losses": [], "grad_norms": [], "metrics": {}, "pools": {}, "chosen": {}}
    whole["conflicts"] = []
    for name in ("eval_sizes", "are_predictions_masked"):
        whole[name] = sorted({value for part in parts for value in part[name]})
    for part in parts:
        whole["losses"] = part["losses"] or whole["losses"]
        whole["grad_norms"] = part["grad_norms"] or whole["grad_norms"]
        whole["metrics"] |= part["metrics"]
        for key, pool in part["pools"].items():
            if whole["pools"].setdefault(key, pool) != pool:
                whole["conflicts"].append(key)
            before = whole["chosen"].get(key, [0] * len(part["chosen"][key]))
            whole["chosen"][key] = [a + b for a, b in zip(before, part["chosen"][key], strict=True)]
    return whole


def write_documents(prefix: Path, *, eod: int, count: int = 2000) -> str:
    """An IndexedDataset of documents of 1 to 90 tokens from four domains; gives its prefix."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    draw = np.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(count):
        length, domain = int(draw.integers(0, 90)), int(draw.integers(4))
        ids = domain * 125 + (int(draw.integers(100)) + np.arange(length) * (domain + 1)) % 120
        builder.add_document(torch.tensor([*ids.tolist(), eod]), [length + 1])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def main() -> None:
    """Runs of a file, `[{"name": ..., "folder": ...}, ...]`, one after another; or this rank of one, with overrides."""
    file, *overrides = sys.argv[1:]
    loaded = json.loads(Path(file).read_text())
    if "RANK" not in os.environ:
        os.environ["LOCAL_WORLD_SIZE"] = str(max(run.get("ranks", 1) for run in loaded))
    from support import bridge_recipes

    if "RANK" in os.environ:
        one_rank(loaded | {"overrides": overrides}, int(os.environ["RANK"]))
        return
    data = write_documents(Path(file).parent / "documents", eod=bridge_recipes.VOCAB - 1)
    results = {run["name"]: start({"data": data} | run) for run in loaded}
    Path(file).with_suffix(".results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
