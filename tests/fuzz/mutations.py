"""Strategies that damage a file: its bytes, or what it says where its form is known."""

from __future__ import annotations

import contextlib
import copy
import csv
import io
import json
import math
import struct
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy


class Repeated(bytes):
    """Bytes that are printed short."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes of {self[:5].decode()}>"


ATOMS = (
    *(None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 2**64, -(10**30), 10**12),
    *(0.5, 2.0, -0.0, 1e308, 5e-324, math.nan, math.inf, -math.inf),
    *("", " ", "0", "2", "F32", "BOOL", "nan", "1e999", "false", "\ud83d", "\x00", "é\u2028\n", "..", "a/b", "x" * 300),
    *([], {}, [[]], [None], {"": 0}),
)
"""What a value of JSON is replaced with; Python's JSON knows NaN and infinities."""
RETYPED: tuple[Callable[[Any], Any], ...] = (
    str,
    lambda value: [value],
    lambda value: {"value": value},
    lambda value: float(value) if isinstance(value, int) else value,
    lambda value: -value if isinstance(value, int | float) else value,
    lambda value: value + 1 if isinstance(value, int | float) else value,
)
FOREIGN = (
    *(b"", b"\n", b"null", b"0", b"[]", b"{}", b'"text"', b"NaN", b"\xef\xbb\xbf{}", b"\xff\xfe{\x00}\x00"),
    *(b"\x1f\x8b\x08\x00", b"PK\x03\x04", b"\x80\x04.", b"\x7fELF", b"<!DOCTYPE html>\n<html>"),
    *(Repeated(b"[" * 100_000), Repeated(b'{"a":' * 100_000), Repeated(b"1" * 5000)),
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n",
)
"""What other programs leave under a name."""


def mutated(name: str, content: bytes) -> SearchStrategy[bytes]:
    """Damaged contents of a file; its name says which form it has."""
    ways = [damaged(content), st.sampled_from(range(len(FOREIGN))).map(FOREIGN.__getitem__)]
    if name.endswith((".json", ".partial")):
        ways += [trees(json.loads(content)).map(_json)] * 3
    elif name.endswith(".jsonl"):
        records = [json.loads(line) for line in content.splitlines()]
        ways += [trees(records).map(_lines)] * 3
    elif name.endswith(".csv"):
        ways += [trees(list(csv.reader(io.StringIO(content.decode())))).map(_csv)] * 3
    elif name.endswith(".safetensors"):
        size = struct.unpack("<Q", content[:8])[0]
        header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
        ways += [trees(header).map(lambda tree: _safetensors(tree, data)), numbers(content)] * 2
    elif name.endswith(".idx"):
        ways += [numbers(content)] * 3
    return st.one_of(ways)


@st.composite
def trees(draw: DrawFn, valid: Any) -> Any:
    """A tree of JSON with one to three nodes deleted, doubled, replaced or given another type."""
    tree = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        tree = _changed(draw, tree)
    return tree


def _changed(draw: DrawFn, node: Any) -> Any:
    if isinstance(node, str) and draw(st.booleans()):
        # JSON in a text of JSON, as safetensors keep what is said of them
        with contextlib.suppress(ValueError):
            return json.dumps(_changed(draw, json.loads(node)))
    inner = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    if not inner or draw(st.integers(0, 9)) == 9:
        way = draw(st.sampled_from((*(None,) * len(RETYPED), *RETYPED)))
        return copy.deepcopy(draw(st.sampled_from(ATOMS))) if way is None else way(node)
    key = draw(st.sampled_from(inner))
    way = draw(st.sampled_from(("inside", "inside", "inside", "delete", "double")))
    if way == "inside":
        node[key] = _changed(draw, node[key])
    elif way == "delete":
        del node[key]
    elif isinstance(node, list):
        node.insert(key, copy.deepcopy(node[key]))
    else:
        node[f"{key} "] = copy.deepcopy(node[key])
    return node


@st.composite
def damaged(draw: DrawFn, valid: bytes) -> bytes:
    """Bytes with one to three places cut, flipped, filled or exchanged; the first hundred are hit most."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 3))):
        near, far = st.integers(0, min(len(data), 100)), st.integers(0, len(data))
        start, length = draw(near | far), draw(st.integers(1, 16))
        way = draw(st.sampled_from(("cut", "flip", "remove", "insert", "repeat", "exchange")))
        piece = data[start : start + length]
        if way == "cut":
            del data[start:]
        elif way == "flip" and piece:
            data[start] ^= 1 << draw(st.integers(0, 7))
        elif way == "remove":
            del data[start : start + length]
        elif way == "insert":
            data[start:start] = draw(st.binary(min_size=1, max_size=8))
        elif way == "repeat":
            data[start:start] = piece
        elif way == "exchange":
            data[start : start + 2 * length] = data[start + length : start + 2 * length] + piece
    return bytes(data)


NUMBERS = (
    *(*(0, 1, 2, -1, -2, 100), *(2**31 - 1, -(2**31), 2**62, 2**63 - 1, -(2**63))),
    # NaN and infinity as float64
    *(0x7FF8 << 48, 0x7FF0 << 48),
)


@st.composite
def numbers(draw: DrawFn, valid: bytes) -> bytes:
    """Bytes with a number of 4 or 8 of them replaced, wherever it begins."""
    size = draw(st.sampled_from((4, 8)))
    start = draw(st.integers(0, len(valid) - size))
    value = draw(st.sampled_from(NUMBERS)).to_bytes(8, "little", signed=True)[:size]
    return valid[:start] + value + valid[start + size :]


def _json(tree: Any) -> bytes:
    return json.dumps(tree).encode()


def _lines(tree: Any) -> bytes:
    return b"".join(_json(line) + b"\n" for line in tree) if isinstance(tree, list) else _json(tree)


def _csv(tree: Any) -> bytes:
    text = io.StringIO(newline="")
    rows = tree if isinstance(tree, list) else [tree]
    csv.writer(text).writerows(row if isinstance(row, list) else [row] for row in rows)
    return text.getvalue().encode(errors="surrogatepass")


def _safetensors(header: Any, data: bytes) -> bytes:
    text = _json(header)
    return struct.pack("<Q", len(text)) + text + data
