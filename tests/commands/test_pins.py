"""What every command writes for one small model and a few documents: numbers and parsed fields, whatever writes them.

`python -m pytest tests/commands/test_pins.py --write-pins` writes tests/data/pins.json anew: for a change that users
are told of, never to make a test pass. Weights are made of integers, so tensors are compared by their bits, numbers
that were measured to 1e-5, and what is chosen exactly.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from support import pinned, words
from support.pinned import of_checkpoint, of_hugging_face, of_json, of_rows, of_statistics

from emo_megatron.checkpoint.reader import MegatronCheckpoint
from emo_megatron.checkpoint.writer import write_checkpoint
from emo_megatron.cli import main
from emo_megatron.experts.selection import load_selection

PINS = Path(__file__).resolve().parents[1] / "data" / "pins.json"
EXACT = ("--parity-tokens", "0")
A, B = "calibration/a.safetensors", "calibration/b.safetensors"
VALIDATION = "held-out/a.safetensors"
RUN = ("select", "--checkpoint", "source", "--data", A)
LAYERWISE = ("--method", "layerwise")
THREE = ("--keep", "3 routed")


class Files:
    """Files of commands, each made when it is first asked for, so that a test runs what leads to it and no more."""

    def __init__(self, root: Path) -> None:
        self.root = root
        tokenizer = words.write_tokenizer(root / "tokenizer", size=pinned.VOCAB)
        pinned.write_model(root / "source", tokenizer)
        for seed, (split, name) in enumerate((s, n) for s in ("calibration", "held-out") for n in "ab"):
            pinned.write_documents(root / split / f"{name}.safetensors", seed=seed)

    def call(self, command: str, *options: object, output: str) -> Path:
        """Run a command in the folder, where it names its files; where its output is."""
        arguments = [command, *map(str, options), "--output", output]
        with contextlib.chdir(self.root), mock.patch.dict(os.environ, {"EMO_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}):
            assert main(arguments) == 0, arguments
        return self.root / output

    @functools.cached_property
    def parent(self) -> Path:
        return self.call("import", "--folder", "source", *EXACT, output="parent")

    @functools.cached_property
    def hf(self) -> Path:
        return self.call("export", "--checkpoint", self.parent, *EXACT, output="hf")

    @functools.cached_property
    def emo(self) -> Path:
        how = ("--format", "emo", "--dtype", "bfloat16", "--shard-gb", 2e-5)
        return self.call("export", "--checkpoint", self.parent, *how, *EXACT, output="emo")

    @functools.cached_property
    def stats(self) -> Path:
        return self.call("stats", "--checkpoint", "source", "--data", A, "--outputs", output="a.safetensors")

    @functools.cached_property
    def some_stats(self) -> Path:
        some = ("--examples", 4, "--shots", 1, "--seed", 3, "--outputs", "--seq-length", 24)
        return self.call("stats", "--checkpoint", "source", "--data", B, *some, output="b.safetensors")

    @functools.cached_property
    def first(self) -> Path:
        return self.select("mean_prob", "4 routed")

    @functools.cached_property
    def second(self) -> Path:
        return self.call("select", "--stats", self.some_stats, "--keep", "4 routed", output="second.json")

    def select(self, method: str, keep: str, *, seed: int = 0) -> Path:
        chosen = ("--stats", self.stats, "--method", method, "--keep", keep, "--seed", seed)
        output = f"{method}-{keep.split()[0]}-{seed}.json"
        is_there = (self.root / output).exists()
        return self.root / output if is_there else self.call("select", *chosen, output=output)

    @functools.cached_property
    def modules(self) -> tuple[Path, Path]:
        """Changed as training might: experts and router of the one, experts and attention of the other."""
        one = self.call("extract", "--checkpoint", self.parent, "--selection", self.first, output="one")
        two = self.call("extract", "--checkpoint", self.parent, "--selection", self.second, output="two")
        return (
            self._trained(one, 1 / 64, ".experts.", ".router."),
            self._trained(two, 1 / 32, ".experts.", "self_attention"),
        )

    def _trained(self, module: Path, change: float, *kinds: str) -> Path:
        stored = MegatronCheckpoint(module)
        weights = {name: stored.read(name) + change * any(kind in name for kind in kinds) for name in stored.names}
        notes = {"selection.json": load_selection(module / "selection.json").save}
        return write_checkpoint(module.with_name(f"{module.name}-trained"), weights, args=stored.args, notes=notes)


def _by_method(files: Files) -> Any:
    return {m: of_json(files.select(m, "3 routed")) for m in ("mean_prob", "frequency", "easy_ep", "reap", "random")}


def _budget(files: Files) -> Any:
    size = ("--stats", files.stats, "--budget-mb", 0.06, "--bytes-per-parameter", 2)
    return of_json(files.call("select", *size, output="budget.json"))


def _composed(files: Files) -> Any:
    # of chance: the experts with the best scores are others
    both = ("--selections", files.select("random", "3 routed"), files.select("random", "3 routed", seed=2))
    stats = ("--stats", files.stats, files.some_stats)
    return {
        "union": of_json(files.call("compose", *both, *stats, output="union.json")),
        "few": of_json(files.call("compose", *both, *stats, *THREE, output="few.json")),
        "score": of_json(
            files.call("compose", *both, *stats, "--keep", "3 routed", "--rule", "score", output="score.json")
        ),
    }


def _composed_models(files: Files) -> Any:
    both = ("--modules", *files.modules, "--parent", files.parent, "--keep", "5 routed")
    both += ("--stats", files.stats, files.some_stats)
    average = ("--shared", "average", "--router", "average", "--conflict", "average")
    one = ("--shared", "two-trained", "--conflict", "one-trained")
    return {
        "average": of_checkpoint(files.call("compose", *both, *average, output="average")),
        "one": of_checkpoint(files.call("compose", *both, *one, output="one-of-two")),
    }


def _merged(files: Files) -> Any:
    one, two = files.modules
    parent = ("merge", "--parent", files.parent, "--modules")
    blended = ("--weights", "experts+router", "--blend", 0.25, "--conflict", "average")
    return {
        "experts": of_checkpoint(files.call(*parent, one, output="merged-experts")),
        "all": of_checkpoint(files.call(*parent, two, "--weights", "all", output="merged-all")),
        "blended": of_checkpoint(files.call(*parent, one, two, *blended, output="merged-both")),
    }


def _placed(files: Files) -> Any:
    stats = ("place", "--stats", files.stats, files.some_stats, "--ranks", 2)
    together = files.call(*stats, output="together.json")
    load = files.call(*stats, "--method", "load", "--max-imbalance", 1.3, output="load.json")
    reordered = files.call("reorder", "--checkpoint", files.parent, "--placement", together, output="reordered")
    return {"coactivation": of_json(together), "load": of_json(load), "reordered": of_checkpoint(reordered)}


def _measured(files: Files) -> Any:
    folders = ("--checkpoint", "source", "--data", "calibration", "--validation-data", "held-out")
    sizes = (
        "--keep",
        "37.5%",
        "3 routed",
        "--cross-sizes",
        "3 routed",
        "--methods",
        "mean_prob",
        "layerwise",
        "--validation-tokens",
        100,
    )
    return of_rows(files.call("retention", *folders, *sizes, output="retention"))


def _exported(files: Files) -> Any:
    measured = files.call(
        *(
            "retention",
            "--checkpoint",
            "source",
            "--data",
            "calibration",
            "--validation-data",
            "held-out",
            "--keep",
            "4 routed",
        ),
        output="for-card",
    )
    module, _ = files.modules
    card = ("--retention", measured / "retention.json", "--retention-domain", "a", "--name", "Module")
    return {
        "whole": of_hugging_face(files.hf),
        "module": of_hugging_face(files.call("export", "--checkpoint", module, *card, *EXACT, output="hf-module")),
        "emo": of_hugging_face(files.emo),
    }


def _imported(files: Files) -> Any:
    engine = ("--transformer-impl", "transformer_engine")
    return {
        "local": of_checkpoint(files.parent),
        "emo": of_checkpoint(files.call("import", "--folder", files.emo, *EXACT, output="of-emo")),
        "engine": of_checkpoint(files.call("import", "--folder", "source", *engine, *EXACT, output="engine")),
    }


def _task(files: Files) -> Any:
    yaml = pytest.importorskip("yaml")
    few = ("--documents", VALIDATION, "--name", "few", "--model", "source", "--num-tokens", 60)
    task = yaml.safe_load(files.call("eval-task", *few, output="tasks").joinpath("few.yaml").read_text())
    data = Path(task["dataset_kwargs"]["data_files"].pop("test"))
    return {"task": task, "texts": [json.loads(line)["text"] for line in data.read_text().splitlines()]}


def _megatron(files: Files) -> Any:
    model = ("--checkpoint", files.parent)
    validation_data = ("--validation-data", VALIDATION)
    rise = (*LAYERWISE, "--max-loss-increase", "1%")
    layout = ("--nproc-per-node", 2, "--expert-parallel", 2)
    sizes = ("--keep", "3 routed", "--methods", "reap")
    return {
        "stats": of_statistics(files.call("stats", *model, "--data", A, "--outputs", output="megatron.safetensors")),
        "select": of_json(
            files.call("select", *model, "--data", A, *validation_data, *rise, *layout, output="rise.json")
        ),
        "retention": of_rows(
            files.call("retention", *model, "--data", A, *validation_data, *sizes, output="of-megatron")
        ),
    }


COMMANDS: dict[str, Callable[[Files], Any]] = {
    "stats": lambda files: {"all": of_statistics(files.stats), "some": of_statistics(files.some_stats)},
    "merge-stats": lambda files: of_statistics(
        files.call("merge-stats", "--stats", files.stats, files.some_stats, output="both.safetensors")
    ),
    "select by a method": _by_method,
    "select layer by layer": lambda files: of_json(files.call(*RUN, *LAYERWISE, *THREE, output="layers.json")),
    "select for a budget": _budget,
    "select within a bound": lambda files: of_json(
        files.call(*RUN, "--validation-data", VALIDATION, "--max-loss-increase", "0.07", output="bound.json")
    ),
    "retention": _measured,
    "extract": lambda files: of_checkpoint(files.modules[0].with_name("one")),
    "compose": _composed,
    "compose checkpoints": _composed_models,
    "merge": _merged,
    "place and reorder": _placed,
    "export": _exported,
    "import": _imported,
    "eval-task": _task,
    "a model in Megatron": _megatron,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("pins"))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_writes_what_it_wrote(files: Files, name: str, request: pytest.FixtureRequest) -> None:
    # as JSON reads it: keys are texts, tuples are lists
    root = str(files.root)
    found = json.loads(json.dumps(COMMANDS[name](files)).replace(f"{root}/", ""))
    stored = json.loads(PINS.read_text()) if PINS.exists() else {}
    if request.config.getoption("--write-pins"):
        PINS.write_text(json.dumps(stored | {name: found}, indent=1) + "\n")
        return
    assert list(pinned.differences(found, stored[name])) == []


def test_an_export_is_what_was_imported(files: Files) -> None:
    """Both ways are exact: but for biases of zeros, the weights are the source's."""
    source, exported = map(pinned.of_safetensors, (files.root / "source", files.hf))
    assert {name: exported[name] for name in source} == source
