"""docs/modules.md keeps its word: its six commands, as they stand there, lead from a checkpoint to a served module."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from unittest import mock

import pytest
import torch
import tyro
from support import checkpoints, words

from emo_megatron import cli
from emo_megatron.commands import retention
from emo_megatron.experts.selection import load_selection
from emo_megatron.experts.stats import load_stats

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "modules.md").read_text()
RETENTION_PAGE = (ROOT / "docs" / "retention.md").read_text()
DISPATCH_PAGE = (ROOT / "docs" / "dispatch.md").read_text()
COMMANDS = re.findall(r"```bash\n(.*?)\n```", PAGE, flags=re.DOTALL)
RUN = Path("runs/demo")
VOCAB = 64


def documents(*, seed: int) -> list[torch.Tensor]:
    """Of random words, each with its end, as the demo's corpus stores them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 50, (8,), generator=generator).tolist()
    ends = torch.zeros(1, dtype=torch.int32)
    return [torch.cat([torch.randint(2, VOCAB, (n,), generator=generator).int(), ends]) for n in lengths]


def environment() -> dict[str, str]:
    scripts = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": os.pathsep.join([scripts, os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "EMO_DEVICE": "cpu",
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }


def call(command: str, root: Path) -> None:
    """Run a command of a page there: in this process, but for those that run Megatron in theirs."""
    *start, name = shlex.split(command)[:4]
    assert start == ["python", "-m", "emo_megatron"]
    with contextlib.chdir(root), mock.patch.dict(os.environ, environment()):
        if name == "export":
            subprocess.run(shlex.split(command), check=True, timeout=300)
        else:
            assert cli.main(shlex.split(command)[3:]) == 0, command


@pytest.fixture(scope="module")
def root(ranks, tmp_path_factory):
    """What `make demo` leaves, and what the first five commands make of it."""
    root = tmp_path_factory.mktemp("tutorial")
    tokenizer = words.write_tokenizer(root / RUN / "corpus" / "tokenizer", size=VOCAB)
    for split, seed in (("calibration", 1), ("validation", 11)):
        for place, domain in enumerate(("python", "french")):
            words.write_tokens(root / RUN / "corpus" / split / f"{domain}.safetensors", documents(seed=seed + place))
    sizes = {"num_kv_heads": 4, "num_experts": 16, "renormalise": False, "max_positions": 64}
    ranks(1).run(
        checkpoints.save_run,
        folder=str(root / RUN / "emo" / "checkpoint"),
        layout={},
        config={"num_moe_experts": 16},
        tokenizer=str(tokenizer),
        **sizes,
    )
    for command in COMMANDS[:5]:
        call(command, root)
    return root


def test_there_are_six_commands():
    names = [shlex.split(command)[:4][-1] for command in COMMANDS[:5]]
    assert names == ["stats", "select", "retention", "extract", "export"]
    assert len(COMMANDS) == 6
    assert COMMANDS[5] == "transformers serve runs/python/hf"


def test_commands_of_the_retention_page_are_commands():
    commands = re.findall(r"```bash\n(.*?)\n```", RETENTION_PAGE, flags=re.DOTALL)
    assert len(commands) == 2
    for command in commands:
        words_of = shlex.split(command)
        assert words_of[:4] == ["python", "-m", "emo_megatron", "retention"]
        options = tyro.cli(retention.Options, args=words_of[4:])
        assert options.keep
    assert options.compare == ()
    assert (ROOT / "docs" / "retention_methods.png").is_file()


@pytest.mark.slow
def test_commands_of_the_dispatch_page_reorder_the_experts(root):
    from emo_megatron.checkpoint.reader import MegatronCheckpoint
    from emo_megatron.experts.placement import load_placement
    from emo_megatron.mcore.dataset import write_indexed_dataset

    texts = [[2 + (7 * n + i) % (VOCAB - 2) for i in range(20 + n)] for n in range(20)]
    write_indexed_dataset(root / RUN / "corpus" / "train", texts, vocab_size=VOCAB)
    (block,) = re.findall(r"```bash\n(.*?)\n```", DISPATCH_PAGE, flags=re.DOTALL)
    commands = block.splitlines()
    assert [shlex.split(command)[3] for command in commands] == ["stats", "place", "reorder"]
    for command in commands:
        call(command, root)
    order = load_placement(root / "runs/ep4/placement.json").order
    old, new = map(MegatronCheckpoint, (root / RUN / "emo/checkpoint", root / "runs/ep4/checkpoint"))
    for number, of_layer in zip(old.moe_layers, order, strict=True):
        router = f"decoder.layers.{number - 1}.mlp.router.weight"
        assert torch.equal(new.read(router), old.read(router, of_layer))


def test_every_command_leaves_what_the_next_one_takes(root):
    stats = load_stats(root / "runs/python/stats.safetensors")
    selection = load_selection(root / "runs/python/selection.json")
    # a quarter of sixteen routed experts
    assert selection.num_kept == (4,) * len(stats.model.layers)
    best = stats.mean_probability_LE.topk(4).indices.sort(-1).values
    assert selection.experts == tuple(map(tuple, best.tolist()))
    assert "within 1.0%" in (root / "runs/python/retention/retention.txt").read_text()
    config = json.loads((root / "runs/python/hf/config.json").read_text())
    assert (config["model_type"], config["num_experts"]) == ("qwen2_moe", 4)
    assert "largest difference of a logit" in (root / "runs/python/hf/README.md").read_text()


def test_the_module_in_stock_transformers_loses_what_was_measured(root):
    """Command 3 restricts the router in Megatron; what command 5 wrote has the experts alone."""
    from transformers import AutoModelForCausalLM

    from emo_megatron.experts.calibration import Calibration, load_documents

    rows = json.loads((root / "runs/python/retention/retention.json").read_text())
    (row,) = [
        row
        for row in rows
        if row["method"] == "mean_prob"
        and (row["domain"], row["evaluated_on"], row["num_experts_kept"]) == ("python", "python", 4)
    ]
    model = AutoModelForCausalLM.from_pretrained(root / "runs/python/hf", dtype=torch.float32)
    validation_data = root / RUN / "corpus" / "validation" / "python.safetensors"
    nats, count = 0.0, 0
    for document in load_documents(validation_data, calibration=Calibration()).tokens:
        with torch.no_grad():
            logits_TV = model(document[None]).logits[0, :-1]
        nats += float(torch.nn.functional.cross_entropy(logits_TV, document[1:], reduction="sum"))
        count += document.numel() - 1
    assert row["tokens"] == count
    assert row["loss"] == pytest.approx(nats / count, rel=1e-5)
    card = (root / "runs/python/hf/README.md").read_text()
    assert f"{row['loss']:.3f}" in card


def test_the_module_is_served(root):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (asked,) = re.findall(r"curl (\S+) .* -d '(.*)'", PAGE)
    url = asked[0].replace(":8000", f":{port}")
    with (root / "serve.log").open("wb") as log:
        server = subprocess.Popen(
            [*shlex.split(COMMANDS[5]), "--port", str(port)],
            cwd=root,
            env=environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        answer = _post(url, asked[1].encode(), server=server, log=root / "serve.log")
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    (choice,) = answer["choices"]
    assert choice["text"].split()
    assert answer["usage"]["completion_tokens"] in range(1, 17)


def _post(url: str, body: bytes, *, server: subprocess.Popen, log: Path) -> dict:
    """The answer, as soon as the server gives one."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    deadline = time.monotonic() + 120
    while True:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return dict(json.load(response))
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{error}: {error.read()!r}\n{log.read_text()[-3000:]}") from None
        except urllib.error.URLError:
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)
