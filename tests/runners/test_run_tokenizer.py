"""A text is read one way, from a Megatron checkpoint and from its export, and nothing is asked of a network for it."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import decoder, network, words
from support.ranks import Ranks

TEXTS = ("the experts of the document", "", "route route unheard the token", "and")
VOCAB = decoder.SMALL["vocab_size"]
NAME = "some-owner/some-tokenizer"
"""Of a folder here, and maybe of a tokenizer on a hub."""


def there_and_back(folder: str) -> dict[str, Any]:
    """Import a folder, store a run's relative name of its tokenizer, export again; on a machine that is alone."""
    from emo_megatron import cli
    from emo_megatron.checkpoint.reader import MegatronCheckpoint
    from emo_megatron.checkpoint.writer import write_checkpoint
    from emo_megatron.hf.tokenizer import Tokenizer

    root = Path(folder)
    os.chdir(root)
    source = decoder.write_folder(Path("an-owner/a-model"))
    Tokenizer(words.write_tokenizer(Path(NAME))).save(source)
    with network.closed(root / "tried") as tried:
        parity = ("--parity-tokens", "8")
        codes = [cli.main(["import", "--folder", str(source), "--output", "imported", *parity])]
        checkpoint = MegatronCheckpoint(root / "imported")
        weights = {name: checkpoint.read(name) for name in checkpoint.names}
        for name, stored in (("run", NAME), ("elsewhere", "another-owner/not-here")):
            # Megatron compares kinds of tokenizers where there is a vocabulary's file
            flags = {"tokenizer_model": stored, "vocab_file": "vocabulary-of-the-run"}
            args = argparse.Namespace(**vars(checkpoint.args) | flags)
            write_checkpoint(root / name, weights, args=args)
        for name in ("run", "elsewhere"):
            to = ("--output", f"{name}-exported", *parity)
            codes.append(cli.main(["export", "--checkpoint", name, *to]))
        return {"codes": codes, "tried": tried()}


@pytest.fixture(scope="module")
def models(ranks: Callable[[int], Ranks], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints `run` and `elsewhere`, and the export of the first."""
    folder = tmp_path_factory.mktemp("models")
    (done,) = ranks(1).run(there_and_back, folder=str(folder))
    # what is not here is said, and not looked for
    assert done == {"codes": [0, 0, 2], "tried": []}
    assert not (folder / "elsewhere-exported").exists()
    return folder


def test_both_formats_of_a_model_measure_the_same_documents(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from emo_megatron import cli
    from emo_megatron.experts.stats import load_stats

    def stats(name: str) -> int:
        data = ("--data", str(data_file), "--output", str(tmp_path / f"{name}.safetensors"))
        return cli.main(["stats", "--checkpoint", name, *data])

    # the run's relative name is one from here
    monkeypatch.chdir(models)
    data_file = words.write_texts(tmp_path / "texts.jsonl", TEXTS)
    with network.closed(tmp_path / "tried") as tried:
        assert [stats("run"), stats("run-exported")] == [0, 0]
        assert tried() == []
    (one,), (other,) = (load_stats(tmp_path / f"{name}.safetensors").data for name in ("run", "run-exported"))
    for part in ("sha256", "tokens", "documents", "end_of_document"):
        assert one[part] == other[part]
    assert (one["documents"], one["end_of_document"]) == (4, 0)
    capfd.readouterr()
    files = [str(tmp_path / f"{name}.safetensors") for name in ("run", "run-exported")]
    assert cli.main(["merge-stats", "--stats", *files, "--output", str(tmp_path / "m")]) == 2
    assert "same documents" in capfd.readouterr().err


def opened(folder: str, models: str) -> dict[str, str]:
    """What is said of texts that a checkpoint has no tokenizer for, before its model is loaded."""
    from emo_megatron.runners.open import open_megatron

    os.chdir(models)
    data = words.write_texts(Path(folder) / "texts.jsonl", ("1 2 3",))
    said = {}
    with network.closed(Path(folder) / "tried") as tried:
        null = ("--tokenizer-type", "NullTokenizer", "--vocab-size", "80")
        for case, (name, named, flags) in {
            "elsewhere": ("elsewhere", None, ()),
            "none": ("run", None, null),
            "two": ("run", Path(NAME), null),
        }.items():
            with pytest.raises(ValueError, match="--tokenizer") as error:
                open_megatron(
                    Path(name),
                    layout=(),
                    more=flags,
                    texts=[data],
                    tokenizer=named,
                    seq_length=None,
                    micro_batch_size=4,
                )
            said[case] = str(error.value)
        return said | {"tried": str(tried())}


def test_texts_without_a_tokenizer_are_refused_at_once(
    models: Path, ranks: Callable[[int], Ranks], tmp_path: Path
) -> None:
    (said,) = ranks(1).run(opened, folder=str(tmp_path), models=str(models))
    assert "another-owner/not-here" in said["elsewhere"]
    assert "texts.jsonl" in said["none"]
    assert "--tokenizer-type" in said["two"]
    assert said["tried"] == "[]"


def test_a_folder_is_studied_on_a_machine_that_is_alone(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from emo_megatron import cli

    monkeypatch.chdir(models)
    data, validation_data = (words.write_texts(tmp_path / f"{n}.jsonl", TEXTS[n:]) for n in range(2))
    model = ("--checkpoint", "run-exported", "--tokenizer", NAME, "--data", str(data))
    more = ("--validation-data", str(validation_data))
    with network.closed(tmp_path / "tried") as tried:
        for step, how in {
            "select": ("--keep", "50%", "--method", "layerwise"),
            "retention": ("--keep", "50%", *more),
        }.items():
            assert cli.main([step, *model, *how, "--output", str(tmp_path / step)]) == 0
        task = ("--documents", str(data), "--name", "t", "--output", str(tmp_path / "tasks"))
        assert cli.main(["eval-task", "--model", "run-exported", *task]) == 0
        assert tried() == []


def readings(folder: str) -> dict[str, Any]:
    """Tokens of the texts, and their sources, as a Megatron run reads them and as its export is read."""
    import dataclasses

    from emo_megatron.experts.calibration import Calibration, load_documents
    from emo_megatron.hf.tokenizer import Tokenizer
    from emo_megatron.runners.run_tokenizer import text_tokenizer, tokenizer_args

    root = Path(folder)
    data = words.write_texts(root / "texts.jsonl", TEXTS)
    found = {}
    for place, (name, how) in enumerate(words.SPECIAL.items()):
        path = str(words.write_tokenizer(root / str(place), **how))
        Tokenizer(path).save(root / f"{place} exported")
        hf = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": path}
        sft = {"tokenizer_type": "SFTTokenizer", "sft_tokenizer_prompt_format": "identity"}
        sides = {
            "run": text_tokenizer(tokenizer_args(argparse.Namespace(**hf), []), named=None, vocab_size=VOCAB),
            # a kind that is Megatron's own, which adds what the tokenizer adds
            "own": text_tokenizer(tokenizer_args(argparse.Namespace(**hf | sft), []), named=None, vocab_size=VOCAB),
            # flags of the command line win
            "given": text_tokenizer(
                tokenizer_args(
                    argparse.Namespace(tokenizer_type="NullTokenizer"),
                    ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", path],
                ),
                named=None,
                vocab_size=VOCAB,
            ),
            "named": text_tokenizer(
                argparse.Namespace(tokenizer_type="NullTokenizer"), named=Path(path), vocab_size=VOCAB
            ),
            "export": Tokenizer(root / f"{place} exported"),
        }
        found[name] = {
            side: dataclasses.asdict(
                load_documents(data, calibration=Calibration(), tokenizer=tokenizer, vocab_size=VOCAB)
            )
            for side, tokenizer in sides.items()
        }
    return found


def test_a_documents_tokens_are_the_texts_and_one_end(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    (found,) = ranks(1).run(readings, folder=str(tmp_path))
    assert found.keys() == words.SPECIAL.keys()
    for name, sides in found.items():
        end = [] if name in ("no end", "nothing") else [0]
        want = [[2, 4, 3, 2, 6, *end], end, [5, 5, 1, 2, 10, *end], [11, *end]]
        for side, read in sides.items():
            tokens = [document.tolist() for document in read["tokens"]]
            assert tokens == [ids for ids in want if ids], (name, side)
            assert read["source"]["end_of_document"] == (end[0] if end else None)
        assert len({read["source"]["sha256"] for read in sides.values()}) == 1


def refusals(folder: str) -> dict[str, str]:
    """What is said of runs whose text cannot be read here."""
    from emo_megatron.runners.run_tokenizer import text_tokenizer, tokenizer_args

    root = Path(folder)
    os.chdir(root)
    tokenizer = words.write_tokenizer(root / "good")
    (root / "vocab.json").write_text("{}")
    (root / "merges.txt").write_text("")
    kinds = {
        "relative": ("HuggingFaceTokenizer", {"tokenizer_model": NAME}),
        "unnamed": ("HuggingFaceTokenizer", {}),
        "special tokens": ("HuggingFaceTokenizer", {"tokenizer_model": str(tokenizer), "special_tokens": ["<more>"]}),
        "vocabulary": ("GPT2BPETokenizer", {"vocab_file": "vocab.json", "merge_file": "gone"}),
        # its configuration would be fetched
        "gpt2": ("GPT2BPETokenizer", {"vocab_file": "vocab.json", "merge_file": "merges.txt"}),
        "model": ("SentencePieceTokenizer", {"tokenizer_model": "gone.model"}),
        "damaged": ("SentencePieceTokenizer", {"tokenizer_model": "merges.txt"}),
        "hub": ("SFTTokenizer", {"tokenizer_model": NAME}),
    }
    said = {}
    with network.closed(root / "tried") as tried:
        from emo_megatron.variables import stay_offline

        stay_offline()
        for name, (kind, flags) in kinds.items():
            stored = argparse.Namespace(tokenizer_type=kind, **flags)
            try:
                text_tokenizer(tokenizer_args(stored, []), named=None, vocab_size=VOCAB)
                said[name] = "nothing"
            except ValueError as error:
                said[name] = str(error)
        null = tokenizer_args(argparse.Namespace(tokenizer_type="NullTokenizer"), [])
        said["null"] = str(text_tokenizer(null, named=None, vocab_size=VOCAB))
        said["tried"] = str(tried())
    return said


def test_a_tokenizer_that_cannot_be_read_here_is_one_line(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    (said,) = ranks(1).run(refusals, folder=str(tmp_path))
    assert said.pop("null") == "None"
    assert said.pop("tried") == "[]"
    for name, what in {
        "relative": NAME,
        "unnamed": "unnamed",
        "special tokens": "<more>",
        "vocabulary": "gone.*--merge-file",
        "gpt2": "GPT2BPETokenizer",
        "model": r"gone\.model.*--tokenizer-model",
        "damaged": "SentencePieceTokenizer",
        "hub": NAME,
    }.items():
        assert re.search(what, said[name]), said[name]
        assert "--tokenizer" in said[name]
        assert len(said[name].splitlines()) == 1
