"""emo_megatron.modules.hf.evaluation_task: lm-eval runs an exported model on held-out text, offline."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import decoder, words

from emo_megatron.modules.hf.evaluation_task import EvaluationTaskOptions, write_evaluation_task
from emo_megatron.modules.hf.folder import FORMATS, write_folder
from emo_megatron.modules.hf.tokenizer import Tokenizer

TEXTS = [
    "the experts of the document route the token",
    "document and pool keeps experts",
    "the module keeps the experts and the pool of the document",
]


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    model = decoder.architecture()
    folder = tmp_path / "model"
    folder.mkdir()
    tokenizer = Tokenizer(words.write_tokenizer(tmp_path / "tokenizer"))
    write_folder(
        folder,
        format=FORMATS["qwen2_moe"],
        architecture=model,
        read=decoder.random_weights(model).__getitem__,
        dtype=torch.float32,
        extra_config=tokenizer.ids,
    )
    tokenizer.save(folder)
    return folder


def test_lm_eval_measures_the_model_as_its_definition_does(exported: Path, tmp_path: Path) -> None:
    documents = tmp_path / "held_out.jsonl"
    documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    write_evaluation_task(
        EvaluationTaskOptions(
            documents=documents, name="held-out", model=exported, output=tmp_path / "tasks"
        )
    )
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"),
        *("--model_args", f"pretrained={exported},dtype=float32", "--batch_size", "2"),
        *("--tasks", "held-out", "--include_path", tmp_path / "tasks"),
        *("--output_path", tmp_path / "results.json"),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    run = subprocess.run(
        [str(part) for part in command],
        env={
            **os.environ,
            **offline,
            "HF_HOME": str(tmp_path / "cache"),
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    (file,) = tmp_path.glob("results*.json")
    found = json.loads(file.read_text())["results"]["held-out"]["bits_per_byte,none"]
    nats, num_bytes = 0.0, 0
    model = decoder.architecture()
    for text in TEXTS:
        # the end-of-document token stands before a text, as in packed training
        *tokens, end = Tokenizer(exported).encode(text)
        logits_TV = decoder.logits(
            model, decoder.random_weights(model), torch.tensor([end, *tokens[:-1]])
        )
        nats -= float(logits_TV.log_softmax(-1)[range(len(tokens)), tokens].sum())
        num_bytes += len(text.encode())
    assert found == pytest.approx(nats / num_bytes / math.log(2), rel=1e-4)


def test_tokens_become_text_again(exported: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    ids = [Tokenizer(exported).encode(text) for text in TEXTS]
    bounds = [0, *torch.tensor([len(i) for i in ids]).cumsum(0).tolist()]
    flat = torch.tensor([token for document in ids for token in document], dtype=torch.int32)
    save_file(
        {"tokens": flat, "cu_seqlens": torch.tensor(bounds, dtype=torch.int32)},
        tmp_path / "held_out.safetensors",
    )
    options = EvaluationTaskOptions(
        documents=tmp_path / "held_out.safetensors",
        name="tokens",
        model=exported,
        output=tmp_path / "tasks",
        num_tokens=10,
    )
    task = write_evaluation_task(options)
    lines = (tmp_path / "tasks" / "tokens.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == TEXTS[:2]
    assert task.read_text().startswith('task: "tokens"\n')


def test_what_is_no_name_is_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--name must be letters.*got 'a b'"):
        write_evaluation_task(
            EvaluationTaskOptions(
                documents=tmp_path / "x.jsonl", name="a b", model=exported, output=tmp_path
            )
        )
    assert not list(tmp_path.glob("*.yaml"))


@pytest.mark.parametrize("name", ["french.jsonl", "french.yaml"])
def test_no_task_and_no_documents_are_written_over(tmp_path: Path, name: str) -> None:
    mine = tmp_path / name
    mine.write_text("mine")
    # refused before documents or tokenizer are looked at: neither is there
    options = EvaluationTaskOptions(
        documents=tmp_path / "no.jsonl", name="french", model=tmp_path / "no", output=tmp_path
    )
    with pytest.raises(ValueError, match=f"{name} exists; name one that does not"):
        write_evaluation_task(options)
    assert mine.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [mine]
