"""The demo's corpus on disk, as `corpus` leaves it: what is in it, and its held-out documents."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from emo_megatron.json_files import checked, read_object

HELD_OUT_SPLITS = ("calibration", "validation")
SPLITS = ("train", *HELD_OUT_SPLITS)
MANIFEST = "corpus.json"
_KINDS = dict.fromkeys(("vocab_size", "eod_token"), int) | {
    "fingerprint": str,
    **dict.fromkeys(("config", "domains"), dict),
}
_DOMAIN = dict.fromkeys(("documents", "tokens"), dict) | {"source": str, "megabytes": float}


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """A corpus on disk."""

    path: Path
    manifest: dict[str, Any]
    """The content of corpus.json."""

    @property
    def domains(self) -> list[str]:
        """Names of the domains, in order of preference."""
        return list(self.manifest["domains"])

    @property
    def train_prefix(self) -> Path:
        """Path of the indexed dataset without .bin or .idx."""
        return self.path / "train"

    @property
    def tokenizer_dir(self) -> Path:
        """Folder to load with `AutoTokenizer.from_pretrained`."""
        return self.path / "tokenizer"

    @property
    def eod_token(self) -> int:
        """Id of the token that ends every document."""
        return int(self.manifest["eod_token"])

    @property
    def vocab_size(self) -> int:
        """Entries of the tokenizer, the end-of-document token included."""
        return int(self.manifest["vocab_size"])

    @property
    def train_tokens(self) -> int:
        """Tokens of the training split over all domains."""
        return sum(row["tokens"]["train"] for row in self.manifest["domains"].values())

    def documents(self, split: str, domain: str) -> tuple[Tensor, Tensor]:
        """Load one domain of a held-out split, "calibration" or "validation".

        Returns:
            tokens: [num_tokens] int32, all documents one after the other.
            cu_seqlens: [num_documents + 1] int32, where each document starts, and the end.
        """
        if split not in HELD_OUT_SPLITS or domain not in self.domains:
            raise ValueError(
                f"split must be one of {HELD_OUT_SPLITS} and domain one of {self.domains}; "
                f"got {split!r}, {domain!r}. Training documents are at {self.train_prefix}."
            )
        tensors = load_file(self.path / split / f"{domain}.safetensors")
        return tensors["tokens"], tensors["cu_seqlens"]


def load_corpus(path: Path) -> Corpus:
    """The corpus in a folder.

    Raises:
        OSError: its description cannot be opened.
        ValueError: it is damaged; remove it to have the corpus made again.
    """
    file = path / MANIFEST
    try:
        manifest = checked(read_object(file, kind="a corpus"), _KINDS, where=str(file), least=0)
        for name, domain in manifest["domains"].items():
            checked(domain, _DOMAIN, where=f"{file}, {name}")
            for part in ("documents", "tokens"):
                where = f"{file}, {name}, {part}"
                checked(domain[part], dict.fromkeys(SPLITS, int), where=where, least=0)
    except ValueError as error:
        raise ValueError(f"{error}; remove it") from None
    return Corpus(path=path, manifest=manifest)
