"""emo_megatron.commands.eval_task: lm-eval runs an exported model on validation text, offline."""

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

from emo_megatron.commands import eval_task
from emo_megatron.hf.tokenizer import Tokenizer

TEXTS = [
    "the experts of the document route the token",
    "document and pool keeps experts",
    "the module keeps the experts and the pool of the document",
]
ANY = [
    "[1, 2, 3]",
    '{"a": null}',
    "{{text}} {% raw %} {# note #}",
    "a\u2028b\x85c",
    "nul \0 here",
    "\U0001f600 end",
    "2024-01-01",
    " \n the ",
    "1.5",
]
"""Texts that read as something else."""


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    tokenizer = Tokenizer(words.write_tokenizer(tmp_path / "tokenizer"))
    folder = decoder.write_folder(tmp_path / "model", extra_config=tokenizer.ids)
    tokenizer.save(folder)
    return folder


@pytest.mark.slow
def test_lm_eval_measures_the_model_as_its_definition_does(exported: Path, tmp_path: Path) -> None:
    # a folder with a name that is a pattern, and documents of which some are lists, templates or numbers
    tasks = tmp_path / "run [1]*? #%'\\" / "tasks"
    texts = [*TEXTS, *ANY]
    eval_task.run(
        eval_task.Options(
            documents=words.write_texts(tmp_path / "validation_data.jsonl", texts),
            name="held-out",
            model=exported,
            output=tasks,
        )
    )
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"),
        *("--model_args", f"pretrained={exported},dtype=float32", "--batch_size", "2"),
        *("--tasks", "held-out", "--include_path", tasks),
        *("--output_path", tmp_path / "results.json"),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    run = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **offline, "HF_HOME": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": ""},
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
    for text in texts:
        # the end-of-document token stands before a text, as in packed training
        *tokens, end = Tokenizer(exported).encode(text)
        logits_TV = decoder.logits(model, decoder.random_weights(model), torch.tensor([end, *tokens[:-1]]))
        nats -= float(logits_TV.log_softmax(-1)[range(len(tokens)), tokens].sum())
        num_bytes += len(text.encode())
    assert found == pytest.approx(nats / num_bytes / math.log(2), rel=1e-4)


@pytest.mark.parametrize(
    ("texts", "what"),
    [
        (["", "<|endoftext|>", "<|endoftext|><|endoftext|>"], "holds no text"),
        (["2024-01-01", "2024-01-02 10:00:00"], "dates"),
    ],
)
def test_documents_that_make_no_task_are_refused(exported: Path, tmp_path: Path, texts: list[str], what: str) -> None:
    documents = words.write_texts(tmp_path / "d.jsonl", texts)
    tasks = tmp_path / "tasks"
    with pytest.raises(ValueError, match=rf"d\.jsonl.*{what}"):
        eval_task.run(eval_task.Options(documents=documents, name="t", model=exported, output=tasks))
    assert not tasks.exists()


def test_what_is_left_out_is_counted_and_what_is_taken_stays(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = words.write_texts(tmp_path / "d.jsonl", ["", *ANY, "<|endoftext|>", "unheard words"])
    options = {"documents": documents, "model": exported, "output": tmp_path}
    eval_task.run(eval_task.Options(name="all", **options))
    assert capsys.readouterr().err.startswith("2 documents")
    lines = (tmp_path / "all.jsonl").read_bytes().decode().rstrip("\n").split("\n")
    # word by word the tokenizer knows hardly any of it
    assert [json.loads(line)["text"] for line in lines] == [*ANY, "unheard words"]
    eval_task.run(eval_task.Options(name="few", num_tokens=1, **options))
    (line,) = (tmp_path / "few.jsonl").read_text().splitlines()
    assert json.loads(line)["text"] == ANY[0]


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"num_tokens": 0}, "--num-tokens"),
        ({"name": "a b"}, "--name"),
        # names that lm-eval would read as something else
        *(({"output": Path("out") / name}, "--output") for name in ("a::b", "$HOME", "x${HOME}")),
    ],
)
def test_options_that_cannot_be_are_refused(exported: Path, tmp_path: Path, monkeypatch, changes, flag: str) -> None:
    monkeypatch.chdir(tmp_path)
    documents = words.write_texts(tmp_path / "d.jsonl", TEXTS)
    given = {"documents": documents, "name": "t", "model": exported, "output": Path("out")}
    with pytest.raises(ValueError, match=flag):
        eval_task.run(eval_task.Options(**given | changes))
    assert not Path("out").exists()


@pytest.mark.parametrize("name", ["[a]*?", '\U0001f600\u2028 "quoted" \\', "#%20 '", "{{x}}"])
def test_a_task_names_its_documents_in_any_folder(exported: Path, tmp_path: Path, name: str) -> None:
    datasets = pytest.importorskip("datasets")
    yaml = pytest.importorskip("yaml")
    task = eval_task.run(
        eval_task.Options(
            documents=words.write_texts(tmp_path / "d.jsonl", ANY), name="t", model=exported, output=tmp_path / name
        )
    )
    stored = yaml.safe_load(task.read_text())
    cache = {"cache_dir": str(tmp_path / "cache"), "split": stored["test_split"]}
    loaded = datasets.load_dataset(stored["dataset_path"], **stored["dataset_kwargs"], **cache)
    assert list(loaded["text"]) == ANY


def test_tokens_become_text_again(exported: Path, tmp_path: Path) -> None:
    ids = [torch.tensor(Tokenizer(exported).encode(text)).int() for text in TEXTS]
    options = eval_task.Options(
        documents=words.write_tokens(tmp_path / "validation_data.safetensors", ids),
        name="tokens",
        model=exported,
        output=tmp_path / "tasks",
        num_tokens=10,
    )
    task = eval_task.run(options)
    lines = (tmp_path / "tasks" / "tokens.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == TEXTS[:2]
    assert task.read_text().startswith('task: "tokens"\n')


def test_ids_with_gaps_are_tokens(exported: Path, tmp_path: Path) -> None:
    file = exported / "tokenizer.json"
    stored = json.loads(file.read_text())
    vocabulary = stored["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    stored["model"]["vocab"] = vocabulary | {last: 70}
    file.write_text(json.dumps(stored))
    ids = [torch.tensor([70, 2, 7, 0]).int()]
    documents = words.write_tokens(tmp_path / "validation_data.safetensors", ids)
    eval_task.run(eval_task.Options(documents=documents, name="gaps", model=exported, output=tmp_path / "tasks"))
    (line,) = (tmp_path / "tasks" / "gaps.jsonl").read_text().splitlines()
    assert json.loads(line)["text"].startswith(last)


@pytest.mark.parametrize("name", ["french.jsonl", "french.yaml"])
def test_no_task_and_no_documents_are_written_over(tmp_path: Path, name: str) -> None:
    mine = tmp_path / name
    mine.write_text("mine")
    # refused before documents or tokenizer are looked at: neither is there
    options = eval_task.Options(documents=tmp_path / "no.jsonl", name="french", model=tmp_path / "no", output=tmp_path)
    with pytest.raises(ValueError, match=f"{name} exists; give another path"):
        eval_task.run(options)
    assert mine.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [mine]
