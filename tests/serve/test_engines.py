"""The engines compute the exported models: log-probabilities and greedy text are those of transformers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.engines import TOLERANCE, Agreement, Answers, Engine
from support.served_models import CHANGED, DENSE, MODELS, MODULE

pytestmark = pytest.mark.serve

Compare = Callable[[Engine, str, str], Agreement]


@pytest.mark.parametrize("model", MODELS)
def test_the_engine_computes_the_export(engine: Engine, model: str, agreement: Compare) -> None:
    if model == DENSE and not engine.runs_dense_layers:
        pytest.skip(f"{engine.name} does not run models with dense layers")
    assert agreement(engine, model, model).is_whole


def test_a_changed_weight_is_seen(engine: Engine, agreement: Compare) -> None:
    assert agreement(engine, CHANGED, MODULE).max_difference > 10 * TOLERANCE
    assert agreement(engine, CHANGED, CHANGED).is_whole


def test_dense_layers_are_another_model_where_the_pages_say_so(
    engine: Engine, agreement: Compare, answers: Callable[[Engine], Answers]
) -> None:
    """If this fails, the engine has learned to read `mlp_only_layers`, and model cards warn without need."""
    if engine.runs_dense_layers or engine.format == "gguf":
        pytest.skip(f"{engine.name} reads mlp_only_layers, or export refuses such a model")
    assert DENSE in answers(engine).answers
    assert agreement(engine, DENSE, DENSE).max_difference > 1
