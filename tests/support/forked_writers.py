"""Importing this makes the process that collects what Megatron's writers of a checkpoint did a fork.

Megatron spawns it, and each imports torch, in every rank of every run that saves.
"""

import functools

from megatron.core.dist_checkpointing.strategies import filesystem_async

filesystem_async.get_write_results_queue = functools.partial(filesystem_async.get_write_results_queue, "fork")
