"""Every parallel layout trains the model that one process trains: losses, gradients, weights, decisions."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from support import PARITY_TABLE, shards, training
from support.layouts import FEATURES, LAYOUTS, MTP, PADDED, SLOW
from support.micro_batches import places_with_a_vote
from support.training import Case

TOLERANCE = 1e-5
"""Of a tensor's norm; float32."""
LOSS_TOLERANCE = 1e-6
"""Of a step's loss."""
LOGGED = (
    *("pool_size", "document_entropy"),
    *("experts_per_document", "token_entropy", "load_imbalance", "nonfinite_tokens"),
)
ROOT = Path(__file__).resolve().parents[2]

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
        if key not in found:
            found[key] = training.reference(ranks(1).run, case)
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


@pytest.mark.slow
def test_megatrons_own_loss_of_prediction_depends_on_the_layout(ranks):
    """Decisions of the first step do not, for which the table's exact loss is therefore no excuse."""
    case = Case(dp=2, accumulation=2, per_token=True, is_exact=False, **PADDED, **MTP)
    seed, want = training.reference(ranks(1).run, case)
    got = ranks(2).run(training.train, case=case, seed=seed)
    assert _of_first_step(case, training.decisions_of(got)) == _of_first_step(case, want["decisions"])
    assert got[0]["losses"][0] == pytest.approx(want["losses"][0], rel=TOLERANCE)
    assert got[0]["losses"][2] != pytest.approx(want["losses"][2], rel=10 * TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_layout_trains_the_model_of_one_process(case, ranks, reference, table):
    seed, want = reference(case)
    got = ranks(case.world_size).run(training.train, case=case, seed=seed)
    seen = {
        "loss": max(
            abs(a - b) / abs(b)
            for answer in got
            if answer["losses"]
            for a, b in zip(answer["losses"], want["losses"], strict=True)
        ),
        **{
            kind: max(shards.deviations(want[kind], [answer[kind] for answer in got]).values())
            for kind in ("gradients", "weights")
        },
        "metrics": max(_metrics_deviation(case, want["metrics"], answer["metrics"]) for answer in got),
    }
    if case.config.get("mtp_num_layers"):
        logged = [answer["further_losses"] for answer in got if answer["further_losses"]]
        further = max(_relative(want["further_losses"], losses) for losses in logged)
        seen["metrics"] = max(seen["metrics"], further)
    decisions = training.decisions_of(got)
    assert decisions == want["decisions"]
    _check_keys(case, decisions)
    limits = dict.fromkeys(seen, TOLERANCE) | {"loss": LOSS_TOLERANCE}
    assert {name: value for name, value in seen.items() if not value < limits[name]} == {}
    table[case.id] = (case, seen, sum(len(chosen) for chosen in decisions.values()))


def _check_keys(case, decisions):
    """What all ranks and the single process got wrong alike would pass without."""
    in_a_step = case.accumulation * case.mbs * case.dp
    num_samples = training.STEPS * in_a_step
    first = in_a_step if case.pool.get("pool_delay_samples") else 0
    assert {layer for layer, _ in decisions} == set(case.depths)
    for (layer, kind), chosen in decisions.items():
        if kind == "pools":
            # a sample's place in training decides the sizes of its pools
            assert {sample for sample, _ in chosen} == set(range(first, num_samples))
        else:
            depth = case.depths[layer]
            assert set(chosen) == places_with_a_vote(case, num_samples=num_samples, depth=depth)


def _of_first_step(case, decisions):
    num_samples = case.accumulation * case.mbs * case.dp
    return {
        (layer, kind): {
            key: found
            for key, found in chosen.items()
            if (key[0] if kind == "pools" else key // training.SEQ) < num_samples
        }
        for (layer, kind), chosen in decisions.items()
    }


def _metrics_deviation(case, want, got):
    """Largest relative difference of what is logged; all ranks log the same."""
    config = case.config
    more = ["tokens_over_groups"] if config.get("moe_router_group_topk") else []
    more += ["experts_in_no_pool"] if config.get("moe_router_enable_expert_bias") else []
    assert want.keys() == {*LOGGED, *more, *case.logged_losses}
    return _relative(want, got)


def _relative(want, got):
    assert got.keys() == want.keys()
    return max(
        abs(got[name] - value) / max(abs(value), 1e-12) if value else abs(got[name]) for name, value in want.items()
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
