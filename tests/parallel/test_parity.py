"""Every parallel layout trains the model that one process trains: losses, gradients, weights, decisions."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from support import PARITY_TABLE, shards, training
from support.training import Case

MARGIN = 1e-5
"""Smallest gap in probability a decision may be made by: a closer one could flip with the order of a sum."""
TOLERANCE = 1e-5
"""Of a tensor's norm; float32."""
LOGGED = (
    *("pool_size", "document_entropy"),
    *("experts_per_document", "token_entropy", "load_imbalance", "nonfinite_tokens"),
)
ROOT = Path(__file__).resolve().parents[2]

LAYOUTS = {
    "DP2": {"dp": 2},
    "DP2, distributed optimizer": {"dp": 2, "distributed_optimizer": True},
    "TP2 + SP": {"tp": 2},
    "CP2 by sample": {"cp": 2},
    "CP2 by document": {"cp": 2, "cp_partition": "document"},
    "EP2": {"dp": 2, "ep": 2},
    "PP2": {"pp": 2},
    "PP2 x VPP2": {"pp": 2, "vpp": 2},
    "EP2 x ETP2": {"tp": 2, "dp": 2, "ep": 2, "etp": 2},
    "TP2 x EP2": {"tp": 2, "dp": 2, "ep": 2},
    "TP2 x CP2 by document": {"tp": 2, "cp": 2, "cp_partition": "document"},
    "TP2 x PP2": {"tp": 2, "pp": 2},
    "PP2 x EP2": {"pp": 2, "dp": 2, "ep": 2},
    "PP4": {"pp": 4},
    "EP2, dedup": {"dp": 2, "ep": 2, "dispatcher": "dedup"},
    "EP4, dedup": {"dp": 4, "ep": 4, "dispatcher": "dedup"},
    "EP2 x ETP2, dedup": {"tp": 2, "dp": 2, "ep": 2, "etp": 2, "dispatcher": "dedup"},
    "TP2 x EP2, dedup": {"tp": 2, "dp": 2, "ep": 2, "dispatcher": "dedup"},
}
# Megatron asks for bf16 with it, and here that is a mark only: weights and gradients stay float32
OVERLAP = {"bf16": True, "overlap_moe_expert_parallel_comm": True}
DEEPSEEK = {
    "pool": {"pool_score": "gate_with_bias", "pool_unrestricted": 0.2, "pool_skew": 0.5},
    "config": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.05,
        "moe_router_topk_scaling_factor": 2.5,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_router_load_balancing_type": ["seq_aux_loss", "global_aux_loss"],
        "moe_aux_loss_coeff": [0.1, 0.05],
    },
}
RANK_BY_RANK = {
    "config": {
        "moe_router_score_function": "sqrtsoftplus",
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.05,
        # over all ranks, which is another population
        "moe_z_loss_coeff": None,
    }
}
GROUPED_POOLS = {
    "pool": {"pool_group_scope": "document"},
    "config": {
        "moe_router_pre_softmax": True,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_router_load_balancing_type": "seq_aux_loss",
    },
}
LATE = {"pool": {"pool_delay_samples": 1, "pool_min_decay_samples": 16}}
"""The first step trains the standard MoE, the next ones pools whose lower bound falls."""
FEATURES = [
    Case(name="EP2, overlap", dp=2, ep=2, accumulation=4, per_token=True, features=OVERLAP),
    Case(
        name="EP2, dedup, overlap",
        **{"dp": 2, "ep": 2, "mbs": 2, "accumulation": 2, "balance": "running"},
        dispatcher="dedup",
        features=OVERLAP,
    ),
    Case(
        name="PP2 x VPP2 x EP2, overlap",
        **{"pp": 2, "vpp": 2, "dp": 2, "ep": 2, "accumulation": 4, "per_token": True},
        features=OVERLAP,
    ),
    Case(
        name="EP2, allgather",
        **{"dp": 2, "ep": 2, "mbs": 2, "accumulation": 2, "balance": "running"},
        features={"moe_token_dispatcher_type": "allgather"},
    ),
    *(
        Case(
            name=f"{name}, multi-latent attention",
            cp_partition="document",
            accumulation=2,
            per_token=True,
            config={"multi_latent_attention": True},
            **layout,
        )
        for name, layout in {
            "EP2, dedup": {"dp": 2, "ep": 2, "dispatcher": "dedup", "recompute": "moe"},
            "CP2 by document": {"cp": 2, "mbs": 2, "recompute": "full"},
            "TP2 + SP": {"tp": 2, "mbs": 2},
        }.items()
    ),
    *(
        Case(name=f"{name}, routers", documents="routers", per_token=True, **layout)
        for name, layout in {
            "DP2": {"dp": 2, "mbs": 2, "accumulation": 2, "balance": "running"},
            "TP2 + SP": {"tp": 2, "mbs": 2, "recompute": "moe"},
            "CP2 by sample": {"cp": 2, "mbs": 2, "recompute": "full"},
            "EP2, overlap": {"dp": 2, "ep": 2, "accumulation": 4, "features": OVERLAP},
            "PP2 x VPP2": {"pp": 2, "vpp": 2, "mbs": 2, "accumulation": 4, "recompute": "full"},
            "CP2 x EP2 x DP2": {"cp": 2, "dp": 2, "ep": 2, "mbs": 2, "dispatcher": "dedup"},
        }.items()
    ),
    *(
        Case(name=f"{name}, groups and biased pools", per_token=True, **layout, **DEEPSEEK)
        for name, layout in {
            "DP2": {"dp": 2, "mbs": 2, "accumulation": 2, "balance": "running"},
            "TP2 + SP": {"tp": 2, "accumulation": 2, "recompute": "moe"},
            "CP2 by document": {"cp": 2, "cp_partition": "document", "recompute": "full"},
            "EP2, dedup, overlap": {
                **{"dp": 2, "ep": 2, "accumulation": 4, "dispatcher": "dedup"},
                "features": OVERLAP,
            },
            "PP2 x VPP2": {"pp": 2, "vpp": 2, "accumulation": 4, "recompute": "full"},
            "TP2 x CP2 by sample": {"tp": 2, "cp": 2, "mbs": 2, "recompute": "moe"},
        }.items()
    ),
    *(
        Case(name=f"{name}, aux_loss of each rank", **layout, **RANK_BY_RANK)
        for name, layout in {
            "DP2": {"dp": 2, "mbs": 2, "accumulation": 2},
            "TP2 + SP": {"tp": 2, "accumulation": 2, "recompute": "full", "per_token": True},
            "CP2 by sample": {"cp": 2, "mbs": 2, "recompute": "moe", "per_token": True},
            "PP2": {"pp": 2, "mbs": 2, "accumulation": 4, "recompute": "full"},
            "TP2 x EP2": {"tp": 2, "dp": 2, "ep": 2, "accumulation": 2, "per_token": True},
        }.items()
    ),
    *(
        Case(name=f"{name}, pools inside groups", **layout, **GROUPED_POOLS)
        for name, layout in {
            "CP2 by document": {
                **{"cp": 2, "cp_partition": "document", "mbs": 2, "recompute": "moe"},
                "per_token": True,
            },
            "EP2": {"dp": 2, "ep": 2, "accumulation": 4, "recompute": "full"},
            "TP2 x PP2": {"tp": 2, "pp": 2, "mbs": 2, "accumulation": 4},
        }.items()
    ),
    *(
        Case(name=f"{name}, pools after the first step", **layout, **LATE)
        for name, layout in {
            "CP2 by document": {
                **{"cp": 2, "cp_partition": "document", "mbs": 2, "recompute": "full"},
                "per_token": True,
            },
            "PP2 x VPP2": {"pp": 2, "vpp": 2, "accumulation": 4, "recompute": "moe"},
        }.items()
    ),
]
"""Host features, each in a layout of its own; those of two processes run in `make test`, but for some."""
SLOW = {
    "EP2, dedup, overlap, groups and biased pools",
    "PP2 x VPP2, groups and biased pools",
    "TP2 + SP, aux_loss of each rank",
    "CP2 by sample, aux_loss of each rank",
    "PP2, aux_loss of each rank",
    "CP2 by document, pools inside groups",
    "EP2, pools inside groups",
    "PP2 x VPP2, pools after the first step",
}
SHAPES = [(1, 1), (2, 4), (1, 4), (2, 1)]
"""Micro-batch and gradient accumulation."""
RECOMPUTE = ["none", "moe", "full"]


def _cases():
    for row, (name, layout) in enumerate(LAYOUTS.items()):
        interleaved = "vpp" in layout
        for column, (mbs, accumulation) in enumerate(SHAPES[:3] if interleaved else SHAPES):
            case = Case(
                name=name,
                **layout,
                mbs=mbs,
                # an interleaved pipeline needs a multiple of its stages
                accumulation=4 if interleaved else accumulation,
                recompute=RECOMPUTE[(row + column) % 3],
                # Megatron averages the means of context-parallel ranks, which is the mean only by chance
                per_token="cp" in layout or (row + column) % 2 == 1,
                balance="running" if (row + column) % 4 < 2 else "micro",
            )
            is_fast = column == row % 3 and case.world_size == 2
            yield pytest.param(case, id=case.id, marks=() if is_fast else pytest.mark.slow)
    for case in FEATURES:
        is_fast = case.world_size == 2 and case.name not in SLOW
        marks = () if is_fast else pytest.mark.slow
        yield pytest.param(case, id=case.id, marks=marks)


CASES = list(_cases())


def test_every_pair_of_choices_is_tried():
    cases = [param.values[0] for param in CASES if param.values[0] not in FEATURES]
    free = [case for case in cases if case.vpp is None]
    assert {(c.name, c.recompute) for c in cases} == set(itertools.product(LAYOUTS, RECOMPUTE))
    choices = {
        "mbs": {1, 2},
        "accumulation": {1, 4},
        "recompute": set(RECOMPUTE),
        "per_token": {False, True},
        "balance": {"micro", "running"},
    }
    for one, other in itertools.combinations(choices, 2):
        seen = {(getattr(c, one), getattr(c, other)) for c in free}
        assert seen == set(itertools.product(choices[one], choices[other])), (one, other)


@pytest.fixture(scope="session")
def reference(ranks):
    """The seed and what the single process of a case trains with it, computed once."""
    found = {}

    def get(case):
        key = repr(case.reference)
        for seed in range(1, 50) if key not in found else ():
            (answer,) = ranks(1).run(_train, case=case.reference, seed=seed)
            if answer["margin"] > MARGIN:
                found[key] = seed, answer
                break
        assert key in found, f"no seed has every decision made by more than {MARGIN}"
        return found[key]

    return get


@pytest.fixture(scope="session")
def table(request):
    """Collects the rows of benchmarks/results/parity.md; printed at the end, and written with --parity-table."""
    rows = {}
    yield rows
    lines = _lines(rows)
    missing = [param.id for param in CASES if param.id not in rows]
    request.config.stash[PARITY_TABLE] = [*lines, f"{len(missing)} of {len(CASES)} rows not run"]
    path = request.config.getoption("--parity-table")
    if path and missing:
        request.config.stash[PARITY_TABLE].append(f"{path} is left as it is; not run: {missing}")
    elif path:
        _write(Path(path), lines)


def _train(case, seed):
    return training.train(case, seed=seed)


@pytest.mark.parametrize("case", CASES)
def test_layout_trains_the_model_of_one_process(case, ranks, reference, table):
    seed, want = reference(case)
    assert want["margin"] > MARGIN
    got = ranks(case.world_size).run(_train, case=case, seed=seed)
    seen = {
        "loss": max(
            abs(a - b) / abs(b)
            for answer in got
            if answer["losses"]
            for a, b in zip(answer["losses"], want["losses"], strict=True)
        ),
        "gradients": _deviation(want["gradients"], [answer["gradients"] for answer in got]),
        "weights": _deviation(want["weights"], [answer["weights"] for answer in got]),
        "metrics": max(
            _metrics_deviation(case, want["metrics"], answer["metrics"]) for answer in got
        ),
    }
    decisions = {}
    for answer in got:
        for key, chosen in answer["decisions"].items():
            _merge(decisions.setdefault(key, {}), chosen)
    assert decisions == want["decisions"]
    samples = set(range(case.accumulation * case.mbs * case.dp))
    for (_, kind), chosen in decisions.items():
        if kind == "pools":
            # what both got wrong alike would pass: a sample's place in training decides the sizes of its pools
            assert {sample for sample, _ in chosen} == samples
    assert {name: value for name, value in seen.items() if not value < TOLERANCE} == {}
    table[case.id] = (case, seen, sum(len(chosen) for chosen in decisions.values()))


def _merge(into, chosen):
    """Ranks that saw the same document or token must have decided alike."""
    for key, experts in chosen.items():
        assert into.setdefault(key, experts) == experts


def _deviation(want, parts):
    """Largest distance of a tensor, as a share of its norm; NaN where no rank held a part of it."""
    wanted, found = shards.join([want]), shards.join(parts)
    assert found.keys() == wanted.keys()
    return max(
        float((found[key] - value).norm() / value.norm().clamp(min=1e-12))
        for key, value in wanted.items()
    )


def _metrics_deviation(case, want, got):
    """Largest relative difference of what is logged; all ranks log the same."""
    config = case.config
    more = ["tokens_over_groups"] if config.get("moe_router_group_topk") else []
    more += ["experts_in_no_pool"] if config.get("moe_router_enable_expert_bias") else []
    assert got.keys() == want.keys() == {*LOGGED, *more, *case.logged_losses}
    return max(
        abs(got[name] - value) / max(abs(value), 1e-12) if value else abs(got[name])
        for name, value in want.items()
    )


def _lines(rows):
    lines = [
        "| layout | processes | recompute | micro-batch x accumulation | loss over | balance | loss | gradients | "
        "weights | metrics | decisions, all equal |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, seen, decisions in rows.values():
        lines.append(
            f"| {case.name} | {case.world_size} | {case.recompute} | {case.mbs} x {case.accumulation} | "
            f"{'tokens' if case.per_token else 'micro-batches'} | {case.balance} | {seen['loss']:.0e} | "
            f"{seen['gradients']:.0e} | {seen['weights']:.0e} | {seen['metrics']:.0e} | {decisions} |"
        )
    return lines


def _write(path, lines):
    begin, end = "<!-- parity table: begin -->", "<!-- parity table: end -->"
    text = path.read_text()
    before, after = text.split(begin)[0], text.split(end)[1]
    path.write_text("\n".join([before + begin, *lines, end + after]))


def test_the_results_have_every_row_and_the_page_eight_of_them():
    results = (ROOT / "benchmarks" / "results" / "parity.md").read_text()
    for param in CASES:
        case = param.values[0]
        row = f"| {case.name} | {case.world_size} | {case.recompute} | {case.mbs} x {case.accumulation} |"
        assert row in results, row
    header = _lines({})[0]
    page = (ROOT / "docs" / "parallelism.md").read_text()
    shown = page.split(header)[1].split("\n\n")[0].splitlines()[2:]
    assert len(shown) == 8
    assert set(shown) <= set(results.splitlines())
