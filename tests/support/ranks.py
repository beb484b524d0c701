"""Real processes over gloo that stay alive between tests: a test sends a function, every rank runs it.

Forked once per world size from a process that has imported torch and Megatron, which takes seconds. A function is named
by its file and name, so that the ranks import it themselves; Megatron's groups are destroyed after each call. Forks
share the seed of hashes: a collective in the order of a set's strings fails under torchrun only.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib.util
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from emo_megatron.processes import follow
from emo_megatron.variables import process_environment

TESTS = Path(__file__).resolve().parents[1]
RANK = {"OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "EMO_DEVICE": "cpu"}


class Ranks:
    """`world_size` processes joined in one gloo group, Megatron on the CPU active in each."""

    def __init__(self, world_size: int, *, megatron: Path | None = None) -> None:
        """Start the processes.

        Args:
            world_size: processes.
            megatron: folder to import megatron from instead of the installed one.
        """
        self.world_size = world_size
        context = forking() if megatron is None else multiprocessing.get_context("spawn")
        port = free_port()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            # the caller's, and not those around the process that is forked
            own = process_environment() | RANK
            own |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_PORT": str(port)}
            own |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world_size)}
            process = context.Process(target=_serve, args=(theirs, own, megatron, os.getpid()), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *, timeout: float = 180.0, **arguments: Any) -> list[Any]:
        """Call `function(**arguments)` on every rank.

        Returns:
            What each rank returned, by rank.

        Raises:
            RuntimeError: a rank raised, died or did not answer in `timeout` seconds; the processes are gone then, as
                after any error: an answer that was not taken would be the next call's.
        """
        try:
            return self._run(function, timeout, arguments)
        except BaseException:
            self.close()
            raise

    def _run(self, function: Callable[..., Any], timeout: float, arguments: dict[str, Any]) -> list[Any]:
        path = Path(sys.modules[function.__module__].__file__ or "")
        for pipe in self._pipes:
            pipe.send((str(path), function.__name__, arguments))
        answers: dict[int, Any] = {}
        while len(answers) < self.world_size:
            pending = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in answers}
            ready = wait(list(pending), timeout)
            if not ready:
                raise RuntimeError(f"ranks {sorted(pending.values())} did not answer in {timeout:.0f} s")
            for pipe in ready:
                try:
                    is_error, value = pipe.recv()
                except EOFError:
                    raise RuntimeError(f"rank {pending[pipe]} died") from None
                if is_error:
                    raise RuntimeError(f"rank {pending[pipe]}: {value}")
                # every tensor that came holds an open file, and tests keep thousands of them
                answers[pending[pipe]] = copy.deepcopy(value)
        return [answers[rank] for rank in range(self.world_size)]

    @property
    def is_alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        for process in self._processes:
            kill_group(process)


def kill_group(leader: BaseProcess) -> None:
    """End a process with those that Megatron started in it to write checkpoints."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader.pid, signal.SIGKILL)
    leader.kill()
    leader.join()


def forking() -> ForkServerContext:
    """Forks of one process with what every rank imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.rank_imports"])
    own = process_environment() | RANK
    own["PYTHONPATH"] = os.pathsep.join((str(TESTS), own["PYTHONPATH"]))
    with pytest.MonkeyPatch.context() as around:
        for name in os.environ.keys() - own:
            around.delenv(name)
        for name, value in own.items():
            around.setenv(name, value)
        multiprocessing.forkserver.ensure_running()
    return context


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serve(pipe: Connection, environment: dict[str, str], megatron: Path | None, parent: int) -> None:
    os.setsid()
    follow(parent)
    os.environ.clear()
    os.environ.update(environment)
    # a daemon ends with its parent, but may not start the processes in which Megatron writes checkpoints
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    sys.path.insert(0, str(TESTS))
    if megatron is not None:
        sys.path.insert(0, str(megatron))
    import torch

    # a fork server passes over what it cannot import
    assert megatron is not None or "support.rank_imports" in sys.modules
    torch.set_num_threads(1)
    from emo_megatron.mcore import cpu

    cpu.activate()
    torch.distributed.init_process_group("gloo")
    while True:
        try:
            path, name, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((False, getattr(_load(path), name)(**arguments)))
        except BaseException:
            pipe.send((True, traceback.format_exc()))
        _forget_groups()


def _load(path: str) -> Any:
    name = "ranks_" + str(abs(hash(path)))
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def _forget_groups() -> None:
    """Destroy every group but the world's: each holds threads that poll, and hundreds would pile up."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    parallel_state.destroy_model_parallel()
    destroy_moe_metrics_tracker()
    # set at its first use, in a shape that the next test's schedule may not be able to write into
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    gc.collect()
