"""A small MoE in the ranks of a layout, and the documents that the runner reads.

Ranks import this file by its path, so it names its neighbours whole.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

SEQ_LENGTH = 24


def documents(count: int = 23, *, seed: int = 3) -> list[Tensor]:
    """Documents of 1 to 40 tokens: some longer than a row."""
    from support import tiny

    generator = torch.Generator().manual_seed(seed)
    lengths = [1, *torch.randint(2, 41, (count - 1,), generator=generator).tolist()]
    return [torch.randint(1, tiny.VOCAB, (n,), generator=generator) for n in lengths]


def runner_of(layout: dict[str, int], **config: Any) -> Any:
    """A MegatronRunner of the same model under any layout: three MoE layers after a dense one."""
    from emo_megatron.config import PoolConfig
    from support import shards, tiny

    tiny.setup(**{"expert_tensor_parallel_size": 1} | layout)
    options: dict[str, Any] = {"num_layers": 4, "moe_layer_freq": [0, 1, 1, 1]}
    model = tiny.model(PoolConfig(pool_min=3), **options | config)
    shards.initialise([model], seed=5)
    return runner(model)


def runner(model: Any) -> Any:
    """A MegatronRunner of the model above, whatever its weights are now."""
    from emo_megatron.runners.megatron import MegatronRunner
    from support import experts

    metadata = dataclasses.replace(experts.METADATA, layers=(2, 3, 4, *range(5, 5 + _num_prediction(model.config))))
    return MegatronRunner(model, metadata=metadata, seq_length=SEQ_LENGTH, micro_batch_size=2)


def _num_prediction(config: Any) -> int:
    """Layers of multi-token prediction; one for all depths if it is repeated."""
    return 1 if config.mtp_use_repeated_layer else config.mtp_num_layers or 0


def measure(
    layout: dict[str, int],
    *,
    outputs: bool = True,
    allowed: list[list[bool]] | None = None,
    config: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Statistics and loss of the test documents, as plain values."""
    runner = runner_of(layout, **config or {})
    allowed_LE = None if allowed is None else torch.tensor(allowed)
    stats = runner.statistics(documents(), outputs=outputs, allowed_LE=allowed_LE)
    loss = runner.loss(documents(), allowed_LE=allowed_LE)
    return stats.tensors() | dataclasses.asdict(loss) | {"tokens": stats.num_tokens}


@torch.no_grad()
def marks(layout: dict[str, int]) -> list[str]:
    """What tells the weights apart: as they are, after a change of one value of one expert of one rank, and back."""
    model = runner_of(layout).model
    found = [runner(model).setting.weights]
    held = _held(model, layer=3, expert=5, name="")
    for _ in range(2):
        if held is not None:
            held[3, 2] *= -1
        found.append(runner(model).setting.weights)
    return found


def by_definition(config: dict[str, Any] | None = None) -> dict[str, Tensor]:
    """The statistics of one process again, document by document, token by token, expert by expert."""
    from emo_megatron.experts.calibration import pack_rows

    runner = runner_of({}, **config or {})
    model = runner.model
    layers = [block.mlp for block in model.decoder.layers[1:]]
    # tokens at the end of a document that do not count, for each call of a layer in a forward pass
    left_out: list[list[int]] = [[0] for _ in layers]
    if depths := model.config.mtp_num_layers:
        layers += [predicting.mtp_model_layer.mlp for predicting in model.mtp.layers]
        all_depths = [*range(1, depths + 1)]
        left_out += [all_depths] if model.config.mtp_use_repeated_layer else [[depth] for depth in all_depths]
    seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]
    handles = [
        layer.register_forward_hook(
            # the residual is added in place afterwards
            lambda module, inputs, output, into=into: into.append((inputs[0], output[0].clone()))
        )
        for layer, into in zip(layers, seen, strict=True)
    ]
    pieces = [p for d in documents() for p in d.split(SEQ_LENGTH)]
    for row in (row for piece in pieces for row in pack_rows([piece], seq_length=len(piece))):
        positions = torch.arange(len(row.tokens_S))[None]
        with torch.no_grad():
            model(row.tokens_S[None], positions, None)
    for handle in handles:
        handle.remove()
    names = ("probability_LE", "count_LE", "gated_norm_LE", "residual_change_LE")
    sums = {name: torch.zeros(len(layers), 8, dtype=torch.float64) for name in names}
    sums["coactivation_LEE"] = torch.zeros(len(layers), 8, 8, dtype=torch.float64)
    with torch.no_grad():
        for index, (layer, tokens) in enumerate(zip(layers, seen, strict=True)):
            for call, (inputs, outputs) in enumerate(tokens):
                counted = slice(max(0, len(inputs) - left_out[index][call % len(left_out[index])]))
                for h, out in zip(inputs.flatten(0, 1)[counted], outputs.flatten(0, 1)[counted], strict=True):
                    _add_token(layer, h, out, {k: v[index] for k, v in sums.items()})
    return sums


def _add_token(layer: Any, h: Tensor, out: Tensor, sums: dict[str, Tensor]) -> None:
    logits = layer.router.weight.double() @ h.double()
    sums["probability_LE"] += logits.softmax(0)
    chosen = logits.topk(2).indices
    gates = logits[chosen].softmax(0)
    after = h + out
    change = max(0.0, 1 - float(h @ after / (h.norm() * after.norm())))
    for expert, gate in zip(chosen.tolist(), gates, strict=True):
        output, _ = layer.experts.local_experts[expert](h[None], torch.ones(1))
        length = float(gate) * float(output.norm())
        sums["count_LE"][expert] += 1
        sums["gated_norm_LE"][expert] += length
        sums["residual_change_LE"][expert] += length * change
    for one in chosen.tolist():
        for other in chosen.tolist():
            sums["coactivation_LEE"][one, other] += 1


def loss_of_nothing() -> None:
    """The loss of documents of one token."""
    runner_of({}).loss([torch.tensor([3]), torch.tensor([5])])


def looks() -> dict[str, Any]:
    """What the ranks are told when they look at files, and how often they really looked."""
    import torch.distributed as dist

    runner = runner_of({})
    looked: list[str] = []

    def find() -> int:
        looked.append("")
        return int(dist.get_rank())

    def fail() -> None:
        looked.append("")
        raise ValueError(f"of rank {dist.get_rank()}")

    found = runner.from_writer(find)
    try:
        runner.from_writer(fail)
    except ValueError as error:
        return {"found": found, "raised": str(error), "looked": len(looked)}
    return {}


def interrupted_select(folder: str, layout: dict[str, int]) -> dict[str, Any]:
    """The smallest module, layer by layer: chosen at once, and stopped in its fifth pass and chosen again."""
    from pathlib import Path
    from unittest import mock

    from emo_megatron.commands import select
    from emo_megatron.commands.options import ModelOptions
    from emo_megatron.experts.calibration import Documents
    from emo_megatron.runners.cache import Cache, CachedRunner

    runner = runner_of(layout)
    run, passes = runner._run, []

    def choose(name: str, *, stop_at: int | None = None) -> Any:
        passes.clear()

        def counted(*arguments: Any) -> Any:
            if len(passes) == stop_at:
                raise KeyboardInterrupt
            passes.append(arguments)
            return run(*arguments)

        runner._run = counted
        options = select.Options(
            output=Path(folder) / name,
            checkpoint=Path("checkpoint"),
            method="layerwise",
            data=Path("data"),
            max_loss_increase="1%",
            validation_data=Path("held-out"),
        )
        texts = {
            kind: Documents(tokens=tuple(documents(9, seed=seed)), source={"file": kind, "sha256": kind})
            for kind, seed in (("data", 3), ("held-out", 4))
        }
        # ranks find nothing, and are told by the first what its cache holds
        is_first = torch.distributed.get_rank() == 0
        cache = Cache(Path(folder) / "cache" if is_first else Path(folder) / "not the first")
        opened = (CachedRunner(runner, cache), lambda path, _: texts[path.name])
        with (
            mock.patch.object(ModelOptions, "open", return_value=opened),
            mock.patch.object(ModelOptions, "runs_in_ranks", return_value=False),
        ):
            select.run(options)
        torch.distributed.barrier()
        return options.output.read_bytes()

    try:
        choose("s.json", stop_at=5)
    except KeyboardInterrupt:
        num_stopped = len(passes)
        again = choose("s.json")
        num_again = len(passes)
        with mock.patch.object(Cache, "get", return_value=None):
            whole = choose("whole.json")
        return {"is same": again == whole, "whole": len(passes), "stopped": num_stopped, "again": num_again}
    return {}


def losses_of_documents(allowed: list[list[bool]] | None) -> dict[str, Any]:
    """Losses of the test documents in one call, of each of them alone, and of all together."""
    runner = runner_of({})
    allowed_LE = None if allowed is None else torch.tensor(allowed)
    alone = [
        runner.loss([document], allowed_LE=allowed_LE) if document.numel() > 1 else None for document in documents()
    ]
    return {
        "at once": runner.document_nats(documents(), allowed_LE=allowed_LE),
        "alone": torch.tensor([loss.nats * loss.num_tokens if loss else 0.0 for loss in alone]),
        "all": runner.loss(documents(), allowed_LE=allowed_LE),
    }


def said_of(layout: dict[str, int], places: list[dict[str, Any]], value: float, **config: Any) -> list[dict[str, str]]:
    """What each rank is told of the model when weights of it hold a value, one place after the other.

    Places are "layer" and "expert", in the numbers of the whole model, for all of an expert's second projection; or the
    "name" of a parameter, from its layer on if there is one, whose sixth row is meant.
    """
    model = runner_of(layout, **config).model
    return [_said(model, value=value, **place) for place in places]


@torch.no_grad()
def _said(model: Any, *, value: float, layer: int = 0, expert: int = 0, name: str = "") -> Any:
    held = _held(model, layer=layer, expert=expert, name=name)
    kept = None if held is None else held.clone()
    if held is not None:
        held[...] = value
    answers: dict[str, str] = {}

    def ask(question: str, what: Any) -> Any:
        try:
            return what()
        except ValueError as error:
            answers[question] = f"{type(error).__name__}: {error}"

    try:
        opened = ask("opened", lambda: runner(model))
        if opened is not None:
            texts = documents()
            ask("statistics", lambda: opened.statistics(texts, outputs=False))
            ask("outputs", lambda: opened.statistics(texts, outputs=True))
            ask("loss", lambda: opened.loss(texts))
            if torch.distributed.get_world_size() == 1:
                ask("documents", lambda: opened.document_nats(texts))
    finally:
        if held is not None:
            held[...] = kept
    return answers


def _held(model: Any, *, layer: int, expert: int, name: str) -> Tensor | None:
    """Where the value goes; None on a rank that has no part of it."""
    blocks = {block.layer_number: block for block in model.decoder.layers}
    if name:
        owner = blocks.get(layer) if layer else model
        weights = dict(owner.named_parameters()) if owner is not None else {}
        return weights[name][5:6] if name in weights else None
    own = blocks[layer].mlp.local_expert_indices if layer in blocks else []
    if expert not in own:
        return None
    weight: Tensor = blocks[layer].mlp.experts.local_experts[own.index(expert)].linear_fc2.weight
    return weight
