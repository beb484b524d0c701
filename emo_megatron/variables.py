"""Environment variables of this package's processes: none takes itself for a part of another job, or uses a network.

A command may be called in the middle of anything: a job of torchrun, Slurm or MPI, whose variables are all around.
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
"""Process id of the process that started this one, and with which it ends. Users' own torchrun and nohup set none."""
IN_RANKS = "EMO_IN_RANKS"
"""Set in the processes in which a command runs itself again, see `runners.launch`."""

REMOVED = {
    "which process of how many this is: torch.distributed, Megatron": """
        RANK LOCAL_RANK NODE_RANK GROUP_RANK ROLE_RANK CROSS_RANK ROLE_NAME JOB_COMPLETION_INDEX
        WORLD_SIZE LOCAL_WORLD_SIZE GROUP_WORLD_SIZE ROLE_WORLD_SIZE CROSS_SIZE TORCHCOMM_*""",
    "the same of other launchers: Megatron, accelerate, NVSHMEM, UCC": """
        SLURM_* OMPI_* PMI_* PMI2_* PMIX_* PRTE_* MPI_* MV2_* HOROVOD_* PALS_* ALPS_APP_* FLUX_*
        JSM_NAMESPACE_* DLTS_* ACCELERATE_* FSDP_* FT_*""",
    # gloo's too: processes of one host need no interface of its cluster, which may lead nowhere here
    "where processes meet, and over what: torch.distributed, gloo, NCCL, NVSHMEM": """
        MASTER_ADDR MASTER_PORT USE_LIBUV NCCL_COMM_ID NVSHMEM_BOOTSTRAP* DCP_USE_PREFIX_STORE
        GLOO_* TORCH_GLOO_* TP_SOCKET_IFNAME TORCH_DIST_* TORCH_DISTRIBUTED_USE_TORCHCOMMS""",
    # PYTHON_EXEC is what ranks run in, and a LOGLEVEL in lower case is torchrun's end
    "torchrun: its agent's store, files and sockets, and flags that nobody gave": """
        TORCHELASTIC_* TORCH_ELASTIC_* TORCH_WORKER_SERVER_SOCKET TORCH_DISABLE_SHARE_RDZV_TCP_STORE
        PET_* PYTHON_EXEC LOGLEVEL""",
    "Python: no asserts, by which Megatron checks flags; and waits for input at the end": """
        PYTHONOPTIMIZE PYTHONINSPECT""",
}
"""What they reach -> names of variables, `*` for any end, that a process of this package does not inherit.

All others stay, for they say what the machine is like or what its user wants: NCCL_* (but its meeting point),
TORCH_NCCL_*, UCX_*, UCC_*, CUDA_*, NVTE_*, MEGATRON_*, TORCH_DISTRIBUTED_DEBUG, OMP_*, PYTHONPATH and the rest.
"""
ALONE = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    # any free one
    "MASTER_PORT": "0",
}
"""A process that is rank 0 without torchrun; torchrun replaces these in its ranks."""
DEFAULTS = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
"""For what is not around."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
"""Variables that keep the Hugging Face libraries off the network, in this process and those it starts."""
_REMOVED_NAMES = " ".join(REMOVED.values()).split()


def process_environment() -> dict[str, str]:
    """The environment of a process that this one starts: a single process, torchrun, or a command."""
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
    """Fetch nothing from here on, whatever the environment says: no command has a flag that asks for it."""
    os.environ.update(OFFLINE)
    # the libraries read that once, and one of them may have been imported
    if hub := sys.modules.get("huggingface_hub.constants"):
        vars(hub)["HF_HUB_OFFLINE"] = True


def without_other_jobs(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables that are not REMOVED."""
    return {
        name: value
        for name, value in variables.items()
        if not any(fnmatchcase(name, pattern) for pattern in _REMOVED_NAMES)
    }


@contextlib.contextmanager
def as_no_other_job() -> Iterator[None]:
    """This process without the variables that are REMOVED, for a command or a group of it alone; they come back."""
    kept = without_other_jobs(os.environ)
    removed = {name: os.environ.pop(name) for name in os.environ.keys() - kept.keys()}
    try:
        yield
    finally:
        os.environ.update(removed)
