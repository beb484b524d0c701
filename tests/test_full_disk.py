"""A disk that fills, in every command that writes: one line with the file, exit status 2, and nothing half written.

The limit of a file's size stands in for the disk: the system refuses the very write that goes beyond it.
"""

from __future__ import annotations

import resource
import shutil
import warnings
from pathlib import Path

import pytest
from support import lora, pinned, words
from support.running import limited

from emo_megatron import cli

DOMAINS = ("french", "perl")
RESUMABLE = ("stats", "retention", "layerwise")
"""They keep what they have measured, in whole files."""


def run(command: str, *arguments: object) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cli.main([command, *map(str, arguments)])


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model, its Megatron checkpoint, two modules of it, and the files that go with them."""
    root = tmp_path_factory.mktemp("disk")
    pinned.write_model(root / "hf", words.write_tokenizer(root / "tokenizer", size=pinned.VOCAB))
    lora.train(root / "hf", root / "adapter", steps=1, target_modules=["q_proj"])
    for first, kind in enumerate(("data", "validation_data")):
        for place, domain in enumerate(DOMAINS):
            pinned.write_documents(root / kind / f"{domain}.safetensors", seed=2 * first + place)
    texts = ("the experts route the token", "the module keeps the experts")
    words.write_texts(root / "texts.jsonl", texts)
    assert run("import", "--folder", root / "hf", "--output", root / "megatron", *NO_PARITY) == 0
    for domain in DOMAINS:
        stats, kept = root / f"{domain}.safetensors", root / f"{domain}.json"
        data = root / "data" / f"{domain}.safetensors"
        assert run("stats", "--checkpoint", root / "hf", "--data", data, "--output", stats) == 0
        assert run("select", "--stats", stats, "--keep", "3 routed", "--output", kept) == 0
        module = ("--checkpoint", root / "megatron", "--selection", kept)
        assert run("extract", *module, "--output", root / f"{domain}-module") == 0
    stats = root / "french.safetensors"
    assert run("place", "--stats", stats, "--ranks", "2", "--output", root / "place.json") == 0
    for folder in DOMAINS:
        write_texts(root / "corpus" / folder, folder)
    write_texts(root / "corpus" / "third", "third")
    return root


def write_texts(folder: Path, word: str) -> None:
    folder.mkdir(parents=True)
    for number in range(12):
        (folder / f"{number}.txt").write_text(f"{word} {number} " * 20)


NO_PARITY = ("--parity-tokens", "0")
COMMANDS = {
    "import": "import --folder hf --output OUT --parity-tokens 0",
    "import an adapter": "import --folder hf --adapter adapter --output OUT --parity-tokens 0",
    "export": "export --checkpoint megatron --tokenizer tokenizer --output OUT --parity-tokens 0",
    "export a module": "export --checkpoint french-module --output OUT --parity-tokens 0",
    "extract": "extract --checkpoint megatron --selection french.json --output OUT",
    "merge": "merge --parent megatron --modules french-module perl-module --output OUT --conflict average",
    "compose": "compose --modules french-module perl-module --parent megatron --stats french.safetensors "
    "perl.safetensors --output OUT",
    "compose files": "compose --selections french.json perl.json --stats french.safetensors "
    "perl.safetensors --output OUT",
    "reorder": "reorder --checkpoint megatron --placement place.json --output OUT",
    "place": "place --stats french.safetensors --ranks 4 --output OUT",
    "stats": "stats --checkpoint hf --data data/perl.safetensors --output OUT",
    "merge-stats": "merge-stats --stats french.safetensors perl.safetensors --output OUT",
    "select": "select --stats french.safetensors --keep 25% --output OUT",
    "layerwise": "select --checkpoint hf --data data/perl.safetensors --method layerwise --keep 25% --output OUT",
    "retention": "retention --checkpoint hf --data data --validation-data validation_data --keep 37.5% --output OUT",
    "eval-task": "eval-task --documents texts.jsonl --name task --model hf --output OUT",
}


def files_in(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_one_line_and_leaves_nothing(
    name: str, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.chdir(here)
    output = tmp_path / "new" / "out"
    command = [word.replace("OUT", str(output)) for word in COMMANDS[name].split()]
    assert run(*command) == 0
    sizes = files_in(tmp_path)
    assert sizes
    # the first write fails, and then that of the largest file
    for limit in (0, max(sizes.values()) - 1):
        shutil.rmtree(tmp_path / "new")
        capsys.readouterr()
        with limited(resource.RLIMIT_FSIZE, limit):
            assert run(*command) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        told = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(told) == 1, said
        assert "file size limit" in told[0]
        assert str(output) in told[0]
        left = files_in(tmp_path)
        assert not [file for file in left if "unfinished" in file]
        if name not in RESUMABLE:
            assert list(tmp_path.iterdir()) == []
        output.mkdir(parents=True, exist_ok=True)
