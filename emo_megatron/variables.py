"""Environment variables of the processes that this package starts: no variables of other jobs, and no network.

A command may run inside another job of torchrun, Slurm or MPI. Its processes must not inherit that job's variables.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARENT = "EMO_PARENT"
"""Process id of the parent; this process ends with the parent. Not set under a user's own torchrun or nohup."""
IN_RANKS = "EMO_IN_RANKS"
"""Set in the ranks that a command starts to run itself in several processes; see `runners.launch`."""

REMOVED = {
    "rank and world size: torch.distributed, Megatron": """
        RANK LOCAL_RANK NODE_RANK GROUP_RANK ROLE_RANK CROSS_RANK ROLE_NAME JOB_COMPLETION_INDEX
        WORLD_SIZE LOCAL_WORLD_SIZE GROUP_WORLD_SIZE ROLE_WORLD_SIZE CROSS_SIZE TORCHCOMM_*""",
    "rank and world size in other launchers: Megatron, accelerate, NVSHMEM, UCC": """
        SLURM_* OMPI_* PMI_* PMI2_* PMIX_* PRTE_* MPI_* MV2_* HOROVOD_* PALS_* ALPS_APP_* FLUX_*
        JSM_NAMESPACE_* DLTS_* ACCELERATE_* FSDP_* FT_*""",
    # gloo's network interfaces too: processes of one host do not need a cluster's interface, which may not work here
    "addresses and network interfaces: torch.distributed, gloo, NCCL, NVSHMEM": """
        MASTER_ADDR MASTER_PORT USE_LIBUV NCCL_COMM_ID NVSHMEM_BOOTSTRAP* DCP_USE_PREFIX_STORE
        GLOO_* TORCH_GLOO_* TP_SOCKET_IFNAME TORCH_DIST_* TORCH_DISTRIBUTED_USE_TORCHCOMMS""",
    # PYTHON_EXEC replaces the interpreter of ranks; torchrun fails on a LOGLEVEL in lower case
    "torchrun: store, files and sockets of its agent, and flags set by variables": """
        TORCHELASTIC_* TORCH_ELASTIC_* TORCH_WORKER_SERVER_SOCKET TORCH_DISABLE_SHARE_RDZV_TCP_STORE
        PET_* PYTHON_EXEC LOGLEVEL""",
    "Python: removal of asserts (Megatron checks flags by asserts), and a prompt at exit": """
        PYTHONOPTIMIZE PYTHONINSPECT""",
}
"""Purpose -> names of variables that processes of this package do not inherit; `*` matches any ending.

All other variables stay, because they describe the machine or the user's settings: NCCL_* (except NCCL_COMM_ID),
TORCH_NCCL_*, UCX_*, UCC_*, CUDA_*, NVTE_*, MEGATRON_*, TORCH_DISTRIBUTED_DEBUG, OMP_*, PYTHONPATH and the rest.
"""
ALONE = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    # any free port
    "MASTER_PORT": "0",
}
"""Variables of a process that is rank 0 without torchrun; torchrun replaces them in its ranks."""
DEFAULTS = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
"""Values of variables that are not set."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
"""Variables that keep the Hugging Face libraries off the network, in this process and its child processes."""
_REMOVED_NAMES = " ".join(REMOVED.values()).split()


def process_environment() -> dict[str, str]:
    """The environment of a process that this process starts: a single process, torchrun, or a command."""
    paths = (str(ROOT), os.environ.get("PYTHONPATH"))
    own = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        PARENT: str(os.getpid()),
        # torchrun's ranks must not outlive it by half a minute
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1",
    }
    around = without_other_jobs(os.environ)
    around.pop(IN_RANKS, None)
    return DEFAULTS | around | ALONE | OFFLINE | own


def stay_offline() -> None:
    """Disable all downloads from now on, whatever the environment sets: no command has a flag for downloads."""
    os.environ.update(OFFLINE)
    # the libraries read the variables once, at import, and may be imported already
    if hub := sys.modules.get("huggingface_hub.constants"):
        vars(hub)["HF_HUB_OFFLINE"] = True


def without_other_jobs(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables without those in REMOVED."""
    return {
        name: value
        for name, value in variables.items()
        if not any(fnmatchcase(name, pattern) for pattern in _REMOVED_NAMES)
    }


@contextlib.contextmanager
def as_no_other_job() -> Iterator[None]:
    """Remove the variables in REMOVED inside the block, so that this process is in no other job; then restore them."""
    kept = without_other_jobs(os.environ)
    removed = {name: os.environ.pop(name) for name in os.environ.keys() - kept.keys()}
    try:
        yield
    finally:
        os.environ.update(removed)
