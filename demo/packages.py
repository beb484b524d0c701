"""Build a corpus for a GPU from Debian packages: about 25 MB of text in each of 14 domains, and one packed file.

    python -m demo.packages --output FOLDER

    FOLDER/debs/               downloaded packages; a later run downloads only what is missing
    FOLDER/texts/<domain>/     cleaned files of packages, also for `make demo ARGS="--corpus FOLDER/texts"`
    FOLDER/texts/sources.json  packages and versions of every domain
    FOLDER/corpus/             the prepared corpus, see corpus.py
    FOLDER/corpus.tar.xz       the corpus as one file, see packed.py, for `benchmarks/gpu.sh C MODEL --corpus`

This is the only part of the demo that downloads anything. It uses the apt sources of the machine, on Debian or
Ubuntu, and needs no root. Packages are unpacked into a temporary folder, not installed. An interrupted run resumes.
"""

import dataclasses
import json
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from demo import apt
from demo.apt import Package
from demo.corpus import CorpusConfig, describe, prepare_corpus, read_documents
from demo.corpus_files import MANIFEST, Corpus
from demo.package_texts import DOMAINS, FILE_CHARS, Domain
from demo.packed import MIB, pack
from demo.recipe import run_step
from demo.sources import SOURCES
from emo_megatron.files import must_be_writable, whole
from emo_megatron.json_files import read_object

MAX_CHARS = 8_000
"""Characters of a document: about two sequences of 1,024 tokens."""
LEAST_MEGABYTES = 0.1
CORPUS = "corpus"
"""Folder of the prepared corpus."""
FEWEST_TOKENS = {"validation": 65_536, "calibration": 32_768}
"""Tokens that the evaluation of a domain reads, see ON_GPU in benchmarks/fidelity_plan.py."""
CLOSE = 0.9
"""A packed file of at least this share of --max-mib was made for this --max-mib."""
FORMAT = 2
"""Of the texts: higher when the same packages would give other texts."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Build a corpus for a GPU from Debian packages."""

    output: Path
    """Folder of the corpus. An interrupted run resumes. About 2 GB are used for a while."""
    debs: Path | None = None
    """Folder of downloaded packages. Default: OUTPUT/debs. Packages there are not downloaded again."""
    megabytes: float = 25.0
    """Reading a domain stops after this much text, in MB of UTF-8, and at least 60 files."""
    vocab_size: int = 16_384
    """Largest number of tokenizer entries."""
    min_domains: int = 12
    """With fewer available domains, nothing is downloaded."""
    max_mib: float = 55.0
    """Largest size of the packed file. A larger corpus loses training documents evenly."""
    min_tokens: float = 1.0
    """Tokens that every domain needs for validation and calibration, as a multiple of what an evaluation reads."""
    seed: int = 1234
    """Seed for the choice, the split and the order of documents."""

    def check(self) -> None:
        """Check the options and the machine before any work.

        Raises:
            ValueError: an option is wrong, or a program is missing.
        """
        if not 1 <= self.min_domains <= len(DOMAINS):
            raise ValueError(f"--min-domains must be 1 to {len(DOMAINS)}; got {self.min_domains}")
        if not self.megabytes >= LEAST_MEGABYTES:
            raise ValueError(f"--megabytes must be at least {LEAST_MEGABYTES}; got {self.megabytes:g}")
        if not 257 <= self.vocab_size <= 65_000:
            raise ValueError(f"--vocab-size must be 257 to 65000; got {self.vocab_size}")
        if not self.max_mib > 0:
            raise ValueError(f"--max-mib must be more than 0; got {self.max_mib:g}")
        must_be_writable(self.output / "file")
        apt.check_tools()

    @property
    def config(self) -> CorpusConfig:
        """Of the corpus."""
        return CorpusConfig(
            corpus_dir=self.output / "texts",
            bytes_per_domain=int(self.megabytes * 1e6),
            min_documents=60,
            max_document_chars=MAX_CHARS,
            max_text_chars=FILE_CHARS,
            vocab_size=self.vocab_size,
            calibration_fraction=1 / 50,
            validation_fraction=1 / 25,
            seed=self.seed,
        )


def main(options: Options) -> None:
    """Download, clean, prepare and pack; every step is skipped if its result is there.

    Raises:
        ValueError: too few domains are available, a download failed, or a domain has too little text.
    """
    options.check()
    debs = options.debs or options.output / "debs"
    available = find_domains(options.min_domains)
    packages = list({package.name: package for some in available.values() for package in some}.values())
    missing = apt.missing_packages(packages, debs)
    total, rest = (sum(package.size for package in some) / 1e6 for some in (packages, missing))
    print(f"{len(packages)} packages of {total:.0f} MB; to download into {debs}: {len(missing)} of {rest:.0f} MB")
    apt.download(packages, debs)
    for domain, some in available.items():
        started = time.monotonic()
        size = write_texts(domain, some, debs=debs, config=options.config)
        print(f"{domain.name}: {size / 1e6:.1f} MB of text ({time.monotonic() - started:.0f} s)", flush=True)
    for folder in (options.output / "texts").glob("*/"):
        # of an earlier run, with other packages
        if folder.name not in {domain.name for domain in available}:
            _forget_corpus(options.output)
            shutil.rmtree(folder)
    build(options)


def find_domains(fewest: int) -> dict[Domain, list[Package]]:
    """The packages of every available domain; prints what is not available.

    Raises:
        ValueError: fewer domains than required are available.
    """
    found = apt.find_packages(pattern for domain in DOMAINS for pattern in domain.patterns)
    available: dict[Domain, list[Package]] = {}
    for domain in DOMAINS:
        packages = [found[pattern] for pattern in domain.patterns if pattern in found]
        if packages:
            available[domain] = packages
        else:
            print(f"{domain.name}: not available, apt has none of the packages {', '.join(domain.patterns)}")
    if len(available) < fewest:
        raise ValueError(
            f"--min-domains requires {fewest} domains; apt has packages for {len(available)}. "
            "Run apt-get update as root, or add Debian's main section to apt's sources."
        )
    return available


def write_texts(domain: Domain, packages: list[Package], *, debs: Path, config: CorpusConfig) -> int:
    """Write the cleaned texts of a domain, one file each, unless the same texts are there; returns the bytes.

    New texts delete the manifest of the corpus, so that the corpus is prepared again.

    Raises:
        ValueError: a package cannot be unpacked.
    """
    texts = config.corpus_dir
    assert texts is not None
    versions = ", ".join(map(str, packages))
    made_with = {"source": versions, "format": FORMAT, "limit": config.bytes_per_domain, "seed": config.seed}
    listed = read_object(texts / SOURCES, kind="a list of sources") if (texts / SOURCES).exists() else {}
    folder, known = texts / domain.name, listed.pop(domain.name, {})
    if folder.is_dir() and known.items() >= made_with.items():
        return int(known["bytes"])
    _write_json(texts / SOURCES, listed)
    _forget_corpus(texts.parent)
    shutil.rmtree(folder, ignore_errors=True)
    rng = random.Random(f"{config.seed} {domain.name}")
    with tempfile.TemporaryDirectory(prefix=".unpacked-", dir=texts.parent) as scratch:
        for package in packages:
            apt.unpack(package, debs, Path(scratch) / package.name)
        found = read_documents(domain.texts(Path(scratch), rng=rng), seen=set(), config=config)
    with whole(folder) as unfinished:
        unfinished.mkdir()
        for number, text in enumerate(found.values()):
            part = unfinished / f"{number // 500:03}"
            part.mkdir(exist_ok=True)
            (part / f"{number:06}.txt").write_text(text, encoding="utf-8")
    size = sum(len(text.encode()) for text in found.values())
    _write_json(texts / SOURCES, listed | {domain.name: made_with | {"bytes": size, "texts": len(found)}})
    return size


def _forget_corpus(output: Path) -> None:
    """Delete the manifest of an earlier corpus: prepare_corpus detects another configuration, but not other texts."""
    (output / CORPUS / MANIFEST).unlink(missing_ok=True)


def build(options: Options) -> Corpus:
    """Prepare the corpus from the texts and pack it; prints the sizes.

    Raises:
        ValueError: a domain has too little text.
    """
    packed = options.output / "corpus.tar.xz"
    config = dataclasses.replace(options.config, max_train_tokens=_earlier_limit(options, packed))
    while True:
        started = time.monotonic()
        corpus = prepare_corpus(options.output / CORPUS, config)
        check_tokens(corpus, options.min_tokens)
        print(describe(corpus), flush=True)
        prepared = time.monotonic()
        size = pack(corpus, packed)
        print(
            f"{packed}: {size / MIB:.1f} MiB, {8 * size / corpus.train_tokens:.2f} bits per training token; "
            f"{prepared - started:.0f} s to prepare, {time.monotonic() - prepared:.0f} s to pack",
            flush=True,
        )
        if size <= options.max_mib * MIB:
            return corpus
        # a little less than the limit allows
        most = int(corpus.train_tokens * options.max_mib * MIB / size * 0.99)
        print(f"more than --max-mib {options.max_mib:g}: training documents are dropped evenly, to {most:,} tokens")
        config = dataclasses.replace(config, max_train_tokens=most)


def _earlier_limit(options: Options, packed: Path) -> int | None:
    """The number of training tokens that an earlier run with the same --max-mib found; None if it found none."""
    path = options.output / CORPUS / MANIFEST
    if not path.exists() or not packed.exists():
        return None
    most: int | None = read_object(path, kind="a corpus").get("config", {}).get("max_train_tokens")
    limit = options.max_mib * MIB
    return most if CLOSE * limit <= packed.stat().st_size <= limit else None


def check_tokens(corpus: Corpus, factor: float = 1.0) -> None:
    """Check that every domain has the tokens that an evaluation reads.

    Raises:
        ValueError: a domain has too few.
    """
    for name, row in corpus.manifest["domains"].items():
        for split, fewest in FEWEST_TOKENS.items():
            if row["tokens"][split] < factor * fewest:
                raise ValueError(
                    f"domain {name} needs {factor * fewest:,.0f} tokens for {split}; its text has "
                    f"{row['tokens'][split]:,}: increase --megabytes, or decrease --min-tokens"
                )


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with whole(path) as unfinished:
        unfinished.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_step(lambda: main(tyro.cli(Options, prog="python -m demo.packages", config=(tyro.conf.FlagCreatePairsOff,))))
    sys.exit()
