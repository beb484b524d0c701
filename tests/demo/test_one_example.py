"""What the paper found of calibration data, on the model of `make demo`: one example chooses the experts.

Needs a model that has learned domains, which no test trains: the demo's finished run, `make demo`, or EMO_DEMO=folder.
So neither `make test` nor continuous integration runs this; `make test-all` after `make demo` does.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
from support.pretraining import ROOT

from emo_megatron.experts.calibration import Calibration, load_documents
from emo_megatron.experts.select import select_by_stats, select_random
from emo_megatron.runners.huggingface import HuggingFaceRunner, load_hugging_face

DEMO = Path(os.environ.get("EMO_DEMO", ROOT / "runs" / "demo"))
MANY = Calibration(num_tokens=4096)
ONE = Calibration(num_examples=1, seed=1)
FEW_SHOT = Calibration(num_examples=1, num_shots=2, seed=1)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (DEMO / "retention.json").exists(), reason=f"no finished demo in {DEMO}: make demo"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "emo"
    # in a process of its own: Megatron on the CPU changes torch for the rest of the process
    step = ("export", "--checkpoint", DEMO / "emo" / "checkpoint", "--output", folder)
    command = (sys.executable, "-m", "emo_megatron", *step)
    tokenizer = ("--tokenizer", DEMO / "corpus" / "tokenizer")
    subprocess.run([str(part) for part in (*command, *tokenizer)], check=True, cwd=ROOT)
    return HuggingFaceRunner(load_hugging_face(folder), seq_length=256, micro_batch_size=8)


def test_one_example_chooses_as_well_as_many(model):
    """Mean over domains of what a quarter of the experts loses; a random quarter loses far more."""
    rises = {"many": [], "one": [], "few-shot": [], "random": []}
    experts = model.metadata.num_experts
    keep = experts // 4
    for path in sorted((DEMO / "corpus" / "calibration").glob("*.safetensors")):
        validation_data = load_documents(DEMO / "corpus" / "validation" / path.name, calibration=MANY)
        full = model.loss(validation_data.tokens).nats
        masks = {"random": select_random(num_layers=len(model.metadata.layers), num_experts=experts, keep=keep, seed=0)}
        for name, calibration in (("many", MANY), ("one", ONE), ("few-shot", FEW_SHOT)):
            documents = load_documents(path, calibration=calibration)
            stats = model.statistics(documents.tokens, outputs=False)
            masks[name] = select_by_stats(stats, method="mean_prob", keep=keep)
        for name, mask in masks.items():
            rises[name].append(model.loss(validation_data.tokens, allowed_LE=mask).nats - full)
    means = {name: fmean(values) for name, values in rises.items()}
    assert means["one"] < means["many"] + 0.05, means
    assert means["few-shot"] < means["many"] + 0.05, means
    assert means["one"] < means["random"] / 2, means
