"""emo_megatron.hf.card: a card states the origin, the Selection and what was measured, and loads as one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import decoder

from emo_megatron.experts.selection import Selection
from emo_megatron.hf import card as card_module
from emo_megatron.hf.card import Origin, model_card, retained
from emo_megatron.report.rows import RetentionRow

SELECTION = Selection(
    num_experts=32,
    experts=((0, 3, 5, 7, 11, 30), (1, 2, 8, 9, 20, 31)),
    layers=(1, 2),
    method="mean_prob",
    seed=None,
    model="ab" * 32,
    data={"calibration": [{"file": "french.jsonl", "documents": 40, "tokens": 8192}]},
)
SERVED = json.loads((Path(card_module.__file__).parent / "serving.json").read_text())
ORIGIN = Origin(name="emo", iteration=800, samples=12800, seq_length=256, pools={"pool_min": 6})


def row(
    domain: str, evaluated_on: str, kept: int, method: str, loss: float, *, model: str = "emo", seed: int = 0
) -> RetentionRow:
    full = {"french": 3.25, "python": 2.0}[evaluated_on]
    return RetentionRow(
        model=model,
        domain=domain,
        evaluated_on=evaluated_on,
        keep_fraction=kept / 32,
        num_experts_kept=kept,
        method=method,
        loss=loss,
        loss_increase=loss - full,
        tokens=100,
        seed=seed,
        versions="test",
    )


ROWS = [
    row("french", "french", 32, "full", 3.25),
    row("python", "python", 32, "full", 2.0),
    row("french", "french", 6, "mean_prob", 3.375),
    row("french", "python", 6, "mean_prob", 9.0),
    row("french", "french", 6, "random", 4.5),
    row("french", "french", 12, "mean_prob", 3.3),
]


def test_the_card_says_where_the_module_comes_from_and_what_it_retains() -> None:
    from huggingface_hub import ModelCard

    card = model_card(
        decoder.architecture(num_layers=2),
        model_type="qwen2_moe",
        dtype="float32",
        origin=ORIGIN,
        selection=SELECTION,
        retention=retained(ROWS, kept=6, chosen_for="french")[:1],
        parity="a difference of 2.0e-06",
    )
    parsed = ModelCard(card)
    assert parsed.data.library_name == "transformers"
    assert "emo" in parsed.data.tags
    for told in (
        *("`emo`", "800 iterations", "3,276,800", "pool_min 6", "6 of 32", "keep-k 7", "`mean_prob`", "2.0e-06"),
        "french.jsonl (40 documents, 8,192 tokens)",
        "| 2 | 1 2 8 9 20 31 |",
        "| french | french | mean_prob | 6 | 3.375 | 3.250 | +0.125 | 4.500 |",
    ):
        assert told in card, told


def test_active_parameters_are_those_a_token_meets() -> None:
    model = decoder.architecture(num_layers=1, num_experts=10, top_k=2)
    card = model_card(model, model_type="emo", dtype="float32", origin=Origin(name="x", pools={}))
    attention, expert, rest = 4 * 32 * 32, 3 * 12 * 32, 2 * 80 * 32 + 10 * 32 + 3 * 32
    total = attention + 11 * expert + rest
    assert f"{total:,} parameters, {total - 8 * expert:,} of them active" in card


def test_measured_rows_are_the_modules_own() -> None:
    (own, random_loss), (other, _) = retained(ROWS, kept=6, chosen_for="french")
    assert (own.evaluated_on, own.loss, random_loss) == ("french", 3.375, 4.5)
    assert (other.evaluated_on, other.domain, other.loss) == ("python", "french", 9.0)
    assert [(r.evaluated_on, r.num_experts_kept, loss) for r, loss in retained(ROWS)] == [
        ("french", 6, 4.5),
        ("french", 12, None),
    ]
    assert retained(ROWS, kept=5) == []


def test_rows_of_a_module_are_of_the_method_that_chose_its_experts() -> None:
    rows = [*ROWS, row("french", "french", 6, "reap", 3.75)]
    for method, losses in {"mean_prob": [3.375, 9.0], "reap": [3.75], "layerwise": []}.items():
        found = retained(rows, kept=6, method=method, chosen_for="french")
        assert [own.loss for own, _ in found] == losses, method
    # with all methods, the rows of a table differ by the method
    card = model_card(
        decoder.architecture(), model_type="emo", dtype="float32", origin=ORIGIN, retention=retained(rows, kept=6)
    )
    for told in ("| french | mean_prob | 6 | 3.375 |", "| french | reap | 6 | 3.750 |", "`mean_prob`, `reap`"):
        assert told in card, told


def test_the_loss_of_random_experts_is_the_mean_over_choices_of_the_same_model() -> None:
    others = [row("french", "french", 6, "random", 8.0, model="standard"), row("french", "french", 6, "random", 5.5)]
    for rows in ([*ROWS, *others], [*others, *ROWS]):
        assert retained(rows, kept=6)[0][1] == 5.0


@pytest.mark.parametrize("is_module", [False, True])
def test_a_module_without_pools_of_its_own_may_have_been_trained_with_them(is_module: bool) -> None:
    origin = Origin(name="x", pools={}, is_module=is_module)
    card = model_card(decoder.architecture(), model_type="emo", dtype="bfloat16", origin=origin)
    assert ("standard mixture" in card) != is_module
    assert "No retention was measured" in card
    assert "were not compared" in card


@pytest.mark.parametrize(("dense_layers", "dtype"), [((), "bfloat16"), ((0,), "float32")])
def test_the_card_names_the_engines_that_run_the_model_and_what_they_cast(
    dense_layers: tuple[int, ...], dtype: str
) -> None:
    dense = {"dense_layers": dense_layers, "dense_hidden": 32} if dense_layers else {}
    model = decoder.architecture(num_layers=2, **dense)
    card = model_card(model, model_type="qwen2_moe", dtype=dtype, origin=Origin(name="x", pools={}))
    # SGLang reads no mlp_only_layers
    assert ("mlp_only_layers" in card) == bool(dense_layers)
    assert ("SGLang run this model" in card) == (not dense_layers)
    assert ("--dtype float32" in card) == (dtype == "float32")
    assert f"at most {model.num_experts}, the number of routed experts" in card
    for engine in SERVED["engines"]:
        runs = engine["name"] != "llama-cpp-python" and (engine["runs_dense_layers"] or not dense_layers)
        assert (f"{engine['name']} {engine['version']} on a CPU" in card) == runs


@pytest.mark.parametrize("has_tokenizer", [False, True])
def test_the_card_of_a_file_for_llama_cpp_is_about_llama_cpp(has_tokenizer: bool) -> None:
    from huggingface_hub import ModelCard

    origin = Origin(name="x", pools={})
    card = model_card(
        decoder.architecture(), model_type="gguf", dtype="float32", origin=origin, has_tokenizer=has_tokenizer
    )
    assert ModelCard(card).data.library_name == "gguf"
    assert ("llama-cli" in card) == has_tokenizer
    assert ("no tokenizer" in card) != has_tokenizer
    assert not [other for other in ("vLLM", "SGLang", "AutoModel") if other in card]
    (engine,) = (engine for engine in SERVED["engines"] if engine["name"] == "llama-cpp-python")
    assert f"llama-cpp-python {engine['version']} on a CPU" in card
