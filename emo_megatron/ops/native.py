"""The ops compiled from csrc/, for CPU and CUDA tensors: those of ops/reference.py and ops/reference_dispatch.py.

The ops are torch operators with fake implementations and gradients (the gradients of dispatch are in ops/dispatch.py).
`torch.compile` traces through the ops, and CUDA graphs capture them: no op waits for the device, and ops allocate only
outputs and a small workspace. Integer sums give the same bits for any number of threads and any split of the tokens.

The routing ops differ from the reference ops in the last bits of `exp`, and in one rule: the compiled ops rank the
experts of a softmax router by logits, the reference by probabilities rounded to float32. Experts with equal rounded
probabilities (all below 1e-38 of the best) are therefore ranked by logit instead of by index. The dispatch ops give
the same bits as the reference.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from emo_megatron.ops.reference import NUM_TOTALS, Routing
from emo_megatron.ops.reference_dispatch import Fanout, ReceivePlan, SendPlan
from emo_megatron.ops.reference_documents import NUM_STATISTICS, ScoreFunction, given_statistics
from emo_megatron.ops.sizes import first_state

LIBRARY = Path(__file__).resolve().parents[1] / "_native.so"
MAX_EXPERTS = 1024
MAX_TOP_K = 32
MAX_GROUPS = 32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DISPATCH_DTYPES = (torch.bool, torch.int32, torch.float64, *DTYPES)
"""Dtypes of routing maps, of codes and of rows."""
SOFTMAX, SOFTMAX_OF_CHOSEN, SIGMOID, SQRTSOFTPLUS = range(4)


class NativeOps:
    """The operators of one compiled library; creating the object registers the operators with torch.

    Args:
        library: path of the shared library.
        namespace: the torch.library namespace of the operators.

    Raises:
        OSError: the library cannot be loaded, for instance because torch is older than the library's stable ABI.
    """

    def __init__(self, library: Path, *, namespace: str) -> None:
        torch.ops.load_library(library)
        self.namespace = namespace
        self._ops = getattr(torch.ops, namespace)
        _register_routing_shapes(namespace)
        _register_document_shapes(namespace)
        _register_dispatch_shapes(namespace)
        _register_gradients(namespace)

    def document_scores(
        self,
        logits_TE: Tensor,
        *,
        document_ids_T: Tensor,
        num_documents: int,
        score_function: ScoreFunction = "softmax",
    ) -> Tensor:
        """See reference.document_scores."""
        return self._ops.document_scores(
            logits_TE.detach().contiguous(), document_ids_T.contiguous(), num_documents, _scoring(score_function)
        )

    def select_pool(self, scores_DE: Tensor, *, pool_sizes_D: Tensor, num_forced: int = 0) -> Tensor:
        """See reference.select_pool."""
        return self._ops.select_pool(scores_DE.contiguous(), pool_sizes_D.contiguous(), num_forced)

    def pool_topk(
        self,
        logits_TE: Tensor,
        *,
        document_ids_T: Tensor | None = None,
        pool_DE: Tensor | None = None,
        top_k: int,
        score_function: ScoreFunction = "softmax",
        pre_softmax: bool = True,
        expert_bias_E: Tensor | None = None,
        scaling_factor: float | None = None,
        mask: Literal["logits", "selection"] = "logits",
        num_groups: int | None = None,
        group_topk: int | None = None,
        num_documents: int | None = None,
    ) -> Routing:
        """See reference.pool_topk."""
        scoring = _scoring(score_function, pre_softmax=pre_softmax)
        has_bias = expert_bias_E is not None and scoring in (SIGMOID, SQRTSOFTPLUS)
        probs_TE, routing_map_TE, counts_X, score_sums_RE, z_T, choices_DE = self._ops.pool_topk(
            logits_TE.contiguous(),
            _contiguous(document_ids_T),
            _contiguous(pool_DE),
            expert_bias_E.float().contiguous() if expert_bias_E is not None and has_bias else None,
            top_k,
            scoring,
            mask == "logits",
            scaling_factor or 1.0,
            num_groups or 0,
            group_topk or 0,
            num_documents or 0,
            num_documents is not None,
        )
        return Routing(
            probs_TE=probs_TE,
            routing_map_TE=routing_map_TE,
            counts_X=counts_X,
            score_sums_RE=score_sums_RE,
            z_T=z_T,
            document_choices_DE=choices_DE,
        )

    def experts_used(self, routing_map_TE: Tensor, *, document_ids_T: Tensor, num_documents: int) -> Tensor:
        """See reference_documents.experts_used."""
        return self._ops.experts_used(routing_map_TE.contiguous(), document_ids_T.contiguous(), num_documents)

    def document_statistics(
        self, scores_DE: Tensor | None = None, pool_DE: Tensor | None = None, used_DW: Tensor | None = None
    ) -> Tensor:
        """See reference_documents.document_statistics."""
        given_statistics(scores_DE, pool_DE, used_DW)
        return self._ops.document_statistics(_contiguous(scores_DE), _contiguous(pool_DE), _contiguous(used_DW))

    def draw_bits(
        self, sample_positions_D: Tensor, offsets_D: Tensor, *, layers: range | Tensor, seed: int, stream: int
    ) -> Tensor:
        """See sizes.draw_bits."""
        layers_L, first, count = None, 0, 0
        if isinstance(layers, range):
            first, count = layers.start, len(layers)
        else:
            layers_L = layers.contiguous()
        return self._ops.draw_bits(
            sample_positions_D.contiguous(),
            offsets_D.contiguous(),
            layers_L,
            first,
            count,
            first_state(seed, stream=stream),
        )

    def count_sends(self, routing_map_TE: Tensor, *, num_ranks: int) -> Tensor:
        """See reference_dispatch.count_sends."""
        return self._ops.count_sends(routing_map_TE.contiguous(), num_ranks)

    def plan_send(self, routing_map_TE: Tensor, *, num_ranks: int, num_rows: int, num_pairs: int) -> SendPlan:
        """See reference_dispatch.plan_send."""
        *rows, places_P, codes_P = self._ops.plan_send(routing_map_TE.contiguous(), num_ranks, num_rows, num_pairs)
        return SendPlan(rows=Fanout(*rows), places_P=places_P, codes_P=codes_P)

    def plan_receive(self, codes_P: Tensor, *, num_rows: int, num_experts: int) -> ReceivePlan:
        """See reference_dispatch.plan_receive."""
        *pairs, order_P = self._ops.plan_receive(codes_P.contiguous(), num_rows, num_experts)
        return ReceivePlan(pairs=Fanout(*pairs), order_P=order_P)

    def copy_rows(self, rows_NH: Tensor, *, fanout: Fanout) -> Tensor:
        """See reference_dispatch.copy_rows; the op reads every row once."""
        return self._ops.copy_rows(rows_NH.contiguous(), *fanout)

    def sum_rows(self, copies_PH: Tensor, *, fanout: Fanout) -> Tensor:
        """See reference_dispatch.sum_rows."""
        return self._ops.sum_rows(copies_PH.contiguous(), fanout.copies_P, fanout.bounds_N)


def _register_routing_shapes(namespace: str) -> None:
    @torch.library.register_fake(f"{namespace}::document_scores")
    def _(logits: Tensor, document_ids: Tensor, num_documents: int, scoring: int) -> Tensor:
        return logits.new_empty((num_documents, logits.shape[1]), dtype=torch.int64)

    @torch.library.register_fake(f"{namespace}::select_pool")
    def _(scores: Tensor, pool_sizes: Tensor, num_forced: int) -> Tensor:
        return torch.empty_like(scores, dtype=torch.bool)

    @torch.library.register_fake(f"{namespace}::pool_topk")
    def _(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        num_tokens, num_experts = logits.shape
        num_documents, by_document = rest[-2:]
        num_sums = num_documents if by_document else 1
        return (
            torch.empty_like(logits),
            torch.empty_like(logits, dtype=torch.bool),
            logits.new_empty(num_experts + NUM_TOTALS, dtype=torch.int64),
            logits.new_empty((num_sums, num_experts), dtype=torch.float32),
            logits.new_empty(num_tokens, dtype=torch.float32),
            logits.new_empty((num_documents, num_experts), dtype=torch.int64),
        )

    @torch.library.register_fake(f"{namespace}::pool_topk_backward")
    def _(
        grad_probs: Tensor | None, grad_score_sums: Tensor | None, grad_z: Tensor | None, logits: Tensor, *_rest: Any
    ) -> Tensor:
        return torch.empty_like(logits)


def _register_document_shapes(namespace: str) -> None:
    @torch.library.register_fake(f"{namespace}::experts_used")
    def _(routing_map: Tensor, document_ids: Tensor, num_documents: int) -> Tensor:
        num_words = (routing_map.shape[1] + 31) // 32
        return routing_map.new_empty((num_documents, num_words), dtype=torch.int32)

    @torch.library.register_fake(f"{namespace}::document_statistics")
    def _(scores: Tensor | None, pool: Tensor | None, used: Tensor | None) -> Tensor:
        like = scores if scores is not None else used
        assert like is not None
        return like.new_empty(NUM_STATISTICS, dtype=torch.int64)

    @torch.library.register_fake(f"{namespace}::draw_bits")
    def _(
        positions: Tensor, offsets: Tensor, layers: Tensor | None, first_layer: int, num_layers: int, start: int
    ) -> Tensor:
        count = num_layers if layers is None else layers.shape[0]
        return positions.new_empty((count, positions.shape[0]))


# sizes are read from .shape, because len() would recompile for each size
def _register_dispatch_shapes(namespace: str) -> None:
    def integers(like: Tensor, size: int) -> Tensor:
        return like.new_empty(size, dtype=torch.int64)

    @torch.library.register_fake(f"{namespace}::count_sends")
    def _(routing_map: Tensor, num_ranks: int) -> Tensor:
        return integers(routing_map, num_ranks + routing_map.shape[1])

    @torch.library.register_fake(f"{namespace}::plan_send")
    def _(routing_map: Tensor, num_ranks: int, num_rows: int, num_pairs: int) -> tuple[Tensor, ...]:
        sizes = (num_rows, num_rows, routing_map.shape[0] + 1, num_pairs)
        codes = routing_map.new_empty(num_pairs, dtype=torch.int32)
        return (*(integers(routing_map, size) for size in sizes), codes)

    @torch.library.register_fake(f"{namespace}::plan_receive")
    def _(codes: Tensor, num_rows: int, num_experts: int) -> tuple[Tensor, ...]:
        num_pairs = codes.shape[0]
        sizes = (num_pairs, num_pairs, num_rows + 1, num_pairs)
        return tuple(integers(codes, size) for size in sizes)

    @torch.library.register_fake(f"{namespace}::copy_rows")
    def _(rows: Tensor, sources: Tensor, order: Tensor, bounds: Tensor) -> Tensor:
        return rows.new_empty(sources.shape[0], rows.shape[1])

    @torch.library.register_fake(f"{namespace}::sum_rows")
    def _(copies: Tensor, order: Tensor, bounds: Tensor) -> Tensor:
        return copies.new_empty(bounds.shape[0] - 1, copies.shape[1])


def _register_gradients(namespace: str) -> None:
    ops = getattr(torch.ops, namespace)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, document_ids, pool, _, *options = inputs
        # without the options of groups: the routing map holds their effect
        ctx.options = (*options[:4], *options[6:])
        _, routing_map, counts, _, _, choices = output
        # saved tensors of size [T, E]: the logits and the routing map (one byte per expert); backward recomputes scores
        ctx.save_for_backward(logits, routing_map, document_ids, pool)
        ctx.mark_non_differentiable(routing_map, counts, choices)
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_probs, _, _, grad_score_sums, grad_z, _ = (None if grad is None else grad.contiguous() for grad in grads)
        logits, routing_map, document_ids, pool = ctx.saved_tensors
        grad_logits = ops.pool_topk_backward(
            grad_probs, grad_score_sums, grad_z, logits, routing_map, document_ids, pool, *ctx.options
        )
        return (grad_logits, *(None,) * 11)

    torch.library.register_autograd(f"{namespace}::pool_topk", backward, setup_context=setup_context)


def _scoring(score_function: ScoreFunction, *, pre_softmax: bool = True) -> int:
    """The number of a score function in csrc/pool_ops.h."""
    softmax = SOFTMAX if pre_softmax else SOFTMAX_OF_CHOSEN
    return {"softmax": softmax, "sigmoid": SIGMOID, "sqrtsoftplus": SQRTSOFTPLUS}[score_function]


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


# a global instead of functools.cache, because torch.compile traces through the cached function but reads a global
_own: NativeOps | None = None


def load_native() -> NativeOps:
    """The package's own compiled ops, loaded once.

    Raises:
        RuntimeError: the ops were not built, or this torch cannot load them; gives the reason and the remedy.
    """
    global _own
    if _own is None:
        if not LIBRARY.exists():
            raise RuntimeError(
                "the compiled ops were not built: to see the reason, run `make native` in a checkout, "
                "or `pip install -v --no-deps --force-reinstall` with this package"
            )
        try:
            _own = NativeOps(LIBRARY, namespace="emo_megatron")
        except OSError as error:
            raise RuntimeError(f"the compiled ops do not load: {error.__cause__ or error}") from error
    return _own


# devices on which an op has run
_proven: set[str] = set()


def why_no_kernels(device_type: str) -> str:
    """Why the loaded ops cannot run on such a device; empty if they can run.

    The function runs the smallest op until the op succeeds once, because a failure may be temporary (out of memory).
    """
    if device_type in _proven:
        return ""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    if key is None or not torch._C._dispatch_has_kernel_for_dispatch_key("emo_megatron::document_scores", key):
        return f"the compiled ops were built without kernels for {device_type}"
    try:
        load_native().document_scores(
            torch.zeros(1, 1, device=device_type),
            document_ids_T=torch.zeros(1, dtype=torch.int64, device=device_type),
            num_documents=1,
        )
    except RuntimeError as error:
        # for instance, the ops were not built for this GPU or driver
        return str(error).partition("\n")[0]
    _proven.add(device_type)
    return ""
