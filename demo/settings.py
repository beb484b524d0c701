"""The settings that study.py compares: how pools are scheduled, and how fine the experts are.

Every setting has the demo's tokens, layers, width and parameters of routed experts. EMO is compared with the standard
MoE of the same shape: the same number and width of experts, the same sequences per step and the same balance loss.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from demo.recipe import QUICK, Model, Size, main_models
from emo_megatron.config import broken, raise_problems
from emo_megatron.report.rows import EMO, SMALL, STANDARD

SCHEDULE: dict[str, Any] = {"pool_decay": 0.6, "pool_delay": 0.0, "pool_skew": 1.0, "unrestricted": 0.0, "balance": 0.1}
BASE = Size(
    steps=800,
    rows=16,
    seq_length=256,
    layers=4,
    hidden=128,
    heads=4,
    experts=32,
    expert_hidden=64,
    shared_hidden=64,
    top_k=2,
    pool_min=6,
    fractions=(0.5, 0.25, 0.125, 0.0625),
    evaluation_tokens=16384,
    calibration_tokens=8192,
    lr=3e-3,
    warmup=40,
    **SCHEDULE,
)
"""The demo's size before the study: what the settings change. The demo now has the setting delay25-min16-shared."""
QUICK_BASE = replace(QUICK, experts=8, expert_hidden=32, shared_hidden=32, top_k=2, pool_min=2, **SCHEDULE)
SHAPE = ("experts", "expert_hidden", "shared_hidden", "top_k", "rows", "micro_rows", "balance")
"""Fields of Size that the standard MoE shares with EMO."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting."""

    name: str
    about: str
    """For people."""
    model: str = EMO
    """emo, standard or small."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of Size that differ from the base."""

    def size(self, *, steps: int, base: Size = BASE) -> Size:
        """The size of the models. A step with more rows means fewer steps, so that the tokens are the same."""
        changed = replace(base, steps=steps, **self.changes)
        return replace(changed, steps=steps * base.rows // changed.rows)

    def model_at(self, size: Size, *, seed: int) -> Model:
        """The model to train."""
        return next(model for model in main_models(size, seed=seed) if model.name == self.model)

    def of_shape(self, model: str) -> str:
        """Name of the setting of another model with the same shape."""
        suffix = next((s for s, shape in SHAPES.items() if shape == self.shape), None)
        assert suffix is not None, self.name
        return model + suffix

    @property
    def shape(self) -> dict[str, Any]:
        """The changes that models of the same shape share."""
        return {name: value for name, value in self.changes.items() if name in SHAPE}


FINE: dict[str, Any] = {"experts": 64, "expert_hidden": 32, "top_k": 4}
"""Twice as many experts of half the width: the same parameters and the same FLOPs of routed experts."""
SHARED: dict[str, Any] = {"experts": 64, "expert_hidden": 32, "shared_hidden": 128, "top_k": 2}
"""The same routed parameters and active parameters. The shared expert has two thirds of the active width."""
WIDE: dict[str, Any] = {"rows": 64, "micro_rows": 16}
"""Four micro-batches per step: the load is balanced over 64 sequences instead of 16. A quarter of the steps."""
LIGHT: dict[str, Any] = SHARED | {"balance": 0.01}
"""A tenth of the demo's balance loss."""
SHAPES: dict[str, dict[str, Any]] = {"": {}, "-fine": FINE, "-shared": SHARED, "-light": LIGHT, "-wide": WIDE}
"""Suffix of a setting's name -> changes of Size."""
AT_ONCE: dict[str, Any] = {"pool_decay": 0.0, "pool_min": 4}
"""Pools of the final sizes as soon as pools start."""

SETTINGS = (
    Setting(name="standard", about="standard MoE", model=STANDARD),
    Setting(name="standard-fine", about="standard MoE, 64 experts of width 32, top-4", model=STANDARD, changes=FINE),
    Setting(
        name="standard-shared",
        about="standard MoE, 64 experts of width 32, top-2, shared expert of width 128",
        model=STANDARD,
        changes=SHARED,
    ),
    Setting(
        name="standard-light",
        about="as standard-shared, with a tenth of the balance loss",
        model=STANDARD,
        changes=LIGHT,
    ),
    Setting(
        name="standard-wide",
        about="standard MoE, 64 sequences per step, a quarter of the steps",
        model=STANDARD,
        changes=WIDE,
    ),
    Setting(name="small", about="standard MoE with a quarter of the experts", model=SMALL),
    Setting(
        name="small-fine",
        about="standard MoE with a quarter of 64 experts of width 32, top-4",
        model=SMALL,
        changes=FINE,
    ),
    Setting(
        name="small-shared",
        about="standard MoE with a quarter of 64 experts of width 32, top-2, shared expert of width 128",
        model=SMALL,
        changes=SHARED,
    ),
    Setting(name="small-light", about="as small-shared, with a tenth of the balance loss", model=SMALL, changes=LIGHT),
    Setting(
        name="small-wide",
        about="standard MoE with a quarter of the experts, 64 sequences per step",
        model=SMALL,
        changes=WIDE,
    ),
    Setting(name="falls", about="lower bound falls to 6 over the first 60 %"),
    Setting(name="delay25", about="no pools to 25 %, then 4 to 32", changes=AT_ONCE | {"pool_delay": 0.25}),
    Setting(name="delay50", about="no pools to 50 %, then 4 to 32", changes=AT_ONCE | {"pool_delay": 0.5}),
    Setting(
        name="delay50-skew2",
        about="no pools to 50 %, then 4 to 32 with skew 2",
        changes=AT_ONCE | {"pool_delay": 0.5, "pool_skew": 2.0},
    ),
    Setting(
        name="falls-shared", about="large shared expert, lower bound falls to 12", changes=SHARED | {"pool_min": 12}
    ),
    Setting(
        name="delay25-shared",
        about="large shared expert, no pools to 25 %, then 8 to 64",
        changes=SHARED | AT_ONCE | {"pool_min": 8, "pool_delay": 0.25},
    ),
    Setting(
        name="delay50-shared",
        about="large shared expert, no pools to 50 %, then 8 to 64",
        changes=SHARED | AT_ONCE | {"pool_min": 8, "pool_delay": 0.5},
    ),
    Setting(
        name="delay25-min12-shared",
        about="large shared expert, no pools to 25 %, then 12 to 64",
        changes=SHARED | AT_ONCE | {"pool_min": 12, "pool_delay": 0.25},
    ),
    Setting(
        name="delay25-min16-shared",
        about="large shared expert, no pools to 25 %, then 16 to 64",
        changes=SHARED | AT_ONCE | {"pool_min": 16, "pool_delay": 0.25},
    ),
    Setting(
        name="delay25-min16-skew1.2-shared",
        about="large shared expert, no pools to 25 %, then 16 to 64 with skew 1.2",
        changes=SHARED | AT_ONCE | {"pool_min": 16, "pool_delay": 0.25, "pool_skew": 1.2},
    ),
    Setting(
        name="delay25-min16-skew1.3-shared",
        about="large shared expert, no pools to 25 %, then 16 to 64 with skew 1.3",
        changes=SHARED | AT_ONCE | {"pool_min": 16, "pool_delay": 0.25, "pool_skew": 1.3},
    ),
    Setting(
        name="delay25-skew2-shared",
        about="large shared expert, no pools to 25 %, then 8 to 64 with skew 2",
        changes=SHARED | AT_ONCE | {"pool_min": 8, "pool_delay": 0.25, "pool_skew": 2.0},
    ),
    Setting(
        name="delay25-free15-shared",
        about="large shared expert, no pools to 25 %, then 8 to 64, 15 % of the documents unrestricted",
        changes=SHARED | AT_ONCE | {"pool_min": 8, "pool_delay": 0.25, "unrestricted": 0.15},
    ),
    Setting(
        name="delay25-light",
        about="as delay25-shared, with a tenth of the balance loss",
        changes=LIGHT | AT_ONCE | {"pool_min": 8, "pool_delay": 0.25},
    ),
    Setting(
        name="delay25-skew2",
        about="no pools to 25 %, then 4 to 32 with skew 2",
        changes=AT_ONCE | {"pool_delay": 0.25, "pool_skew": 2.0},
    ),
    Setting(name="falls-fine", about="64 experts, lower bound falls to 12", changes=FINE | {"pool_min": 12}),
    Setting(
        name="delay25-fine",
        about="64 experts, no pools to 25 %, then 8 to 64",
        changes=FINE | AT_ONCE | {"pool_min": 8, "pool_delay": 0.25},
    ),
    Setting(
        name="delay25-free15",
        about="no pools to 25 %, then 4 to 32, 15 % of the documents unrestricted",
        changes=AT_ONCE | {"pool_delay": 0.25, "unrestricted": 0.15},
    ),
    Setting(
        name="falls-wide", about="64 sequences per step, a quarter of the steps, lower bound falls to 6", changes=WIDE
    ),
)
"""In the order of the runs: the standard MoE of a shape comes before EMO of this shape."""


def find(name: str) -> Setting:
    """The setting of this name.

    Raises:
        ValueError: if there is none.
    """
    for setting in SETTINGS:
        if setting.name == name:
            return setting
    raise ValueError(f"a setting must be one of {', '.join(s.name for s in SETTINGS)}; got {name}")


def check(setting: Setting, size: Size) -> None:
    """Check that Megatron supports a setting and that its modules can be cut out.

    Raises:
        ValueError: one line per problem.
    """
    # imports Megatron
    from emo_megatron.mcore.args import add_pool_args, pool_config_from_args

    parser = add_pool_args(argparse.ArgumentParser(allow_abbrev=False))
    flags = setting.model_at(size, seed=1).flags
    try:
        pool = pool_config_from_args(parser.parse_known_args(flags)[0])
    except ValueError as error:
        raise ValueError(f"setting {setting.name}: {error}") from None
    kept = size.experts // 4
    problems = broken(
        (size.steps < 1, f"{size.steps} steps are too few"),
        (size.rows % size.micro_batch_size != 0, "rows must be a multiple of micro_rows"),
        (size.experts % 8 != 0, f"an eighth of {size.experts} experts is no whole number"),
        (kept < size.top_k, f"a quarter of {size.experts} experts is fewer than top_k {size.top_k}"),
        (not 0 <= size.pool_delay < 1, f"pool_delay must be in [0, 1); got {size.pool_delay}"),
        *((True, text) for text in pool.problems_with_model(num_experts=size.experts, top_k=size.top_k)),
    )
    raise_problems(f"setting {setting.name}", problems)
