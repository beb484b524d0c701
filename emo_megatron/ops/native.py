"""The ops compiled from csrc/: those of ops/reference.py and ops/reference_dispatch.py, on CPU and CUDA tensors.

They are torch operators with fake registrations, and with gradients (those of dispatch are in ops/dispatch.py), so
`torch.compile` traces through them and CUDA graphs capture them: nothing waits for the device, and nothing but outputs
and a small workspace is allocated. Integer sums make results the same bits for any number of threads and any split of
the tokens.

The routing ops differ from the reference by the last bits of `exp`, and in one rule: a softmax router's experts are
ranked by their logits, not by probabilities rounded to float32, so experts that are equal there (all those below 1e-38
of the best) go by their logits, not by their index. The dispatch ops give the reference's bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from emo_megatron.ops.operators import register
from emo_megatron.ops.reference import Routing
from emo_megatron.ops.reference_dispatch import Fanout, ReceivePlan, SendPlan
from emo_megatron.ops.reference_documents import given_statistics
from emo_megatron.ops.reference_pools import ScoreFunction
from emo_megatron.ops.sizes import first_state

LIBRARY = Path(__file__).resolve().parents[1] / "_native.so"
MAX_EXPERTS = 1024
MAX_TOP_K = 32
MAX_GROUPS = 32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DISPATCH_DTYPES = (torch.bool, torch.int32, torch.float64, *DTYPES)
"""Of routing maps, of codes, of rows."""
SOFTMAX, SOFTMAX_OF_CHOSEN, SIGMOID, SQRTSOFTPLUS = range(4)


class NativeOps:
    """The operators of one compiled library; loading it registers them with torch.

    Args:
        library: path of the shared library.
        namespace: the torch.library namespace it registers.

    Raises:
        OSError: the library cannot be loaded, for instance by a torch older than its stable ABI.
    """

    def __init__(self, library: Path, *, namespace: str) -> None:
        torch.ops.load_library(library)
        self.namespace = namespace
        self._ops = getattr(torch.ops, namespace)
        register(namespace)

    def document_scores(
        self,
        logits_TE: Tensor,
        *,
        document_ids_T: Tensor,
        num_documents: int,
        score_function: ScoreFunction = "softmax",
    ) -> Tensor:
        """As reference.document_scores."""
        found = self._ops.document_scores(
            logits_TE.detach().contiguous(), document_ids_T.contiguous(), num_documents, _scoring(score_function)
        )
        return cast(Tensor, found)

    def select_pool(self, scores_DE: Tensor, *, pool_sizes_D: Tensor, num_forced: int = 0) -> Tensor:
        """As reference.select_pool."""
        found = self._ops.select_pool(scores_DE.contiguous(), pool_sizes_D.contiguous(), num_forced)
        return cast(Tensor, found)

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
        """As reference.pool_topk."""
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
        """As reference_documents.experts_used."""
        found = self._ops.experts_used(routing_map_TE.contiguous(), document_ids_T.contiguous(), num_documents)
        return cast(Tensor, found)

    def document_statistics(
        self, scores_DE: Tensor | None = None, pool_DE: Tensor | None = None, used_DW: Tensor | None = None
    ) -> Tensor:
        """As reference_documents.document_statistics."""
        given_statistics(scores_DE, pool_DE, used_DW)
        found = self._ops.document_statistics(_contiguous(scores_DE), _contiguous(pool_DE), _contiguous(used_DW))
        return cast(Tensor, found)

    def draw_bits(
        self, sample_positions_D: Tensor, offsets_D: Tensor, *, layers: range | Tensor, seed: int, stream: int
    ) -> Tensor:
        """As sizes.draw_bits."""
        layers_L, first, count = None, 0, 0
        if isinstance(layers, range):
            first, count = layers.start, len(layers)
        else:
            layers_L = layers.contiguous()
        found = self._ops.draw_bits(
            sample_positions_D.contiguous(),
            offsets_D.contiguous(),
            layers_L,
            first,
            count,
            first_state(seed, stream=stream),
        )
        return cast(Tensor, found)

    def count_sends(self, routing_map_TE: Tensor, *, num_ranks: int) -> Tensor:
        """As reference_dispatch.count_sends."""
        return cast(Tensor, self._ops.count_sends(routing_map_TE.contiguous(), num_ranks))

    def plan_send(self, routing_map_TE: Tensor, *, num_ranks: int, num_rows: int, num_pairs: int) -> SendPlan:
        """As reference_dispatch.plan_send."""
        source_P, copies_P, bounds_N, places_P, codes_P = self._ops.plan_send(
            routing_map_TE.contiguous(), num_ranks, num_rows, num_pairs
        )
        rows = Fanout(source_P=source_P, copies_P=copies_P, bounds_N=bounds_N)
        return SendPlan(rows=rows, places_P=places_P, codes_P=codes_P)

    def plan_receive(self, codes_P: Tensor, *, num_rows: int, num_experts: int) -> ReceivePlan:
        """As reference_dispatch.plan_receive."""
        source_P, copies_P, bounds_N, order_P = self._ops.plan_receive(codes_P.contiguous(), num_rows, num_experts)
        pairs = Fanout(source_P=source_P, copies_P=copies_P, bounds_N=bounds_N)
        return ReceivePlan(pairs=pairs, order_P=order_P)

    def copy_rows(self, rows_NH: Tensor, *, fanout: Fanout) -> Tensor:
        """As reference_dispatch.copy_rows; every row is read once."""
        found = self._ops.copy_rows(rows_NH.contiguous(), fanout.source_P, fanout.copies_P, fanout.bounds_N)
        return cast(Tensor, found)

    def sum_rows(self, copies_PH: Tensor, *, fanout: Fanout) -> Tensor:
        """As reference_dispatch.sum_rows."""
        found = self._ops.sum_rows(copies_PH.contiguous(), fanout.copies_P, fanout.bounds_N)
        return cast(Tensor, found)


def _scoring(score_function: ScoreFunction, *, pre_softmax: bool = True) -> int:
    """The number csrc/pool_ops.h knows it by."""
    softmax = SOFTMAX if pre_softmax else SOFTMAX_OF_CHOSEN
    return {"softmax": softmax, "sigmoid": SIGMOID, "sqrtsoftplus": SQRTSOFTPLUS}[score_function]


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


# no functools.cache: torch.compile traces through that, but reads a global
_own: NativeOps | None = None


def load_native() -> NativeOps:
    """The package's own compiled ops, loaded once.

    Raises:
        RuntimeError: there are none, or this torch cannot load them; says why and what to do.
    """
    global _own
    if _own is None:
        if not LIBRARY.exists():
            raise RuntimeError(
                "the compiled ops were not built: `make native` in a checkout says why, "
                "or `pip install -v --no-deps --force-reinstall` of this package"
            )
        try:
            _own = NativeOps(LIBRARY, namespace="emo_megatron")
        except OSError as error:
            raise RuntimeError(f"the compiled ops do not load: {error.__cause__ or error}") from error
    return _own


# devices on which an op has run
_proven: set[str] = set()


def why_no_kernels(device_type: str) -> str:
    """Why the loaded ops cannot run on such a device; empty where they can.

    Tries the smallest op until it has run once: a failure may pass, for instance one of memory.
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
        # for instance a GPU or a driver that they were not built for
        return str(error).partition("\n")[0]
    _proven.add(device_type)
    return ""
