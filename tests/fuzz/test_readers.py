"""Every reader on damaged files: what it returns is right, or it refuses in one line that names the file."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from fuzz.judge import both_sizes, fuzz, read_or_refused
from fuzz.mutations import FOREIGN, mutated
from fuzz.readers import READERS, Reader
from hypothesis import strategies as st

KNOWN: dict[str, tuple[tuple[bytes, bytes], ...]] = {
    "texts": ((b"pool module", b"\\ud83d"),),
    "indexed dataset": ((struct.pack("<3q", 1, 2, 3), struct.pack("<3q", 2, 1, 3)),),
    "tokens": ((b'"I32"', b'"\\n2"'),),
    "selection": ((b'"layers": [1,', b'"layers": [-1,'),),
    "statistics": ((b'top_k\\": 2, ', b'top_k\\":2.0,'),),
    "placement": (
        *((b'"coactivation"', b"null"), (b"1.1", b"NaN"), (b"1.1", b"-1"), (b'"layers": [1', b'"layers": [0')),
        *((b'"num_experts": 4', b'"num_experts": 4.0'), (b"[[0", b"[[0.0"), (b"[[0", b"[[false")),
    ),
    "rows, json": ((b'"loss": 5.0', b'"loss": NaN'), (b'"tokens": 100', b'"tokens": "x"')),
    "rows, csv": ((b",100,0,1\n", b",0,0,1\n"), (b",100,0,1\n", b"\n"), (b"5.0", b"x")),
    "qwen2_moe": (
        *((b'"norm_topk_prob": false', b'"norm_topk_prob": "False"'), (b"1e-06", b"-1e-06")),
        *((b'"model_type": "qwen2_moe"', b'"model_type": []'), (b"500000.0", b"-500000.0")),
        *((b'"num_hidden_layers": 2', b'"num_hidden_layers": []'), (b'"vocab_size": 80', b'"vocab_size": 80.0')),
    ),
    "emo": ((b'"num_shared_experts": 1', b'"num_shared_experts": []'),),
    "tokenizer": ((b'"model_max_length": 1000000000000000019884624838656', b'"model_max_length": " "'),),
    "place of a checkpoint": ((b"release", b"last"), (b"release", b"-7")),
    "weights of a checkpoint": (
        *(
            (b"\x80\x04\x95", b"\x80\x04\x95\x00\x00\x00\x7f"),
            (b"state_dict_metadata", b"state_dict_metadatb"),
            (b"relative_path", b"relative_patH"),
            (b"offset", b"offseT"),
        ),
    ),
}
"""Faults that were found: of a valid file, which part was replaced with what."""


def check(reader: Reader, folder: Path, name: str, content: bytes, *, is_whole: bool = False) -> None:
    """Read with one file replaced."""
    path = folder / name
    whole = path.read_bytes()
    path.write_bytes(content)
    try:
        found = read_or_refused(lambda: reader.read(folder), named=(path.name, *reader.also_named))
        assert found is not None or not is_whole
        if found is not None:
            reader.check(found, folder)
    finally:
        path.write_bytes(whole)


@both_sizes
@pytest.mark.parametrize("name", READERS)
def test_files(name: str, inputs: int, valid: Path) -> None:
    reader = READERS[name]
    whole = {file: (valid / file).read_bytes() for file in reader.files}
    known: list[tuple[str, bytes]] = []
    for old, new in KNOWN.get(name, ()):
        file = next(file for file, content in whole.items() if old in content)
        known.append((file, whole[file].replace(old, new, 1)))

    def one(found: Any) -> None:
        check(reader, valid, *found)

    for file, content in whole.items():
        check(reader, valid, file, content, is_whole=True)
        known += [(file, other) for other in FOREIGN]
    drawn = st.one_of(st.tuples(st.just(file), mutated(file, content)) for file, content in whole.items())
    fuzz(inputs, drawn, one, known=known)
