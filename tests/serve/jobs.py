"""What the scripts of all engines share: read a job, run its models one after another, write what the engine computed.

The job is JSON with "models" (name -> folder), "texts" and "new_tokens". The result has "versions" and "answers":
model -> one answer per text, with the tokens of the text, the log-probabilities of the whole vocabulary from the second
token on, and the greedy tokens. Only the standard library is imported here, because an engine has its own environment.
"""

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any


def run_job(package: str, answers_of: Callable[[str, list[str], int, int], list[dict[str, Any]]]) -> None:
    """Run the job sys.argv[1] and write sys.argv[2] after every model: an engine can end the process.

    Args:
        package: name of the installed package of the engine.
        answers_of: runs one model; takes the folder, the texts, the new tokens and the size of the vocabulary.
    """
    job = json.loads(Path(sys.argv[1]).read_text())
    names = {"engine": package, "torch": "torch", "transformers": "transformers"}
    result: dict[str, Any] = {"versions": {name: version(of) for name, of in names.items()}, "answers": {}}
    for model, folder in job["models"].items():
        size = json.loads(Path(folder, "config.json").read_text())["vocab_size"]
        result["answers"][model] = answers_of(folder, job["texts"], job["new_tokens"], size)
        Path(sys.argv[2]).write_text(json.dumps(result))
