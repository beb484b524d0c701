"""benchmarks/peers.py: what a peer kept is read off its module, unchanged code is demanded, and every peer runs."""

from __future__ import annotations

import importlib
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import words

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
GATE = "model.layers.{}.mlp.gate.weight"
KEPT = [[1, 4, 6], [0, 2, 7]]
SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SIZES |= {"shared_expert_intermediate_size": 16, "intermediate_size": 32, "max_position_embeddings": 64}


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("peer_processes")


@pytest.fixture
def peers(processes: Any) -> Any:
    return importlib.import_module("peers")


def test_it_wants_a_demo(peers: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peers.main(peers.Options(run=tmp_path / "run", output=tmp_path / "out", results=tmp_path))
    assert "make demo" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """Two layers of 8 router rows."""
    generator = torch.Generator().manual_seed(0)
    rows = {GATE.format(layer): torch.randn(8, 4, generator=generator) for layer in range(2)}
    (tmp_path / "parent").mkdir()
    save_file(rows, tmp_path / "parent" / "model.safetensors")
    return tmp_path / "parent"


def write_module(parent: Path, folder: Path, *, dtype: torch.dtype = torch.float32, shift: float = 0.0) -> Path:
    rows = load_file(parent / "model.safetensors")
    folder.mkdir()
    # in another order: a peer may sort by score
    kept = {GATE.format(n): (rows[GATE.format(n)][experts[::-1]] + shift).to(dtype) for n, experts in enumerate(KEPT)}
    save_file(kept, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_experts_are_read_off_the_router_rows(
    processes: Any, parent: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    assert processes.kept_in(write_module(parent, tmp_path / "module", dtype=dtype), parent=parent) == KEPT


def test_rows_of_another_model_are_an_error(processes: Any, parent: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="router row"):
        processes.kept_in(write_module(parent, tmp_path / "module", shift=0.1), parent=parent)


def git(folder: Path, *command: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *command], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_code_of_a_peer_must_be_that_of_the_commit(
    processes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = tmp_path / "sources" / "name"
    (clone / "used").mkdir(parents=True)
    (clone / "used" / "code.py").write_text("one\n")
    git(clone, "init", "--quiet")
    git(clone, "add", ".")
    git(clone, "-c", "user.name=n", "-c", "user.email=e", "commit", "--quiet", "--message", "m")
    commit = git(clone, "rev-parse", "HEAD")
    (tmp_path / "sources.txt").write_text(f"# comment\nname https://example.org/name {commit} used\n")
    monkeypatch.setattr(processes, "SCRIPTS", tmp_path)
    monkeypatch.setattr(processes, "INSTALLED", tmp_path)
    with pytest.raises(ValueError, match="make peers"):
        processes.commits()
    (tmp_path / ".installed").touch()
    assert processes.commits() == {"name": commit}
    (clone / "used" / "code.py").write_text("two\n")
    with pytest.raises(ValueError, match="make peers"):
        processes.commits()


def test_every_peer_has_script_packages_and_source(processes: Any) -> None:
    lines = (processes.SCRIPTS / "sources.txt").read_text().splitlines()
    cloned = {line.split()[0] for line in lines if not line.startswith("#")}
    for peer in processes.PEERS:
        assert (processes.SCRIPTS / peer.script[0]).is_file()
        assert (processes.SCRIPTS / f"{peer.packages}.txt").is_file()
        assert not peer.source or peer.source in cloned
    assert {peer.ours for peer in processes.PEERS} <= {own.ours for own in processes.OWN}
    names = [chooser.name for chooser in (*processes.PEERS, *processes.OWN)]
    assert len(set(names)) == len(names)


def test_a_process_is_measured(processes: Any, tmp_path: Path) -> None:
    # 64 MiB; this process has more, which must not count
    good = processes.run_measured(
        [sys.executable, "-c", "x = bytes(range(256)) * 2**18"], environment={}, log=tmp_path / "log"
    )
    assert good["cpu_seconds"] > 0
    assert 64 < good["peak_mib"] < 128 < resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert "error" not in good
    bad = [sys.executable, "-c", "raise SystemExit('first\\nlast')"]
    assert processes.run_measured(bad, environment={}, log=tmp_path / "log") == {"error": "last"}
    killed = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    assert processes.run_measured(killed, environment={}, log=tmp_path / "log").keys() == {"error"}


def test_every_piece_of_text_has_its_tokens(peers: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    corpus = tmp_path / "corpus"
    words.write_tokenizer(corpus / "tokenizer", size=96)
    (corpus / "calibration").mkdir()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(96, (100,), generator=generator, dtype=torch.int32)
    ends = torch.tensor([0, 33, 34, 100], dtype=torch.int32)
    save_file({"tokens": tokens, "cu_seqlens": ends}, corpus / "calibration" / "fr.safetensors")
    options = peers.Options(output=tmp_path / "out", seq_length=16, tokens=80)
    folder = peers.prepare_documents(corpus, options, "fr")
    content = json.loads((folder / "documents.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    assert content["tokens"]
    assert all(1 < len(piece) <= 16 for piece in content["tokens"])
    assert [tokenizer(text)["input_ids"] for text in content["texts"]] == content["tokens"]
    stored = load_file(folder / "documents.safetensors")
    assert stored["tokens"].tolist() == [token for piece in content["tokens"] for token in piece]
    assert stored["cu_seqlens"].diff().tolist() == [len(piece) for piece in content["tokens"]]


def test_the_table_compares_with_select(peers: Any) -> None:
    def row(model: str, names: tuple[str, str], increase: float, shared: float, ratio: float) -> dict[str, Any]:
        said = dict(zip(("project", "method"), names, strict=True)) | {"model": model}
        return said | {"increase": increase, "shared": shared, "cpu_ratio": ratio, "peak_mib": 10.0 * ratio}

    recorded = next(peer.project for peer in peers.PEERS if peer.is_recorded)
    numbers = {"emo": [(0.1, 1, 2), (0.3, 0.5, 4)], "standard": [(0.5, 0, 7), (0.5, 0, 8)]}
    rows = [row(model, ("theirs", "REAP"), *more) for model, found in numbers.items() for more in found]
    rows += [row(model, (peers.OURS, "reap"), 0.2, 1, 1) for model in numbers]
    rows += [row(model, (recorded, "EASY-EP"), 0.2, 1, 1) for model in numbers]
    theirs, ours, unmeasured = peers.page(rows).splitlines()[2:]
    assert theirs == "| theirs | REAP | +0.200 | 75% | +0.500 | 0% | 5.5 | 80 |"
    assert ours == "| emo_megatron | `reap` | +0.200 |  | +0.200 |  | 1 | 10 |"
    assert unmeasured == f"| {recorded} | EASY-EP | +0.200 | 100% | +0.200 | 100% |  |  |"
    assert peers.shared([[1, 2], [3, 4]], [[2, 5], [4, 3]]) == 0.75


def test_the_documentation_has_the_table_of_the_results(peers: Any) -> None:
    results = BENCHMARKS / "results"
    table = peers.page(json.loads((results / "peers.json").read_text(encoding="utf-8")))
    assert table in (results / "peers.md").read_text(encoding="utf-8")
    assert table in (BENCHMARKS.parent / "docs" / "retention.md").read_text(encoding="utf-8")


def test_results_of_other_settings_are_not_taken_up(
    peers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, output = tmp_path / "run", tmp_path / "out"
    run.mkdir()
    (run / "retention.json").write_text("[]")
    (run / "demo.json").write_text("{}")
    for name, value in {"commits": {}, "packages": {}, "describe": {}}.items():
        monkeypatch.setattr(peers, name, lambda value=value: value)
    monkeypatch.setattr(peers, "TITLES", {})
    peers.claim_results(output, {"keep": 16})
    with pytest.raises(ValueError, match="keep"):
        peers.main(peers.Options(run=run, output=output, results=tmp_path, keep=8))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "losses.json").write_text("{}")
    with pytest.raises(ValueError, match="--output"):
        peers.main(peers.Options(run=run, output=tmp_path / "other", results=tmp_path))


def write_tiny(folder: Path, *, renormalises: bool) -> None:
    """A Qwen2-MoE with random weights and a tokenizer."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen2MoeConfig(**SIZES, norm_topk_prob=renormalises, tie_word_embeddings=False)
    model = Qwen2MoeForCausalLM(config)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
        if name.endswith("gate.weight"):
            torch.nn.init.normal_(weight, std=1.0)
    # what bfloat16 can hold, so that peers that compute in bfloat16 start from the same weights
    model.bfloat16().float().save_pretrained(folder)
    words.write_tokenizer(folder, size=96)
    # the name that the older transformers of the peers know, as in the folders of `export`
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, with gates that are renormalised and gates that are not, and documents beside the models."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("peers")
    write_tiny(folder / "renormalised", renormalises=True)
    write_tiny(folder / "plain", renormalises=False)
    tokenizer = AutoTokenizer.from_pretrained(folder / "plain")
    drawn = [torch.randint(96, (32,)).tolist() for _ in range(64)]
    pieces = [piece for piece in drawn if tokenizer(tokenizer.decode(piece))["input_ids"] == piece]
    assert len(pieces) > 25
    content = {"tokens": pieces, "texts": [tokenizer.decode(piece) for piece in pieces]}
    (folder / "documents.json").write_text(json.dumps(content))
    ends = torch.tensor([0, *map(len, pieces)]).cumsum(0).int()
    flat = torch.tensor([token for piece in pieces for token in piece], dtype=torch.int32)
    save_file({"tokens": flat, "cu_seqlens": ends}, folder / "documents.safetensors")
    return folder


def chosen_by(peers: Any, tiny: Path, model: str, *choosers: Any) -> dict[str, list[list[int]]]:
    """The kept experts of every process, by its name."""
    task = peers.Task(model=tiny / model, documents=tiny, keep=3, seq_length=64)
    kept = {chooser.name: peers.choose(chooser, task, tiny / "chosen" / model)["kept"] for chooser in choosers}
    assert all([len(experts) for experts in layers] == [3, 3] for layers in kept.values())
    return kept


@pytest.fixture
def installed(processes: Any) -> Any:
    """The processes, if the packages of `make peers` are there."""
    if not (processes.INSTALLED / ".installed").exists():
        pytest.skip("needs .venv/peers: make peers installs it")
    return processes


@pytest.mark.slow
def test_peers_with_the_same_score_keep_the_same_experts(peers: Any, installed: Any, tiny: Path) -> None:
    kept = chosen_by(peers, tiny, "renormalised", *installed.PEERS, *installed.OWN)
    assert kept["cerebrasresearch-reap-reap"] == kept["emo_megatron-reap"]
    # llm-compressor prunes the first layer before it measures the second layer
    assert kept["llm-compressor-reap"][0] == kept["emo_megatron-reap"][0]
    # in bfloat16, which may change the order of two near scores
    assert kept["allenai-emo-greedy-by-layer"][0] == kept["emo_megatron-layerwise"][0]
    assert peers.shared(kept["allenai-emo-greedy-by-layer"], kept["emo_megatron-layerwise"]) >= 5 / 6


@pytest.mark.slow
def test_easy_ep_is_that_of_the_authors_of_emo_where_gates_are_not_renormalised(
    peers: Any, installed: Any, tiny: Path
) -> None:
    (theirs,) = (peer for peer in installed.PEERS if peer.source == "EMO" and peer.ours == "easy_ep")
    (ours,) = (own for own in installed.OWN if own.ours == "easy_ep")
    kept = chosen_by(peers, tiny, "plain", theirs, ours)
    assert peers.shared(kept[theirs.name], kept[ours.name]) >= 5 / 6


@pytest.mark.slow
def test_what_easyep_publishes_does_not_run(installed: Any, tiny: Path) -> None:
    task = installed.Task(model=tiny / "plain", documents=tiny, keep=3, seq_length=64)
    errors = installed.failures(task, tiny / "failures")
    assert "UnboundLocalError" in errors["pruning/expert_selection.py"]
    assert errors["pruning/inf_new.py"]
