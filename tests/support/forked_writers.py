"""Importing this makes the process that keeps what Megatron's writers of a checkpoint say a fork.

Megatron spawns that process, which imports torch, in every rank of every run that saves.
"""

from megatron.core.dist_checkpointing.strategies import filesystem_async

_queue = filesystem_async.get_write_results_queue
filesystem_async.get_write_results_queue = lambda mp_mode="fork": _queue(mp_mode)
