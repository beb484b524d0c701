"""Calibration documents: read a file, choose some documents, build few-shot examples, and pack rows of equal length.

Shapes: S tokens per row. Attention does not cross documents, and only documents longer than a row are cut. The results
of a document therefore do not depend on the other documents in the row, and the statistics of two files can be added.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from emo_megatron.files import one_line

ReadIndexed = Callable[[Path], Sequence[Tensor]]
"""Prefix of an indexed dataset -> the documents."""
SEPARATOR = "\n\n"
"""Text between the shots of an example."""
NO_TOKENIZER = "{} holds text, which requires a tokenizer, and the run had none: name a tokenizer with --tokenizer"
"""Error message for a text file without a tokenizer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """The documents of a file that choose the experts; one few-shot example is enough for EMO."""

    num_examples: int | None = None
    """Number of random examples; 5 examples include the one of 1. None: all documents, by default in file order."""
    num_shots: int = 0
    """Number of documents in front of every example, joined with the example. Shots are never examples."""
    num_tokens: int | None = None
    """No further example is added once the examples have this number of tokens."""
    seed: int = 0
    """Seed of the random choice of examples and shots."""

    def __post_init__(self) -> None:
        for name, least in (("num_examples", 1), ("num_shots", 0), ("num_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be {least} or more; got {value}")

    def pick(self, num_documents: int) -> tuple[list[int], list[int]]:
        """Indices of the examples and indices of the shots, among `num_documents` documents."""
        if self.num_examples is None and self.num_shots == 0:
            return list(range(num_documents)), []
        needed = (self.num_examples or 1) + self.num_shots
        if needed > num_documents:
            raise ValueError(
                f"{self.num_examples or 1} examples with {self.num_shots} shots need {needed} documents; "
                f"got {num_documents}: lower num_examples or num_shots"
            )
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(num_documents, generator=generator).tolist()
        examples = order[: num_documents - self.num_shots][: self.num_examples]
        return examples, order[num_documents - self.num_shots :]


@dataclass(frozen=True, kw_only=True, slots=True)
class Documents:
    """Tokenized documents."""

    tokens: tuple[Tensor, ...]
    """[n] int64 each, n at least 1, end-of-document token included."""
    source: dict[str, Any]
    """File, sha256 of the tokens, numbers of documents and tokens, Calibration; for text, the end-of-document token."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all documents."""
        return sum(document.numel() for document in self.tokens)


class TextTokenizer(Protocol):
    """A tokenizer of documents."""

    @property
    def end(self) -> int | None:
        """Id of the end-of-document token; None if the model's documents end without such a token."""

    def encode(self, text: str) -> Sequence[int]:
        """The tokens of a document, without added special tokens; `end` follows unless `end` is None."""


def load_documents(
    path: Path,
    *,
    calibration: Calibration,
    tokenizer: TextTokenizer | None = None,
    read_indexed: ReadIndexed | None = None,
    vocab_size: int | None = None,
) -> Documents:
    """Read calibration documents; documents without tokens are left out.

    Args:
        path: a file in a format of `read_file`.
        calibration: the choice of documents.
        tokenizer: of the model, for text. The source then includes `tokenizer.end` as "end_of_document".
        read_indexed: reads indexed datasets.
        vocab_size: tokens must be in [0, vocab_size); None: no check.
    """
    documents = read_file(path, read_indexed=read_indexed)
    examples, shots = calibration.pick(len(documents))
    chosen: list[Tensor] = []
    num_tokens = 0
    for place in examples:
        parts = [documents[at] for at in (*shots, place)]
        tokens = _tokens(parts, path, tokenizer)
        if tokens.numel():
            _check(tokens, vocab_size, where=f"{path}, document {place + 1}")
            chosen.append(tokens)
            num_tokens += tokens.numel()
        if calibration.num_tokens and num_tokens >= calibration.num_tokens:
            break
    if not chosen:
        raise ValueError(f"{path} holds no document with tokens: name another file")
    source = {"file": path.name, "sha256": _digest(chosen), "documents": len(chosen), "tokens": num_tokens}
    source |= asdict(calibration)
    if tokenizer is not None and is_text(path):
        source["end_of_document"] = tokenizer.end
    return Documents(tokens=tuple(chosen), source=source)


def _check(tokens: Tensor, vocab_size: int | None, *, where: str) -> None:
    """Raise ValueError for tokens outside the model's vocabulary."""
    lowest, highest = int(tokens.min()), int(tokens.max())
    if vocab_size is not None and (highest >= vocab_size or lowest < 0):
        raise ValueError(
            f"tokens must be in [0, {vocab_size}), the model's vocabulary; {where} has {lowest} to {highest}: "
            "use data of the model's own tokenizer"
        )


def _tokens(parts: list[Any], path: Path, tokenizer: TextTokenizer | None) -> Tensor:
    """Several texts or token sequences, joined into one document."""
    if isinstance(parts[0], str):
        if tokenizer is None:
            raise ValueError(NO_TOKENIZER.format(path))
        return torch.tensor(tokenizer.encode(SEPARATOR.join(parts)), dtype=torch.int64)
    # drop the end-of-document token of every shot, or the document would end before the example
    return torch.cat([*(part[:-1] for part in parts[:-1]), parts[-1]]).long()


def _digest(documents: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.numel().to_bytes(8, "little") + document.numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A row of packed documents, with padding at the end."""

    tokens_S: Tensor
    """[S] int64, 0 for padding."""
    labels_S: Tensor
    """[S] int64, the next token of the document; 0 where `is_predicted_S` is False."""
    is_predicted_S: Tensor
    """[S] bool, False for the last token of a document and for padding."""
    lengths: tuple[int, ...]
    """Number of tokens of each document or piece of a document; the rest of the row is padding."""


def pack_rows(documents: Sequence[Tensor], *, seq_length: int) -> Iterator[Row]:
    """Pack documents, [n] int64 each, into rows in the given order; documents longer than `seq_length` are cut."""
    pieces: list[tuple[Tensor, Tensor]] = []
    room = seq_length
    for document in documents:
        # the last token before a cut predicts the first token after the cut; the last token of a document, nothing
        labels = torch.cat([document[1:], torch.tensor([-1])])
        for piece in zip(torch.split(document, seq_length), torch.split(labels, seq_length), strict=True):
            if len(piece[0]) > room:
                yield _row(pieces, seq_length)
                pieces, room = [], seq_length
            pieces.append(piece)
            room -= len(piece[0])
    if pieces:
        yield _row(pieces, seq_length)


def empty_row(seq_length: int) -> Row:
    """A row of padding."""
    return _row([], seq_length)


def _row(pieces: list[tuple[Tensor, Tensor]], seq_length: int) -> Row:
    lengths = tuple(len(tokens) for tokens, _ in pieces)
    padding = torch.zeros(seq_length - sum(lengths), dtype=torch.int64)
    labels = torch.cat([*(labels for _, labels in pieces), padding - 1])
    return Row(
        tokens_S=torch.cat([*(tokens for tokens, _ in pieces), padding]),
        labels_S=labels.clamp(min=0),
        is_predicted_S=labels >= 0,
        lengths=lengths,
    )


def is_text(path: Path) -> bool:
    """Whether a tokenizer is needed: the path is a .jsonl file, or a folder with a .jsonl file."""
    if path.is_dir():
        return any(path.glob("*.jsonl"))
    return path.suffix == ".jsonl"


def read_file(path: Path, *, read_indexed: ReadIndexed | None = None) -> Sequence[Any]:
    """Texts or token tensors, one per document, in the order of the file.

    Args:
        path: a .jsonl file with a "text" on every line; a .safetensors file with "tokens" [N] and "cu_seqlens" [D + 1],
            both integers; or the prefix of Megatron's indexed dataset (.bin and .idx).
        read_indexed: reads indexed datasets.
    """
    is_indexed = Path(f"{path}.idx").is_file() and Path(f"{path}.bin").is_file()
    if not path.exists() and not is_indexed:
        raise FileNotFoundError(f"there is no file {path}, and no indexed dataset {path}.idx with {path}.bin")
    if path.is_file() and path.suffix == ".jsonl":
        return read_texts(path)
    if path.is_file() and path.suffix == ".safetensors":
        return _read_tokens(path)
    if is_indexed:
        if read_indexed is None:
            raise ValueError(f"{path} is an indexed dataset, which only Megatron models support: name another file")
        return read_indexed(path)
    raise ValueError(
        f"{path} must be a .jsonl file of texts, a .safetensors file with tokens and cu_seqlens, or the "
        f"prefix of an indexed dataset{'; it is a folder' if path.is_dir() else ''}"
    )


def read_texts(path: Path) -> list[str]:
    """The texts of a .jsonl file, without any change; blank lines are skipped."""
    texts = []
    # splits bytes, not text: a text may contain Unicode line separators
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise ValueError(f"{place}: not UTF-8 ({error.reason} at byte {error.start}); save as UTF-8") from None
        except (RecursionError, ValueError) as error:
            raise ValueError(f"{place}: not JSON ({error})") from None
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise ValueError(f'{place}: must be an object with a "text" that is a string')
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{place}: the text must be valid Unicode; got half of a surrogate pair, {text[error.start]!a}, at "
                f"character {error.start}"
            ) from None
        texts.append(text)
    return texts


def _read_tokens(path: Path) -> list[Tensor]:
    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} was cut short or is not a safetensors file: {one_line(error)}") from None
    if not {"tokens", "cu_seqlens"} <= stored.keys():
        raise ValueError(f'{path} must hold "tokens" and "cu_seqlens"; got {sorted(stored)}')
    tokens, bounds = (_integers(path, name, stored[name]) for name in ("tokens", "cu_seqlens"))
    lengths = bounds.diff()
    if bounds.numel() < 1 or bounds[0] != 0 or bounds[-1] != tokens.numel() or (lengths < 0).any():
        falls = (lengths < 0).nonzero().flatten().tolist()
        ends = f"{int(bounds[0])} to {int(bounds[-1])}" if bounds.numel() else "none"
        raise ValueError(
            f"{path}: cu_seqlens must rise from 0 to the number of tokens, {tokens.numel()}; "
            + (f"entry {falls[0] + 1} falls" if falls else f"got {ends}")
        )
    return list(torch.split(tokens, lengths.tolist()))


def _integers(path: Path, name: str, stored: Tensor) -> Tensor:
    """The stored tensor as [n] int64; ValueError if the tensor is not one-dimensional or not of integers."""
    # every integer dtype is accepted
    is_integer = not (stored.is_floating_point() or stored.is_complex() or stored.dtype == torch.bool)
    if not is_integer or stored.dim() != 1:
        raise ValueError(f'{path}: "{name}" must be one-dimensional integers; got {list(stored.shape)} {stored.dtype}')
    return stored.long()
