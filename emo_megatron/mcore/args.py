"""Command-line flags of document pools in Megatron's parser, and the checks of all flags before a model is built."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
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
    """Add one flag per PoolConfig field, and three flags of training (Megatron's extra_args_provider)."""
    repair_help(parser)
    suggest_flags(parser)
    group = parser.add_argument_group(
        "document pools",
        "EMO (arXiv 2605.06663): all tokens of a document choose their experts from one pool of experts per layer. "
        "Pools are off without --pool-min.",
    )
    _add_fields(group)
    group.add_argument(
        "--override-pool-config",
        action="store_true",
        help="Resume from a checkpoint that was trained with other --pool-* values; training continues with the values "
        "given here. Without this flag, different values are an error.",
    )
    group.add_argument(
        "--max-documents",
        type=int,
        metavar="N",
        help="Number of documents per micro-batch, over all its samples, that padding must leave room for. All "
        "micro-batches get one length: the most tokens that N documents can need. A micro-batch that needs more is an "
        "error. Only for packed documents with --context-parallel-size above 1. Default: each micro-batch is as long "
        "as its own documents need.",
    )
    group.add_argument(
        "--mtp-exact-loss",
        action="store_true",
        help="Divide the losses of multi-token prediction by the number of tokens of the main loss. Parallel layouts "
        "then change these losses as little as the main loss. Without this flag Megatron divides by the number of "
        "counted tokens in the micro-batch of each rank.",
    )
    return parser


def _add_fields(group: argparse._ActionsContainer) -> None:
    """Add one flag per field of PoolConfig. The string under the field is also the flag's --help text (_help_of)."""
    kinds, documentation = typing.get_type_hints(PoolConfig), _field_documentation()
    for field in dataclasses.fields(PoolConfig):
        options: dict[str, Any] = {"help": _help_of(field, documentation[field.name]), "default": field.default}
        kind, *others = typing.get_args(kinds[field.name]) or (kinds[field.name],)
        if kind is bool:
            options["action"] = "store_true"
        elif typing.get_origin(kinds[field.name]) is typing.Literal:
            options["choices"] = (kind, *others)
        else:
            options |= {"type": _none_or(kind) if NoneType in others else kind, "metavar": kind.__name__.upper()}
        group.add_argument(flag(field.name), **options)


def _help_of(field: dataclasses.Field[Any], documentation: str) -> str:
    """The --help text of a field: with flags instead of field names, words as they are typed, and the default."""
    text = re.sub(r"\bpool_\w+", lambda name: flag(name[0]), documentation).replace("None", "none")
    default = {"None": "none", "False": "off"}.get(str(field.default), field.default)
    return f"{text} (default: {default})"


def _field_documentation() -> dict[str, str]:
    """Map each field of PoolConfig to the string under the field in the source, escaped for argparse."""
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
    """The PoolConfig of the parsed flags. Raises ValueError for flags on which Megatron would stop at an assertion."""
    pool = PoolConfig(**{f.name: getattr(args, f.name) for f in dataclasses.fields(PoolConfig)})
    if getattr(args, "context_parallel_size", 1) > 1 and pool.pool_documents == "attention":
        # batches.py cuts packed micro-batches document by document
        pool = dataclasses.replace(pool, pool_cp_partition="document")
    raise_problems(_REFUSED, combinations.problems_with_routing(pool, args, only_asserted=True))
    return pool


def check_run(
    pool: PoolConfig, config: TransformerConfig, args: argparse.Namespace, *, rows: Sequence[Unsupported] = SCRIPT
) -> None:
    """Raise one ValueError with all options of this run that are not supported; one line per option.

    Args:
        rows: the options that the running script does not support: SCRIPT for `pretrain_emo.py`, HOST for Megatron's
            own scripts.
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
            f"with --dataloader-type {args.dataloader_type} pool sizes will depend on the number of data-parallel "
            "ranks; use --dataloader-type single, or keep the number of data-parallel ranks for the whole run",
            stacklevel=2,
        )
    # a row for the model and a row for the flags may give the same line
    raise_problems(_REFUSED, list(dict.fromkeys(problems)))
