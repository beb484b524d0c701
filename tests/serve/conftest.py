"""Exported models, and what the engines and transformers compute; an engine that is not installed is left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support import served_models
from support.engines import ENGINES, Agreement, Answers, Engine, compare, reference, token_ids
from support.ranks import Ranks
from support.served_models import CHANGED, DENSE, FULL, MODULE, SIZES, TEXTS, TIED, path_of

Compare = Callable[[Engine, str, str], Agreement]


@pytest.fixture(scope="session", params=ENGINES, ids=lambda engine: engine.name)
def engine(request: pytest.FixtureRequest) -> Engine:
    return request.param.required()


@pytest.fixture(scope="session")
def models(ranks: Callable[[int], Ranks], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the exports, and with a module that has another weight."""
    folder = tmp_path_factory.mktemp("served")
    ranks(1).run(served_models.export, folder=str(folder))
    served_models.change_a_weight(folder)
    return folder


@pytest.fixture(scope="session")
def answers(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Engine], Answers]:
    """What an engine computes on all models; each engine runs once."""
    found: dict[Engine, Answers] = {}

    def get(engine: Engine) -> Answers:
        if engine not in found:
            # the model that an engine may not run comes last
            names = [name for name in (FULL, MODULE, TIED, CHANGED, DENSE) if engine.format != "gguf" or name != DENSE]
            paths = {name: path_of(models, name, format=engine.format) for name in names}
            texts = token_ids(models / FULL, TEXTS) if engine.format == "gguf" else TEXTS
            work = tmp_path_factory.mktemp("job")
            found[engine] = engine.run(paths, texts, vocab_size=SIZES["vocab_size"], work=work)
        return found[engine]

    return get


@pytest.fixture(scope="session")
def agreement(models: Path, answers: Callable[[Engine], Answers]) -> Compare:
    """Compares a model in an engine with a model in transformers."""
    wanted = {}

    def get(engine: Engine, model: str, in_transformers: str) -> Agreement:
        if in_transformers not in wanted:
            wanted[in_transformers] = reference(models / in_transformers, TEXTS)
        got = answers(engine)
        assert model in got.answers, f"{engine.name} failed at the model {model!r}:\n{got.log}"
        return compare(got.answers[model], wanted[in_transformers])

    return get
