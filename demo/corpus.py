"""Prepare the demo's corpus: collect, clean, split by document, tokenize and write.

    output/tokenizer/                       tokenizer for Megatron's HuggingFaceTokenizer, offline
    output/train.bin, train.idx             documents of all domains, shuffled together
    output/calibration/<domain>.safetensors tokens and cu_seqlens of one domain
    output/validation/<domain>.safetensors  tokens and cu_seqlens of one domain
    output/corpus.json                      description of the corpus; written last, so it marks a complete corpus

Every document ends with the end-of-document token, and no document is in two splits.
"""

import bisect
import dataclasses
import hashlib
import itertools
import json
import random
import re
import shutil
import statistics
import sys
import warnings
from array import array
from collections.abc import Iterable, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from demo import recipe
from demo.corpus_files import MANIFEST, SPLITS, UNTRAINED_SPLITS, fingerprint
from demo.corpus_files import Corpus as Corpus
from demo.sources import MACHINE_SOURCES, Machine, folder_sources, split_long
from emo_megatron.files import gone_on_failure, whole, writing
from emo_megatron.json_files import read_object

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EOD = "<|endoftext|>"
EOD_TOKEN = 0
MIN_DOMAINS = 3
MIN_UNTRAINED = 60
TOKENIZER_CHARS = 600_000
FORMAT = 1
_FILES = ("tokenizer", "train.bin", "train.idx", *UNTRAINED_SPLITS)
# control characters, and halves of surrogate pairs, which UTF-8 cannot encode
NOT_TEXT = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\ufffd\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusConfig:
    """Sources and sizes of the corpus."""

    corpus_dir: Path | None = None
    """Folder with one subfolder per domain; None: search for text on this machine."""
    max_domains: int = 8
    """Number of domains taken from this machine; of `corpus_dir`, all subfolders are taken."""
    bytes_per_domain: int = 4_500_000
    """Reading a domain stops at this many bytes of UTF-8, if `min_documents` is also reached."""
    min_documents: int = 200
    """A domain with fewer usable documents is left out."""
    min_document_chars: int = 600
    """Shorter documents are left out."""
    max_document_chars: int = 6000
    """Longer documents are cut, or divided if `max_text_chars` is set, if possible at the end of a line."""
    max_text_chars: int | None = None
    """If set, a text longer than `max_document_chars` becomes several documents of one split; text after this many
    characters is left out. The splits then have shares of the texts, not of the documents."""
    vocab_size: int = 2048
    """Largest number of tokenizer entries, including the end-of-document token."""
    calibration_fraction: float = 1 / 24
    """Share of a domain's documents for calibration; at least 60 documents, but at most a sixth of all."""
    validation_fraction: float = 1 / 24
    """Share of a domain's documents for validation, with the bounds of `calibration_fraction`."""
    seed: int = 1234
    """Seed for the choice, the split and the order of documents."""
    max_train_tokens: int | None = None
    """Largest number of training tokens, divided evenly among the domains; None: no limit."""


def corpus_config(folder: Path | None, *, seed: int, quick: bool) -> CorpusConfig:
    """Configuration of a corpus from a folder with one subfolder of text files per domain, or from this machine."""
    full = CorpusConfig(corpus_dir=folder, seed=seed)
    if not quick:
        return full
    return dataclasses.replace(full, max_domains=4, bytes_per_domain=300_000, min_documents=60)


type _Texts = dict[str, list[str]]
type _Tokens = dict[str, list[array[int]]]


def prepare_corpus(output: Path, config: CorpusConfig, *, machine: Machine | None = None) -> Corpus:
    """Write the corpus to `output`, or return the existing corpus there if its config is the same.

    A corpus with another config is replaced. Changed source texts are not detected: delete
    corpus.json to read the texts again.

    Without `config.corpus_dir`, the text comes from `machine`, by default the running system.

    Raises:
        ValueError: if fewer than three domains have enough documents.
    """
    path = output / MANIFEST
    corpus_dir = None if config.corpus_dir is None else str(config.corpus_dir.resolve())
    wanted = dataclasses.asdict(config) | {"corpus_dir": corpus_dir, "format": FORMAT}
    # corpora of earlier releases do not have these
    for name in ("max_train_tokens", "max_text_chars"):
        if wanted[name] is None:
            del wanted[name]
    if path.exists():
        manifest = read_object(path, kind="a corpus")
        if manifest.get("config") == wanted:
            return Corpus(path=output, manifest=manifest)
        path.unlink()
    descriptions, documents = _collect(config, machine=machine or Machine())
    texts = {name: split_documents(documents[name], config=config) for name in documents}
    tokenizer = _train_tokenizer(texts, vocab_size=config.vocab_size)
    tokens = _tokenize(texts, tokenizer=tokenizer)
    _balance(tokens, max_tokens=config.max_train_tokens)
    rows = {name: _summarise(texts[name], tokens[name]) for name in texts}
    manifest = {
        "config": wanted,
        "fingerprint": "",
        "vocab_size": tokenizer.get_vocab_size(),
        "eod_token": EOD_TOKEN,
        "domains": {name: {"source": descriptions[name], **rows[name]} for name in rows},
    }
    with gone_on_failure(*(output / name for name in _FILES)), writing(output):
        _write(output, tokens, tokenizer=tokenizer, seed=config.seed)
        manifest["fingerprint"] = fingerprint(Corpus(path=output, manifest=manifest))
    with whole(path) as unfinished:
        unfinished.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return Corpus(path=output, manifest=manifest)


def describe(corpus: Corpus) -> str:
    """Return a table of the corpus: one line per domain, and the sums."""
    domains = corpus.manifest["domains"]
    table = [
        (
            name,
            *(row["documents"][split] for split in SPLITS),
            *(row["tokens"]["train"], row["megabytes"], row["source"]),
        )
        for name, row in domains.items()
    ]
    sums = [sum(column) for column in list(zip(*table, strict=True))[1:-1]]
    lines = ["domain         train  calib.  valid.  train tokens     MB  text"]
    for name, *documents, tokens, megabytes, text in [*table, ("all", *sums, "")]:
        columns = "".join(f"{count:8,}" for count in documents)
        lines.append(f"{name:12}{columns}{tokens:14,}{megabytes:7.1f}  {text}".rstrip())
    return "\n".join(lines)


def _collect(config: CorpusConfig, *, machine: Machine) -> tuple[dict[str, str], _Texts]:
    """Read sources until there are enough domains; return descriptions of the sources, and documents per domain."""
    sources = MACHINE_SOURCES if config.corpus_dir is None else folder_sources(config.corpus_dir)
    num_wanted = config.max_domains if config.corpus_dir is None else len(sources)
    taken: _Texts = {}
    found: dict[str, int] = {}
    seen: set[bytes] = set()
    for source in tqdm(sources, desc="reading", unit="domain", disable=None):
        if len(taken) == num_wanted:
            break
        rng = random.Random(f"{config.seed} {source.name}")
        documents = read_documents(source.documents(machine, rng=rng), seen=seen, config=config)
        if len(documents) >= config.min_documents:
            seen |= documents.keys()
            taken[source.name] = list(documents.values())
            rng.shuffle(taken[source.name])
        found[source.name] = len(documents)
    if len(taken) < MIN_DOMAINS:
        listed = ", ".join(f"{name} {count}" for name, count in found.items() if count)
        raise ValueError(
            f"the corpus needs {MIN_DOMAINS} domains, each with {config.min_documents} or more different "
            f"documents of {config.min_document_chars} or more characters, from "
            f"{config.corpus_dir or 'this machine'}; found documents: {listed or 'none'}. "
            "Pass --corpus DIR with one folder per domain, DIR/<domain>/<any name>: "
            "every UTF-8 file below such a folder is a document."
        )
    if config.corpus_dir is not None and len(taken) < len(found):
        left_out = ", ".join(f"{name} {found[name]}" for name in found if name not in taken)
        warnings.warn(f"left out domains with fewer than {config.min_documents} documents: {left_out}")
    return {source.name: source.description for source in sources}, taken


def read_documents(texts: Iterable[str], *, seen: set[bytes], config: CorpusConfig) -> dict[bytes, str]:
    """Clean documents until there are enough; return documents by the hash of their first 2000 characters.

    Documents with the same hash count as one; the hash ignores differences in white space. Documents whose hash is in
    `seen` are left out.
    """
    documents: dict[bytes, str] = {}
    num_bytes = 0
    for raw in texts:
        text = clean(raw, max_chars=config.max_text_chars or config.max_document_chars)
        key = hashlib.sha256(" ".join(text[:2000].split()).encode()).digest()
        if len(text) < config.min_document_chars or key in documents or key in seen:
            continue
        documents[key] = text
        num_bytes += len(text.encode())
        if num_bytes >= config.bytes_per_domain and len(documents) >= config.min_documents:
            break
    return documents


def clean(text: str, *, max_chars: int) -> str:
    """Unify line ends and blank lines, and cut at `max_chars`; returns "" for text that cannot be one document."""
    # a literal end-of-document token would be tokenized as a document boundary
    if EOD in text or NOT_TEXT.search(text):
        return ""
    lines = (line.rstrip() for line in text.splitlines())
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")
    if len(text) <= max_chars:
        return text
    line_end = text.rfind("\n", max_chars // 2, max_chars)
    return text[: max_chars if line_end < 0 else line_end].rstrip()


def split_documents(documents: list[str], *, config: CorpusConfig) -> _Texts:
    """Divide shuffled documents among the three splits, then cut long documents if the config says so."""
    count = len(documents)
    fractions = (config.calibration_fraction, config.validation_fraction)
    counts = [min(max(MIN_UNTRAINED, round(count * share)), count // 6) for share in fractions]
    middle, end = itertools.accumulate(counts)
    parts = (documents[end:], documents[:middle], documents[middle:end])
    splits = dict(zip(SPLITS, parts, strict=True))
    return splits if config.max_text_chars is None else {name: _parts(splits[name], config=config) for name in splits}


def _parts(documents: list[str], *, config: CorpusConfig) -> list[str]:
    """Cut long documents; parts of all documents are shuffled, so that a beginning has parts of many documents."""
    found = [part.strip("\n") for text in documents for part in split_long(text, max_chars=config.max_document_chars)]
    return _shuffled([part for part in found if len(part) >= config.min_document_chars], seed=config.seed)


def _head[T: Sized](items: list[T], *, limit: int) -> list[T]:
    """Return the longest beginning whose lengths sum to at most `limit`."""
    return items[: bisect.bisect_right([*itertools.accumulate(map(len, items))], limit)]


def _train_tokenizer(domains: dict[str, _Texts], *, vocab_size: int) -> "Tokenizer":
    """Train a byte-level BPE on at most TOKENIZER_CHARS of each domain's training documents."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    heads = (_head(d["train"], limit=TOKENIZER_CHARS) for d in domains.values())
    tokenizer.train_from_iterator(itertools.chain.from_iterable(heads), trainer)
    return tokenizer


def _tokenize(domains: dict[str, _Texts], *, tokenizer: "Tokenizer") -> dict[str, _Tokens]:
    encoded: dict[str, _Tokens] = {name: {split: [] for split in SPLITS} for name in domains}
    for name, texts in tqdm(domains.items(), desc="tokenizing", unit="domain", disable=None):
        for split in SPLITS:
            for batch in itertools.batched(texts[split], 256):
                encodings = tokenizer.encode_batch_fast(list(batch))
                encoded[name][split] += (array("i", [*e.ids, EOD_TOKEN]) for e in encodings)
    return encoded


def _balance(domains: dict[str, _Tokens], *, max_tokens: int | None) -> None:
    """Drop training documents so that no domain has more training tokens than the median one, or than its share."""
    limit = statistics.median_low(sum(map(len, d["train"])) for d in domains.values())
    if max_tokens is not None:
        limit = min(limit, max_tokens // len(domains))
    for documents in domains.values():
        documents["train"] = _head(documents["train"], limit=limit)


def _summarise(texts: _Texts, tokens: _Tokens) -> dict[str, Any]:
    used = (text for split in SPLITS for text in texts[split][: len(tokens[split])])
    return {
        "documents": {split: len(tokens[split]) for split in SPLITS},
        "tokens": {split: sum(map(len, tokens[split])) for split in SPLITS},
        "megabytes": sum(len(text.encode()) for text in used) / 1e6,
    }


def _write(output: Path, domains: dict[str, _Tokens], *, tokenizer: "Tokenizer", seed: int) -> None:
    """Write everything except the manifest."""
    from transformers import PreTrainedTokenizerFast

    from emo_megatron.mcore.dataset import write_indexed_dataset

    output.mkdir(parents=True, exist_ok=True)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOD)  # type: ignore[no-untyped-call]
    fast.save_pretrained(output / "tokenizer")
    train = _shuffled([tokens for documents in domains.values() for tokens in documents["train"]], seed=seed)
    write_indexed_dataset(output / "train", train, vocab_size=tokenizer.get_vocab_size())
    for split in UNTRAINED_SPLITS:
        shutil.rmtree(output / split, ignore_errors=True)
        (output / split).mkdir()
        for name, documents in domains.items():
            flat = [*itertools.chain.from_iterable(documents[split])]
            ends = [*itertools.accumulate(map(len, documents[split]), initial=0)]
            values = {"tokens": flat, "cu_seqlens": ends}
            tensors = {key: torch.tensor(v, dtype=torch.int32) for key, v in values.items()}
            save_file(tensors, output / split / f"{name}.safetensors")


def write_domain(corpus: Corpus, domain: str, prefix: Path) -> None:
    """Write the training documents of one domain as an indexed dataset with this prefix, unless it exists."""
    from emo_megatron.mcore.dataset import IndexedDocuments, write_indexed_dataset

    if prefix.with_name(prefix.name + ".idx").exists():
        return
    rows = corpus.manifest["domains"]
    names = [name for name, row in rows.items() for _ in range(row["documents"]["train"])]
    # the order in which _write stored the documents
    names = _shuffled(names, seed=corpus.manifest["config"]["seed"])
    stored = IndexedDocuments(corpus.path / "train")
    documents = [tokens.tolist() for name, tokens in zip(names, stored, strict=True) if name == domain]
    assert sum(map(len, documents)) == rows[domain]["tokens"]["train"], "documents of another domain"
    write_indexed_dataset(prefix, documents, vocab_size=corpus.manifest["vocab_size"])


def _shuffled[T](items: list[T], *, seed: int) -> list[T]:
    shuffled = [*items]
    random.Random(seed).shuffle(shuffled)
    return shuffled


def main() -> None:
    """Prepare the corpus of the run in the folder given as argument, and print a table of the corpus."""
    output = Path(sys.argv[1])
    run = read_object(output / "demo.json", kind="the settings of a run")
    folder = Path(run["corpus"]) if run["corpus"] else None
    is_quick = run["size"]["steps"] == recipe.QUICK.steps
    corpus = prepare_corpus(output / "corpus", corpus_config(folder, seed=run["seed"], quick=is_quick))
    recipe.claim(output, {"text": corpus.manifest["fingerprint"]})
    print(describe(corpus), flush=True)


if __name__ == "__main__":
    recipe.run_step(main)
