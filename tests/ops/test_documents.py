"""What documents drew and used: the definitions against loops, the compiled ops against the definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.emulator import Compiled, host_ops, load_compiled
from support.routing import assert_equal
from torch import Tensor

from emo_megatron import ops
from emo_megatron.ops import native, reference, reference_documents, sizes

ONE = 2**reference.SCORE_FRACTION_BITS
ENTROPY_ATOL = 2e-6
"""Nats a document: shares and logarithms of the compiled ops are in float32."""

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def random_routing(num_tokens: int, num_experts: int, top_k: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_experts)
    scores_TE = torch.rand(num_tokens, num_experts, generator=generator)
    chosen_TK = scores_TE.topk(top_k).indices
    return torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(1, chosen_TK, True)


def random_ids(num_tokens: int, num_documents: int, *, is_sorted: bool) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    ids_T = torch.randint(-1, num_documents, (num_tokens,), generator=generator)
    # nobody is of the third document
    ids_T = ids_T.masked_fill(ids_T == 2, -1)
    return ids_T.sort().values if is_sorted else ids_T


def sets_of(used_DW: Tensor) -> list[set[int]]:
    """The experts whose bits are set."""
    return [
        {32 * w + b for w, word in enumerate(words) for b in range(32) if word >> b & 1} for words in used_DW.tolist()
    ]


CASES = [(40, 5, 2), (90, 32, 3), (64, 33, 1), (300, 127, 8), (130, 256, 4), (12, 1024, 32), (7, 1, 1)]


@pytest.mark.parametrize("is_sorted", [True, False])
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), CASES)
def test_experts_used(compiled: Compiled, num_tokens: int, num_experts: int, top_k: int, is_sorted: bool) -> None:
    routing_map_TE = random_routing(num_tokens, num_experts, top_k)
    ids_T = random_ids(num_tokens, 5, is_sorted=is_sorted)
    want_DW = reference_documents.experts_used(routing_map_TE, document_ids_T=ids_T, num_documents=5)
    assert want_DW.dtype == torch.int32
    assert want_DW.shape == (5, math.ceil(num_experts / 32))
    loop: list[set[int]] = [set() for _ in range(5)]
    for token, document in enumerate(ids_T.tolist()):
        if document >= 0:
            loop[document] |= set(routing_map_TE[token].nonzero()[:, 0].tolist())
    assert sets_of(want_DW) == loop
    assert loop[2] == set()
    got_DW = compiled.ops.experts_used(
        routing_map_TE.to(compiled.device), document_ids_T=ids_T.to(compiled.device), num_documents=5
    )
    assert_equal("used", got_DW.cpu(), want_DW)


def test_experts_used_of_all_experts_and_of_no_tokens(compiled: Compiled) -> None:
    everything_TE = torch.ones(3, 64, dtype=torch.bool, device=compiled.device)
    ids_T = torch.zeros(3, dtype=torch.int64, device=compiled.device)
    for implementation in (reference_documents, compiled.ops):
        used_DW = implementation.experts_used(everything_TE, document_ids_T=ids_T, num_documents=1)
        assert used_DW.tolist() == [[-1, -1]]
        none_DW = implementation.experts_used(everything_TE[:0], document_ids_T=ids_T[:0], num_documents=2)
        assert none_DW.tolist() == [[0, 0]] * 2


def test_ids_past_the_last_document_use_nothing(compiled: Compiled) -> None:
    routing_map_TE = torch.ones(4, 8, dtype=torch.bool, device=compiled.device)
    ids_T = torch.tensor([0, 3, -1, 2], device=compiled.device)
    if compiled.is_checked:
        with pytest.raises(RuntimeError, match=r"document_ids must be below .*, 3; got 3"):
            compiled.ops.experts_used(routing_map_TE, document_ids_T=ids_T, num_documents=3)
        return
    used_DW = compiled.ops.experts_used(routing_map_TE, document_ids_T=ids_T, num_documents=3)
    assert used_DW.tolist() == [[255], [0], [255]]


def documents_of(num_documents: int, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, some documents with none, one with all on one expert and one with even ones; pools; experts used."""
    generator = torch.Generator().manual_seed(num_documents)
    logits_DE = torch.randn(num_documents, num_experts, generator=generator) * 3
    scores_DE = (logits_DE.double().softmax(-1) * 1e12).long()
    scores_DE[::5] = 0
    scores_DE[1], scores_DE[2] = 0, ONE
    scores_DE[1, 3] = 2**40
    pool_DE = torch.rand(num_documents, num_experts, generator=generator) < 0.4
    routing_map_TE = random_routing(40, num_experts, 2)
    ids_T = random_ids(40, num_documents, is_sorted=False)
    used_DW = reference_documents.experts_used(routing_map_TE, document_ids_T=ids_T, num_documents=num_documents)
    return scores_DE, pool_DE, used_DW


@pytest.mark.parametrize(("num_documents", "num_experts"), [(3, 5), (9, 32), (70, 127), (20, 300)])
@pytest.mark.parametrize("given", ["all", "scores", "scores and pool", "used"])
def test_document_statistics(compiled: Compiled, num_documents: int, num_experts: int, given: str) -> None:
    scores_DE, pool_DE, used_DW = documents_of(num_documents, num_experts)
    want = torch.zeros(5, dtype=torch.float64)
    if given != "used":
        is_real_D = scores_DE.sum(dim=1) > 0
        shares_DE = scores_DE[is_real_D].double() / scores_DE[is_real_D].sum(dim=1, keepdim=True)
        want[0] = is_real_D.sum()
        want[2] = torch.special.entr(shares_DE).sum() * ONE
    if given in ("all", "scores and pool"):
        want[1] = pool_DE[is_real_D].sum()
    if given in ("all", "used"):
        sizes_D = [len(used) for used in sets_of(used_DW)]
        want[3], want[4] = sum(size > 0 for size in sizes_D), sum(sizes_D)
    arguments: dict[str, Any] = {
        "scores_DE": None if given == "used" else scores_DE,
        "pool_DE": pool_DE if given in ("all", "scores and pool") else None,
        "used_DW": used_DW if given in ("all", "used") else None,
    }
    exact = reference_documents.document_statistics(**arguments)
    assert exact.dtype == torch.int64
    on_device = {name: None if tensor is None else tensor.to(compiled.device) for name, tensor in arguments.items()}
    got = compiled.ops.document_statistics(**on_device).cpu()
    counts = [0, 1, 3, 4]
    assert exact[counts].tolist() == got[counts].tolist() == want[counts].tolist()
    assert abs(exact[2] - want[2]) <= num_documents
    assert abs(got[2] - want[2]) <= num_documents * ENTROPY_ATOL * ONE


def test_the_entropy_of_a_certain_document_is_none(compiled: Compiled) -> None:
    scores_DE = torch.zeros(2, 40, dtype=torch.int64, device=compiled.device)
    scores_DE[0, 7], scores_DE[1, 9] = 3, 2**60 + 1
    for implementation in (reference_documents, compiled.ops):
        assert implementation.document_statistics(scores_DE).tolist() == [2, 0, 0, 0, 0]
        assert implementation.document_statistics(scores_DE[:0]).tolist() == [0] * 5


def test_statistics_are_the_same_in_every_order(compiled: Compiled) -> None:
    tensors = [tensor.to(compiled.device) for tensor in documents_of(70, 127)]
    names = ("scores_DE", "pool_DE", "used_DW")
    for implementation in (reference_documents, compiled.ops):
        want = implementation.document_statistics(**dict(zip(names, tensors, strict=True)))
        order_D = torch.randperm(70, generator=torch.Generator().manual_seed(3))
        parts = [
            implementation.document_statistics(
                **{name: x[rows.to(x.device)] for name, x in zip(names, tensors, strict=True)}
            )
            for rows in order_D.split([1, 30, 39])
        ]
        assert_equal("sum of the parts", sum(parts), want)


def test_what_the_statistics_need_is_named() -> None:
    pool_DE = torch.ones(2, 3, dtype=torch.bool)
    for implementation in (reference_documents, native.load_native(), ops):
        for arguments in ({}, {"pool_DE": pool_DE}):
            with pytest.raises(ValueError, match="requires scores"):
                implementation.document_statistics(**arguments)
    scores_DE = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="pool must have shape"):
        ops.document_statistics(scores_DE, pool_DE=pool_DE[:, :2])


@pytest.mark.parametrize("stream", [0, 1])
@pytest.mark.parametrize("seed", [0, 3, 2**62, 2**63 - 1])
def test_draws_are_bit_equal(compiled: Compiled, seed: int, stream: int) -> None:
    positions_D = torch.tensor([0, 1, 7, 10**12, 2**63 - 1] * 70)
    offsets_D = torch.arange(350) * 255 - 3
    layers = torch.tensor([1, 48, 7])
    for chosen in (range(1, 4), range(5, 6), range(0), layers):
        options = {"seed": seed, "stream": stream}
        want_LD = sizes.draw_bits(positions_D, offsets_D, layers=chosen, **options)
        got_LD = compiled.ops.draw_bits(
            positions_D.to(compiled.device),
            offsets_D.to(compiled.device),
            layers=chosen.to(compiled.device) if isinstance(chosen, Tensor) else chosen,
            **options,
        )
        assert want_LD.shape == (len(chosen), 350)
        assert_equal("bits", got_LD.cpu(), want_LD)


@pytest.mark.parametrize("layer_number", [5, range(1, 4), torch.tensor([[2], [9]])], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_sizes_are_the_same_from_every_backend(layer_number: int | range | Tensor, share: float) -> None:
    def draw(backend: ops.Backend) -> Tensor:
        return ops.draw_pool_sizes(
            torch.arange(50) + 10**12,
            offsets_D=torch.arange(50) * 7,
            layer_number=layer_number,
            seed=4,
            low=3,
            high=20,
            unrestricted_share=share,
            num_experts=64,
            backend=backend,
        )

    assert_equal("sizes", draw("native"), draw("reference"))


@pytest.mark.parametrize("num_threads", [1, 3])
def test_the_same_for_any_number_of_threads(num_threads: int) -> None:
    routing_map_TE = random_routing(9000, 64, 3)
    ids_T = random_ids(9000, 5, is_sorted=True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        used_DW = host_ops().experts_used(routing_map_TE, document_ids_T=ids_T, num_documents=5)
    finally:
        torch.set_num_threads(before)
    want_DW = reference_documents.experts_used(routing_map_TE, document_ids_T=ids_T, num_documents=5)
    assert_equal("used", used_DW, want_DW)


def test_the_same_for_any_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    emulated, (scores_DE, pool_DE, used_DW) = load_compiled("cuda"), documents_of(70, 127)
    want = emulated.document_statistics(scores_DE, pool_DE=pool_DE, used_DW=used_DW)
    for seed in range(1, 5):
        monkeypatch.setenv("EMO_EMULATOR_SEED", str(seed))
        got = emulated.document_statistics(scores_DE, pool_DE=pool_DE, used_DW=used_DW)
        assert_equal("schedule", got, want)


def test_operators_keep_the_rules_of_torch(compiled: Compiled) -> None:
    operators, device = getattr(torch.ops, compiled.ops.namespace), compiled.device
    routing_map_TE = random_routing(9, 40, 2).to(device)
    ids_T = random_ids(9, 4, is_sorted=True).to(device)
    scores_DE, pool_DE, used_DW = (x.to(device) for x in documents_of(9, 32))
    torch.use_deterministic_algorithms(False)
    for operator, arguments in (
        (operators.experts_used, (routing_map_TE, ids_T, 4)),
        (operators.document_statistics, (scores_DE, pool_DE, used_DW)),
        (operators.document_statistics, (None, None, used_DW)),
        (operators.draw_bits, (ids_T, ids_T, None, 1, 3, 5)),
        (operators.draw_bits, (ids_T, ids_T, ids_T[:2], 0, 0, 5)),
    ):
        torch.library.opcheck(operator.default, arguments)


def test_torch_compile_sees_through() -> None:
    scores_DE, pool_DE, _ = documents_of(9, 32)
    routing_map_TE, ids_T = random_routing(20, 32, 2), random_ids(20, 9, is_sorted=True)

    def step(positions_D: Tensor) -> tuple[Tensor, Tensor]:
        used_DW = ops.experts_used(routing_map_TE, document_ids_T=ids_T, num_documents=9)
        drawn_LD = ops.draw_pool_sizes(
            positions_D, offsets_D=positions_D, layer_number=range(1, 4), seed=1, low=2, high=9, num_experts=32
        )
        return ops.document_statistics(scores_DE, pool_DE=pool_DE, used_DW=used_DW), drawn_LD

    torch.use_deterministic_algorithms(False)
    compiled_step = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled_step(torch.arange(9)), step(torch.arange(9)), strict=True):
        assert_equal("compiled", got, want)
