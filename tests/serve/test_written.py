"""The results of `make test-serve` are written, after all other tests of this folder and only if none of them failed.

The name of this file comes last in the folder, because pytest runs files in the order of their names.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.engines import ENGINES, Agreement, Answers, Engine
from support.serve_results import PACKAGED, RESULTS, packaged, results, write
from support.served_models import DENSE, MODELS

pytestmark = pytest.mark.serve

Compare = Callable[[Engine, str, str], Agreement]


def test_the_results_are_written(
    request: pytest.FixtureRequest, agreement: Compare, answers: Callable[[Engine], Answers]
) -> None:
    if not request.config.getoption("--write-serving"):
        pytest.skip("the results are written with --write-serving, which make test-serve passes")
    assert request.session.testsfailed == 0, "the results are written only if no test failed"
    rows = {}
    assert all(engine.is_installed for engine in ENGINES), "results of all engines are written together"
    for engine in ENGINES:
        run = [model for model in MODELS if model != DENSE or engine.runs_dense_layers]
        rows[engine] = {model: agreement(engine, model, model) for model in run}
    assert all(found.is_whole for models in rows.values() for found in models.values())
    content = results({engine: answers(engine).versions for engine in rows}, rows)
    write(content, RESULTS)
    write(packaged(content), PACKAGED)
