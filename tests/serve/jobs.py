"""What the scripts of all engines share: read a job, run its models one after another, write what the engine computed.

The job is JSON with "models" (name -> folder or file), "texts" (or their token ids), "new_tokens" and "vocab_size". The
result has "versions" and "answers": model -> one answer per text, with the tokens of the text, the log-probabilities of
the whole vocabulary from the second token on, and the greedy tokens. Only the standard library is imported here,
because an engine has its own environment.
"""

import contextlib
import json
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def run_job(package: str, answers_of: Callable[[str, list[Any], int, int], list[dict[str, Any]]]) -> None:
    """Run the job sys.argv[1] and write sys.argv[2] after every model: an engine can end the process.

    Args:
        package: name of the installed package of the engine.
        answers_of: runs one model; takes its folder or file, the texts, the new tokens and the size of the vocabulary.
    """
    job = json.loads(Path(sys.argv[1]).read_text())
    result: dict[str, Any] = {"versions": {"engine": version(package)}, "answers": {}}
    for name in ("torch", "transformers"):
        # an engine without torch has neither
        with contextlib.suppress(PackageNotFoundError):
            result["versions"][name] = version(name)
    for model, path in job["models"].items():
        result["answers"][model] = answers_of(path, job["texts"], job["new_tokens"], job["vocab_size"])
        Path(sys.argv[2]).write_text(json.dumps(result))
