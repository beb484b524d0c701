"""Every reader on damaged files: what it returns is right, or it refuses in one line that names the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fuzz.judge import both_sizes, fuzz, read_or_refused
from fuzz.mutations import mutated
from fuzz.readers import READERS, Reader
from hypothesis import strategies as st


def check(reader: Reader, folder: Path, name: str, content: bytes) -> None:
    """Read with one file replaced."""
    path = folder / name
    whole = path.read_bytes()
    path.write_bytes(content)
    try:
        found = read_or_refused(lambda: reader.read(folder), named=(path.name, *reader.also_named))
        if found is not None:
            reader.check(found, folder)
    finally:
        path.write_bytes(whole)


@both_sizes
@pytest.mark.parametrize("name", READERS)
def test_files(name: str, inputs: int, valid: Path) -> None:
    reader = READERS[name]
    drawn = st.one_of(
        st.tuples(st.just(file), mutated(file, (valid / file).read_bytes()))
        for file in reader.files
    )

    def one(found: Any) -> None:
        check(reader, valid, *found)

    for file in reader.files:
        one((file, (valid / file).read_bytes()))
    fuzz(inputs, drawn, one)
