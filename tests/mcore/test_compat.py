"""Versions of Megatron: what its wheel lacks."""

from __future__ import annotations

import pytest
from megatron.core.datasets import utils

from emo_megatron.mcore.compat import use_compiled_index_builder


@pytest.mark.parametrize("has_makefile", [True, False])
def test_only_a_clone_compiles_the_index_builder(monkeypatch, tmp_path, has_makefile):
    """The wheel has none, and megatron.training exits where `make` fails."""
    compiled = []
    monkeypatch.setattr(utils, "compile_helpers", lambda: compiled.append(True))
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))
    if has_makefile:
        (tmp_path / "Makefile").touch()
    use_compiled_index_builder()
    utils.compile_helpers()
    assert bool(compiled) == has_makefile
