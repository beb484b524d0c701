"""Serving engines in environments of their own: start one on a model, and compare the engine with transformers."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
NEW_TOKENS = 16
"""Greedy tokens after each text."""
TOLERANCE = 1e-4
"""Largest difference of a log-probability in float32."""
LIMIT = 1800
"""Seconds for all models in one engine: minutes on a quiet machine."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """An engine that runs exported models.

    Attributes:
        name: as the project's pages write the name.
        environment: folder in .venv that `make test-serve` installs the engine into.
        script: file in tests/serve that runs texts through the engine.
        runs_dense_layers: whether the engine computes models with dense layers.
        format: the --format of the exports that the engine reads.
    """

    name: str
    environment: str
    script: str
    runs_dense_layers: bool
    format: Literal["qwen2_moe", "gguf"] = "qwen2_moe"

    @property
    def folder(self) -> Path:
        return ROOT / ".venv" / self.environment

    @property
    def is_installed(self) -> bool:
        """Whether the installation was finished."""
        return (self.folder / ".installed").is_file()

    def required(self) -> Engine:
        """The engine itself; the test is skipped if the engine is not installed."""
        if not self.is_installed:
            pytest.skip(f"{self.name} is not installed in .venv/{self.environment}: make test-serve installs it")
        return self

    def run(self, models: Mapping[str, Path], texts: Sequence[Any], *, vocab_size: int, work: Path) -> Answers:
        """Run all models in one process of the engine's environment.

        Args:
            models: name -> exported folder or file. An engine that fails ends the process: the models after it have no
                answer.
            texts: prompts, or their token ids.
            vocab_size: of all models.
            work: folder for the job, the result and the log of the engine.
        """
        job, result = work / "job.json", work / "result.json"
        folders = {name: str(folder) for name, folder in models.items()}
        content = {"models": folders, "texts": texts, "new_tokens": NEW_TOKENS, "vocab_size": vocab_size}
        job.write_text(json.dumps(content))
        return Answers(**self.answer(self.script, job, result, work=work))

    def answer(self, script: str, job: Path, result: Path, *, work: Path) -> dict[str, Any]:
        """The JSON that a script of tests/serve makes of a job, in the engine's environment; "log" is added."""
        command = [self.folder / "bin" / "python", ROOT / "tests" / "serve" / script, job, result]
        with (work / "log.txt").open("w") as log:
            # one thread: as in all tests. No GPU: the engines are compared on a CPU
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
            subprocess.run(command, cwd=work, env=environment, stdout=log, stderr=log, timeout=LIMIT, check=False)
        end = (work / "log.txt").read_text(errors="replace")[-6000:]
        assert result.exists(), f"{self.name} failed:\n{end}"
        return json.loads(result.read_text()) | {"log": end}


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What an engine computed.

    Attributes:
        versions: of the engine, and of torch and transformers if the engine has them.
        answers: model -> answers, text by text; a model that the engine did not run is missing.
        log: the end of the engine's output.
    """

    versions: dict[str, str]
    answers: dict[str, list[dict[str, Any]]]
    log: str


ENGINES = (
    Engine(name="vLLM", environment="serve-vllm", script="run_vllm.py", runs_dense_layers=True),
    Engine(name="SGLang", environment="serve-sglang", script="run_sglang.py", runs_dense_layers=False),
    Engine(
        name="llama-cpp-python",
        environment="serve-llama-cpp",
        script="run_llama_cpp.py",
        runs_dense_layers=False,
        format="gguf",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """An engine compared with transformers on the texts of one model.

    Attributes:
        positions: prompt tokens with log-probabilities, over all texts.
        max_difference: largest difference of a log-probability of any token of the vocabulary.
        argmax_equal: positions whose most likely token is the same.
        texts: number of texts.
        greedy_equal: texts after which all greedy tokens are the same.
    """

    positions: int
    max_difference: float
    argmax_equal: int
    texts: int
    greedy_equal: int

    @property
    def is_whole(self) -> bool:
        """Whether the engine computes what transformers computes."""
        return (
            self.max_difference <= TOLERANCE and self.argmax_equal == self.positions and self.greedy_equal == self.texts
        )


def token_ids(model: Path, texts: tuple[str, ...]) -> list[list[int]]:
    """The tokens of texts in transformers, with the tokenizer in an exported folder."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return [tokenizer(text)["input_ids"] for text in texts]


def reference(model: Path, texts: tuple[str, ...]) -> list[dict[str, Any]]:
    """What transformers computes in float32, text by text, in the form of an engine's answers."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    answers = []
    for tokens in token_ids(model, texts):
        ids_1T = torch.tensor([tokens])
        # eos_token_id None: the greedy text has NEW_TOKENS tokens always
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": NEW_TOKENS}
        with torch.no_grad():
            rows_TV = network(ids_1T).logits[0, :-1].log_softmax(-1)
            generated = network.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), **options)
        answers.append(
            {"tokens": tokens, "log_probabilities": rows_TV.tolist(), "generated": generated[0, len(tokens) :].tolist()}
        )
    return answers


def compare(got: list[dict[str, Any]], want: list[dict[str, Any]]) -> Agreement:
    """An engine's answers and the reference's. Both must have read the same tokens."""
    assert [answer["tokens"] for answer in got] == [answer["tokens"] for answer in want]
    rows, wanted = (torch.cat([torch.tensor(a["log_probabilities"]) for a in answers]) for answers in (got, want))
    differences = (rows - wanted).abs()
    return Agreement(
        positions=len(wanted),
        # a value that is not a number is the largest difference
        max_difference=float(differences.nan_to_num(nan=float("inf")).max()),
        argmax_equal=int((rows.argmax(-1) == wanted.argmax(-1)).sum()),
        texts=len(want),
        greedy_equal=sum(a["generated"] == b["generated"] for a, b in zip(got, want, strict=True)),
    )
