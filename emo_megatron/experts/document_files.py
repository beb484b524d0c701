"""Files of documents: texts or tokens, one a document; every fault of a file is told with its place."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from emo_megatron.files import one_line

ReadIndexed = Callable[[Path], Sequence[Tensor]]
"""The documents of an indexed dataset, by its prefix."""


def is_text(path: Path) -> bool:
    """Whether a file holds texts, or a folder a file that does, so that a tokenizer is needed."""
    if path.is_dir():
        return any(path.glob("*.jsonl"))
    return path.suffix == ".jsonl"


def read_file(path: Path, *, read_indexed: ReadIndexed | None = None) -> Sequence[Any]:
    """Texts or token tensors, one a document, in the order of the file.

    Args:
        path: a .jsonl file with a "text" on every line; a .safetensors file with "tokens" [N] and "cu_seqlens" [D + 1],
            both integers; or the prefix of Megatron's indexed dataset (.bin and .idx).
        read_indexed: for indexed datasets.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is none of these, or damaged.
    """
    is_indexed = Path(f"{path}.idx").is_file() and Path(f"{path}.bin").is_file()
    if not path.exists() and not is_indexed:
        raise FileNotFoundError(f"there is no {path}, and no {path}.idx with {path}.bin")
    if path.is_file() and path.suffix == ".jsonl":
        return read_texts(path)
    if path.is_file() and path.suffix == ".safetensors":
        return _read_tokens(path)
    if is_indexed:
        if read_indexed is None:
            raise ValueError(f"{path} is an indexed dataset, which is read for Megatron models only")
        return read_indexed(path)
    raise ValueError(
        f"{path} must be a .jsonl file of texts, a .safetensors file of tokens and cu_seqlens, or the "
        f"prefix of an indexed dataset{'; it is a folder' if path.is_dir() else ''}"
    )


def read_texts(path: Path) -> list[str]:
    """The texts of a .jsonl file, byte for byte; blank lines are none.

    Raises:
        ValueError: a line is no object with a "text", or that is no Unicode text; names the line.
    """
    texts = []
    # lines end where bytes say: a text may hold what Unicode calls the end of a line
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise ValueError(f"{place}: not UTF-8 ({error.reason} at byte {error.start})") from None
        except (RecursionError, ValueError) as error:
            raise ValueError(f"{place}: not JSON ({error})") from None
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise ValueError(f'{place}: must be an object with a "text"')
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{place}: the text must be Unicode; it holds half of a surrogate pair, {text[error.start]!a}, at "
                f"character {error.start}"
            ) from None
        texts.append(text)
    return texts


def _read_tokens(path: Path) -> list[Tensor]:
    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is cut short or no safetensors file: {one_line(error)}") from None
    if not {"tokens", "cu_seqlens"} <= stored.keys():
        raise ValueError(f'{path} must hold "tokens" and "cu_seqlens"; got {sorted(stored)}')
    tokens, bounds = (_integers(path, name, stored[name]) for name in ("tokens", "cu_seqlens"))
    lengths = bounds.diff()
    if bounds.numel() < 1 or bounds[0] != 0 or bounds[-1] != tokens.numel() or (lengths < 0).any():
        falls = (lengths < 0).nonzero().flatten().tolist()
        raise ValueError(
            f"{path}: cu_seqlens must rise from 0 to the {tokens.numel()} tokens; "
            + (f"entry {falls[0] + 1} falls" if falls else f"got {_ends(bounds)}")
        )
    return list(torch.split(tokens, lengths.tolist()))


def _integers(path: Path, name: str, stored: Tensor) -> Tensor:
    """[n] int64.

    Raises:
        ValueError: they are no integers, or no single row of them.
    """
    # floats, complex numbers and bools have no such range
    is_integer = not (stored.is_floating_point() or stored.is_complex() or stored.dtype == torch.bool)
    if not is_integer or stored.dim() != 1:
        raise ValueError(f'{path}: "{name}" must be one row of integers; got {list(stored.shape)} {stored.dtype}')
    return stored.long()


def _ends(bounds: Tensor) -> str:
    return f"{int(bounds[0])} to {int(bounds[-1])}" if bounds.numel() else "none"
