"""The method's flags in Megatron's parser, and the check of everything asked for before anything is built."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import typing
import warnings
from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

from emo_megatron.arguments import suggest_flags
from emo_megatron.config import PoolConfig, flag, raise_problems
from emo_megatron.mcore import combinations
from emo_megatron.mcore.compat import repair_help
from emo_megatron.mcore.unsupported import CONVERSATIONS, SCRIPT, Unsupported, problems_of

_REFUSED = "this run cannot start"


def add_pool_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add one flag for every PoolConfig field, documented by that field (Megatron's extra_args_provider)."""
    repair_help(parser)
    suggest_flags(parser)
    group = parser.add_argument_group(
        "document pools", "EMO: every token of a document chooses its experts inside one pool. Off without --pool-min."
    )
    _add_fields(group)
    group.add_argument(
        "--override-pool-config",
        action="store_true",
        help="Resume a run although the pools it was trained with differ from these.",
    )
    group.add_argument(
        "--max-documents",
        type=int,
        metavar="N",
        help="With context parallelism and packed documents: give every micro-batch the length that N documents need, "
        "those of all its samples together, padding included. Without it, micro-batches are as long as their own "
        "documents need.",
    )
    group.add_argument(
        "--mtp-exact-loss",
        action="store_true",
        help="Divide the losses of multi-token prediction by the tokens of the main loss, so that parallel layouts "
        "change them as little as the main loss. Megatron divides by the counted tokens of each rank's micro-batch.",
    )
    return parser


def _add_fields(group: argparse._ActionsContainer) -> None:
    """A flag for every field of PoolConfig; the string under the field serves reader and --help."""
    kinds, documentation = typing.get_type_hints(PoolConfig), _field_documentation()
    for field in dataclasses.fields(PoolConfig):
        options: dict[str, Any] = {"help": documentation[field.name], "default": field.default}
        kind, *others = typing.get_args(kinds[field.name]) or (kinds[field.name],)
        if kind is bool:
            options["action"] = "store_true"
        elif typing.get_origin(kinds[field.name]) is typing.Literal:
            options["choices"] = (kind, *others)
        else:
            options |= {"type": _none_or(kind) if NoneType in others else kind, "metavar": kind.__name__.upper()}
        group.add_argument(flag(field.name), **options)


def _field_documentation() -> dict[str, str]:
    """Field -> the string under it, from the source."""
    body = ast.parse(inspect.getsource(PoolConfig)).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: " ".join(str(text.value.value).split()).replace("%", "%%")
        for field, text in zip(body.body, body.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


def _none_or(kind: Any) -> Callable[[str], Any]:
    """An argparse type that reads "none" as None."""

    def parse(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    parse.__name__ = kind.__name__
    return parse


def pool_config_from_args(args: argparse.Namespace) -> PoolConfig:
    """The PoolConfig the flags describe."""
    pool = PoolConfig(**{f.name: getattr(args, f.name) for f in dataclasses.fields(PoolConfig)})
    if getattr(args, "context_parallel_size", 1) > 1 and pool.pool_documents == "attention":
        # as batches.py cuts
        pool = dataclasses.replace(pool, pool_cp_partition="document")
    raise_problems(_REFUSED, combinations.problems_with_routing(pool, args, only_asserted=True))
    return pool


def check_run(
    pool: PoolConfig, config: TransformerConfig, args: argparse.Namespace, *, rows: Sequence[Unsupported] = SCRIPT
) -> None:
    """Refuse what this package would do wrong or silently not do, all of it in one error.

    `rows` are of the script that runs: `pretrain_emo.py`'s, or HOST of Megatron's own.
    """
    problems = combinations.problems_with_config(pool, config) + problems_of(rows, args, has_pools=pool.is_on)
    if rows is SCRIPT:
        problems += problems_of(CONVERSATIONS if args.sft else (), args)
        problems += combinations.problems_with_restarts(args)
        problems += combinations.problems_with_long_context(pool, args)
    else:
        is_packed = args.dataloader_inter_document_masking
        problems += combinations.problems_with_prediction(args, is_packed=is_packed)
    problems += combinations.problems_with_boundaries(pool, args)
    problems += combinations.problems_with_sharded_optimizer(args) + combinations.problems_with_delay(pool, args)
    if pool.is_on and args.dataloader_type != "single":
        warnings.warn(
            f"--dataloader-type {args.dataloader_type}: pool sizes will depend on the number of "
            "data-parallel ranks; with --dataloader-type single they do not",
            stacklevel=2,
        )
    # a row on the model and one on the flags may say the same
    raise_problems(_REFUSED, list(dict.fromkeys(problems)))
