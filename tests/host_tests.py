"""Megatron-LM's own unit tests on the CPU backend, with its MoE layer or with this package's in its place.

    python tests/host_tests.py CLONE [--layers stock|pool|full-pools|dedup] [tests, and options of pytest]

CLONE is a clone of Megatron-LM; it is read and never changed, and the installed megatron-core is what runs. Without
tests named those of the MoE layer run. Under torchrun every process runs them. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from emo_megatron.config import PoolConfig
from emo_megatron.mcore import cpu

LAYERS = ("stock", "pool", "full-pools", "dedup")
MOE_TESTS = "tests/unit_tests/transformer/moe"
DATA_OF_TESTS = "tests.test_utils.python_scripts.download_unit_tests_dataset"


def main(arguments: list[str]) -> int:
    """Run the tests; returns pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("clone", type=Path, help="a clone of Megatron-LM")
    parser.add_argument(
        "--layers",
        choices=LAYERS,
        default="stock",
        help="stock: Megatron's. pool: this package's, pools off. full-pools: pools on, of all experts, every "
        "micro-batch one document. dedup: pools off, its dispatcher where it is allowed",
    )
    options, rest = parser.parse_known_args(arguments)
    clone = options.clone.resolve()
    if not (clone / "tests/unit_tests").is_dir():
        parser.error(f"clone must hold Megatron-LM's tests/unit_tests; got {options.clone}")
    if not any((clone / word.split("::")[0]).exists() for word in rest if word[0] != "-"):
        rest.append(MOE_TESTS)
    # tests are named from the clone on
    os.chdir(clone)
    prepare(clone)
    flags = ["--import-mode=importlib", f"--rootdir={clone}", f"--confcutdir={clone}"]
    flags += ["-c", os.devnull, "-p", "no:cacheprovider", "--disable-warnings"]
    return pytest.main([*flags, *rest], plugins=[PutInPlace(options.layers)])


def prepare(clone: Path) -> None:
    """Turn the CPU backend on and let `import tests` find the clone's, without the download of its data."""
    cpu.activate()
    # not the clone's folder on the path: megatron-core would be the clone's then
    tests = ModuleType("tests")
    tests.__path__ = [str(clone / "tests")]
    sys.modules["tests"] = tests
    download = ModuleType(DATA_OF_TESTS)
    download.__dict__["download_and_extract_asset"] = lambda **kwargs: False
    sys.modules[DATA_OF_TESTS] = download
    init_process_group: Any = torch.distributed.init_process_group

    def init_gloo(*args: Any, **kwargs: Any) -> None:
        kwargs.pop("device_id", None)
        init_process_group(*args, **kwargs | {"backend": "gloo"})

    module: Any = torch.distributed
    module.init_process_group = init_gloo


class PutInPlace:
    """The pytest plugin that changes the tests that were collected."""

    def __init__(self, layers: str) -> None:
        self.layers = layers

    def pytest_collection_modifyitems(self) -> None:
        """All modules are imported, no test has run."""
        leave_groups_to_teardown()
        if self.layers != "stock":
            put_in_place(self.layers)


def leave_groups_to_teardown() -> None:
    """Let no model of an earlier test end the process groups of a later one; every test's teardown ends its own.

    The tests' models do so when Python collects them: late after a failure, and not on all ranks at once.
    """
    module = sys.modules.get(f"{MOE_TESTS.replace('/', '.')}.test_token_dispatcher")
    container = getattr(module, "MoEModelTestContainer", None)
    if container is not None:
        container.__del__ = lambda self: None


def put_in_place(layers: str) -> type:
    """Make `MoELayer` this package's in every module of Megatron and its tests that imported it; returns the class."""
    from megatron.core.transformer.moe import moe_layer, router

    from emo_megatron.mcore.layer import PoolMoELayer
    from emo_megatron.mcore.router import PoolRouter
    from emo_megatron.mcore.unsupported import DEDUP, problems_of

    importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
    stock = moe_layer.MoELayer

    class HostRouter(PoolRouter):
        """PoolRouter with documents and a layer number, which no test brings."""

        def routing(self, logits: Any, padding_mask: Any = None) -> Any:
            if self.pool.is_on and self.layer_number is None:
                self.layer_number = 1
            if self.pool.is_on and self.scope is None:
                self.scope = one_document(logits.shape[:-1].numel())
                try:
                    return super().routing(logits, padding_mask)
                finally:
                    self.scope = None
            return super().routing(logits, padding_mask)

    class HostMoELayer(PoolMoELayer):
        """PoolMoELayer with the constructor of MoELayer."""

        def __init__(self, config: Any, submodules: Any = None, *args: Any, **kwargs: Any) -> None:
            pool = PoolConfig()
            if layers == "full-pools":
                pool = PoolConfig(pool_min=config.num_moe_experts)
            if layers == "dedup" and not problems_of(DEDUP, config):
                pool = PoolConfig(pool_dispatcher="dedup")
            if submodules.router is router.TopKRouter:
                pool_router = functools.partial(HostRouter, pool=pool)
                submodules = dataclasses.replace(submodules, router=pool_router)
            super().__init__(config, submodules, *args, **kwargs)

    HostMoELayer.__name__ = HostMoELayer.__qualname__ = "MoELayer"
    for name, module in list(sys.modules.items()):
        # not where it is defined: its methods name it in super()
        if (
            name.startswith(("megatron.", "tests."))
            and module is not moe_layer
            and vars(module).get("MoELayer") is stock
        ):
            vars(module)["MoELayer"] = HostMoELayer
    return HostMoELayer


def one_document(num_tokens: int) -> Any:
    """The scope of a micro-batch that is one document."""
    from emo_megatron.documents import DocumentSegments
    from emo_megatron.mcore.context import PoolScope

    bounds = torch.tensor([0, num_tokens])
    segments = DocumentSegments.from_cu_seqlens(bounds, num_tokens=num_tokens)
    return PoolScope(
        segments=segments,
        document_ids_T=segments.document_ids_T,
        sample_positions_D=segments.rows_D,
        consumed_samples=0,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
