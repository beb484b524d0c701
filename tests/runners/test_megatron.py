"""Statistics and loss of a Megatron model: the same under every layout, and what the definitions say."""

from __future__ import annotations

import functools

import pytest
import torch
from support import runner_checks

LAYOUTS = {
    "dp2": {"world": 2},
    "ep2": {"world": 2, "expert_model_parallel_size": 2},
    "tp2": {"world": 2, "tensor_model_parallel_size": 2},
    "pp2": {"world": 2, "pipeline_model_parallel_size": 2},
    "tp2-ep2-pp2": {
        "world": 4,
        "tensor_model_parallel_size": 2,
        "expert_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
    },
    "dp2-ep4": {"world": 4, "expert_model_parallel_size": 4},
}
KEPT = ((True, False, True, True, False, False, True, False),) * 3


@pytest.fixture(scope="module")
def single(ranks):
    """What one process measures."""
    return functools.cache(lambda **options: ranks(1).run(runner_checks.measure, layout={}, **options)[0])


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in ("count_LE", "coactivation_LEE", "num_tokens", "tokens"):
        assert torch.equal(torch.as_tensor(got[name]), torch.as_tensor(want[name])), name
    for name in want.keys() - {"count_LE", "coactivation_LEE"}:
        torch.testing.assert_close(torch.as_tensor(got[name]), torch.as_tensor(want[name]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(sizes, id=name, marks=[pytest.mark.slow] if sizes["world"] > 2 else [])
        for name, sizes in LAYOUTS.items()
    ],
)
def test_every_layout_measures_what_one_process_does(ranks, single, layout):
    world = layout["world"]
    sizes = {name: size for name, size in layout.items() if name != "world"}
    for answer in ranks(world).run(runner_checks.measure, layout=sizes):
        assert_same(answer, single())


@pytest.mark.parametrize("layout", [{}, LAYOUTS["dp2"], LAYOUTS["ep2"], LAYOUTS["tp2"], LAYOUTS["pp2"]])
def test_weights_are_told_apart_by_any_value_and_not_by_the_layout(ranks, layout):
    sizes = {name: size for name, size in layout.items() if name != "world"}
    (want,) = ranks(1).run(runner_checks.marks, layout={})
    assert want[0] == want[2] != want[1]
    for marks in ranks(layout.get("world", 1)).run(runner_checks.marks, layout=sizes):
        if sizes.get("tensor_model_parallel_size", 1) == 1:
            assert marks == want
        else:
            assert marks[0] == marks[2] != marks[1]


def test_the_sums_are_what_the_definitions_say(ranks, single):
    """Document by document, token by token: also no document sees another one, and padding counts nowhere."""
    want = ranks(1).run(runner_checks.by_definition)[0]
    for name, tensor in want.items():
        torch.testing.assert_close(single()[name].double(), tensor, rtol=1e-4, atol=1e-6)


def test_experts_that_are_left_out_are_not_used_and_cost_something(ranks, single):
    restricted = single(allowed=KEPT)
    assert (restricted["count_LE"][~torch.tensor(KEPT)] == 0).all()
    assert (restricted["count_LE"].sum(-1) == 2 * restricted["tokens"]).all()
    # what a router would like to use shows all the same
    assert (restricted["probability_LE"] > 0).all()
    torch.testing.assert_close(restricted["probability_LE"][0], single()["probability_LE"][0])
    assert abs(restricted["nats"] - single()["nats"]) > 1e-4
    layout = {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 2}
    assert_same(ranks(2).run(runner_checks.measure, layout=layout, allowed=KEPT)[1], restricted)


def test_tokens_gathered_by_everyone_and_experts_outnumbering_the_width(ranks):
    """The allgather dispatcher; and lengths that go home in several messages."""
    config = {"hidden_size": 4, "num_attention_heads": 2, "moe_token_dispatcher_type": "allgather"}
    want = ranks(1).run(runner_checks.measure, layout={}, config=config)[0]
    layout = {"expert_model_parallel_size": 2}
    assert_same(ranks(2).run(runner_checks.measure, layout=layout, config=config)[0], want)


def test_without_looking_at_outputs_nothing_is_said_of_them(single):
    plain = single(outputs=False)
    assert plain.keys() == single().keys() - {"gated_norm_LE", "residual_change_LE"}
    assert torch.equal(plain["count_LE"], single()["count_LE"])


def test_expert_tensor_parallelism_is_refused_where_outputs_are_needed(ranks, single):
    layout = {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2}
    answer = ranks(2).run(runner_checks.measure, layout=layout, outputs=False)[0]
    assert_same(answer, single(outputs=False))
    with pytest.raises(RuntimeError, match="--expert-tensor-parallel-size 1; got 2"):
        ranks(2).run(runner_checks.measure, layout=layout)


def test_documents_without_a_predicted_token_have_no_loss(ranks):
    with pytest.raises(RuntimeError, match="two tokens or more"):
        ranks(1).run(runner_checks.loss_of_nothing)


def test_files_are_looked_at_by_one_rank(ranks):
    first, second = ranks(2).run(runner_checks.looks)
    assert first == {"found": 0, "raised": "of rank 0", "looked": 2}
    assert second == {"found": 0, "raised": "of rank 0", "looked": 0}


def test_an_interrupted_select_goes_on_on_every_rank(ranks, tmp_path):
    layout = {"pipeline_model_parallel_size": 2}
    answers = ranks(2).run(runner_checks.interrupted_select, folder=str(tmp_path), layout=layout)
    for answer in answers:
        assert answer["is same"]
        assert answer["stopped"] == 5
        assert answer["again"] == answer["whole"] - 5 > 0
    assert (tmp_path / "s.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "s.json", "whole.json"]


@pytest.mark.parametrize("allowed", [None, KEPT], ids=["all", "some"])
def test_losses_of_documents_are_those_of_each_alone(ranks, allowed):
    found = ranks(1).run(runner_checks.losses_of_documents, allowed=allowed)[0]
    at_once = found["at once"]
    torch.testing.assert_close(at_once.float(), found["alone"], rtol=1e-5, atol=1e-5)
    assert at_once.unique().numel() == at_once.numel()
    assert at_once.sum().item() == pytest.approx(found["all"].nats * found["all"].num_tokens)


PREDICTION = {"mtp_num_layers": 2}
REPEATED = PREDICTION | {"mtp_use_repeated_layer": True}


@pytest.mark.parametrize(
    "layout",
    [
        {"world": 2, "pipeline_model_parallel_size": 2, "expert_model_parallel_size": 1},
        {"world": 2, "tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
    ],
    ids=["pp2", "tp2-ep2"],
)
def test_prediction_is_measured_alike_under_every_layout(ranks, single, layout):
    sizes = {name: size for name, size in layout.items() if name != "world"}
    for answer in ranks(layout["world"]).run(runner_checks.measure, layout=sizes, config=PREDICTION):
        assert_same(answer, ranks(1).run(runner_checks.measure, layout={}, config=PREDICTION)[0])


@pytest.mark.parametrize("config", [PREDICTION, REPEATED], ids=["a layer per depth", "one layer"])
def test_prediction_counts_what_it_learns_from(ranks, single, config):
    """Document by document: a position counts at a depth if its document has the token that far ahead."""
    measured = ranks(1).run(runner_checks.measure, layout={}, config=config)[0]
    want = ranks(1).run(runner_checks.by_definition, config=config)[0]
    lengths = [len(piece) for document in runner_checks.documents() for piece in document.split(24)]
    counted = [2 * sum(max(0, length - depth) for length in lengths) for depth in (0, 0, 0, 1, 2)]
    if config is REPEATED:
        counted[3:] = [sum(counted[3:])]
    assert measured["count_LE"].sum(-1).tolist() == counted
    for name, tensor in want.items():
        assert len(tensor) == len(counted)
        torch.testing.assert_close(measured[name].double(), tensor, rtol=1e-4, atol=1e-6)
    # the decoder and the loss, which is of the next token, are those of the model without prediction
    for name in ("probability_LE", "count_LE", "gated_norm_LE"):
        torch.testing.assert_close(measured[name][:3], single()[name])
    assert measured["nats"] == pytest.approx(single()["nats"], abs=1e-6)


def test_left_out_experts_of_prediction_change_no_loss(ranks):
    everything, some = ((True,) * 8,), ((True, False, True, True, False, False, True, False),)
    measured, full = (
        ranks(1).run(runner_checks.measure, layout={}, config=PREDICTION, allowed=everything * 3 + rows)[0]
        for rows in (some * 2, everything * 2)
    )
    assert (measured["count_LE"][3:][:, ~torch.tensor(some[0])] == 0).all()
    assert (full["count_LE"][3:][:, ~torch.tensor(some[0])] > 0).any()
    assert measured["nats"] == full["nats"]


def test_weights_of_prediction_are_told_by_name_and_number(ranks):
    name = "mtp_model_layer.mlp.experts.local_experts.2.linear_fc2.weight"
    places = [{"layer": 0, "name": f"mtp.layers.1.{name}"}]
    layout = {"expert_model_parallel_size": 2}
    told = ranks(2).run(runner_checks.said_of, layout=layout, places=places, value=NAN, **PREDICTION)
    stored = "mtp.layers.1.transformer_layer.mlp.experts.experts.linear_fc2.weight (layer 6, expert {})"
    # the first rank with such a weight is told to all
    assert told[0] == told[1]
    assert stored.format(2) in told[0][0]["opened"]


NAN = float("nan")
EXPERT = "decoder.layers.{}.mlp.experts.experts.linear_fc2.weight (layer {}, expert {})"


@pytest.mark.parametrize(
    "layout", [{"expert_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}], ids=["ep2", "pp2"]
)
def test_a_weight_on_whichever_rank_is_told_to_all_by_the_models_numbers(ranks, layout):
    places = [{"layer": 4, "expert": 6}, {"layer": 2, "expert": 1}, {"name": "output_layer.weight"}]
    first, second = ranks(2).run(runner_checks.said_of, layout=layout, places=places, value=NAN)
    assert first == second
    names = [EXPERT.format(3, 4, 6), EXPERT.format(1, 2, 1), "output_layer.weight"]
    for answers, name in zip(first, names, strict=True):
        assert answers.keys() == {"opened"}
        assert f"{name} holds nan" in answers["opened"]


def test_every_kind_of_weight_is_told_by_its_name_in_the_checkpoint(ranks):
    places = {
        "decoder.layers.2.mlp.router.weight (layer 3, expert 5)": (3, "mlp.router.weight"),
        "decoder.layers.2.mlp.shared_experts.linear_fc1.weight (layer 3)": (3, "mlp.shared_experts.linear_fc1.weight"),
        "decoder.layers.0.self_attention.linear_qkv.weight (layer 1)": (1, "self_attention.linear_qkv.weight"),
        "decoder.layers.3.mlp.linear_fc1.layer_norm_weight (layer 4)": (4, "pre_mlp_layernorm.weight"),
        "embedding.word_embeddings.weight": (0, "embedding.word_embeddings.weight"),
        "decoder.final_layernorm.weight": (0, "decoder.final_layernorm.weight"),
    }
    (answers,) = ranks(1).run(
        runner_checks.said_of,
        layout={},
        places=[{"layer": layer, "name": name} for layer, name in places.values()],
        value=-float("inf"),
    )
    for answer, name in zip(answers, places, strict=True):
        assert f"{name} holds -inf" in answer["opened"]


def test_an_overflow_of_finite_weights_is_told_where_it_arises(ranks):
    places = [{"layer": 3, "expert": 5}, {"layer": 4, "expert": 6}, {"name": "output_layer.weight"}]
    (answers,) = ranks(1).run(runner_checks.said_of, layout={}, places=places, value=3e38)
    inside, last, logits = answers
    assert inside.keys() == {"statistics", "outputs", "loss", "documents"}
    for told in inside.values():
        assert "layer 3, expert 5: gated_norm_LE" in told
    # the routers see nothing of what the last experts put out
    assert last.keys() == {"outputs", "loss", "documents"}
    for told in last.values():
        assert "layer 4, expert 6: gated_norm_LE" in told
    assert logits.keys() == {"loss", "documents"}
    for told in logits.values():
        assert "logits" in told
    layout = {"expert_model_parallel_size": 2}
    of_ranks = ranks(2).run(runner_checks.said_of, layout=layout, places=places[:2], value=3e38)
    assert of_ranks[0] == of_ranks[1]
    assert "layer 3, expert 5: gated_norm_LE" in of_ranks[1][0]["loss"]
    assert "layer 4, expert 6: gated_norm_LE" in of_ranks[1][1]["loss"]
