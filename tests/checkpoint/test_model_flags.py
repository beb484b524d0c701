"""emo_megatron.checkpoint.model_flags: every flag of Megatron's is known to make the model or not to."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from emo_megatron.checkpoint import flag_lists, model_flags
from emo_megatron.hf.megatron import MODEL_FLAGS, REQUIREMENTS

OLD = Path(__file__).resolve().parents[2] / ".venv" / "megatron-core-0.18"


class _Stored:
    """A checkpoint of these flags."""

    path = Path("checkpoint")

    def __init__(self, **flags):
        self.args = argparse.Namespace(**flags)


def unclassified():
    """Flags of this Megatron that are in no list or in several."""
    lists = (flag_lists.FUNCTION, flag_lists.AS_TRAINED, flag_lists.NOT_THE_MODEL)
    times = Counter(name for names in lists for name in names)
    flags = model_flags.flags_of_models(model_flags.megatron_parser())
    assert len(flags) > 300
    return sorted({flag.dest for flag in flags if times[flag.dest] != 1})


def test_every_flag_is_in_one_list():
    assert unclassified() == []


@pytest.mark.skipif(not OLD.exists(), reason="megatron-core 0.18 is not installed beside")
def test_every_flag_of_the_older_megatron_is_in_one_list():
    script = (
        "import sys; sys.path[:0] = sys.argv[1:]; import test_model_flags as t, megatron.core as m;"
        "print(m.__version__, t.unclassified())"
    )
    paths = [str(OLD), str(Path(__file__).parent)]
    found = subprocess.run(
        [sys.executable, "-c", script, *paths],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    version, _, names = found.stdout.strip().partition(" ")
    assert version.startswith("0.18.2")
    assert names == "[]"


def test_what_an_export_reads_or_refuses_changes_the_function():
    assert {r.field for r in REQUIREMENTS} | set(MODEL_FLAGS) <= flag_lists.FUNCTION


def test_a_flag_that_is_not_known_is_refused_unless_it_is_at_its_default():
    checkpoint = _Stored(num_layers=2, made_up=3)
    parser = model_flags.megatron_parser()
    (group,) = (g for g in parser._action_groups if g.title == "moe")
    group.add_argument("--made-up", type=int, default=3)
    assert model_flags.model_flags(checkpoint, parser) == {"num_layers": 2}
    checkpoint.args.made_up = 4
    with pytest.raises(ValueError, match="--made-up 4"):
        model_flags.model_flags(checkpoint, parser)


def test_layers_of_a_spec_from_elsewhere_are_refused():
    parser = model_flags.megatron_parser()
    ours = _Stored(spec=["emo_megatron.mcore.spec", "pool_layer_spec"])
    assert model_flags.model_flags(ours, parser) == {}
    with pytest.raises(ValueError, match="--spec mine"):
        model_flags.model_flags(_Stored(spec=["mine.layers", "spec"]), parser)


def test_the_name_that_a_flag_once_had_counts():
    parser = model_flags.megatron_parser()
    assert model_flags.model_flags(_Stored(norm_epsilon=1e-6), parser) == {"layernorm_epsilon": 1e-6}
    once = _Stored(apply_layernorm_1p=True)
    assert model_flags.model_flags(once, parser) == {"layernorm_zero_centered_gamma": True}
