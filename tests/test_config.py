"""PoolConfig: validation, all problems at once; the schedule of the lower bound."""

from __future__ import annotations

import pytest

from emo_megatron.config import PoolConfig, load_pool_config


def test_default_is_off():
    assert not PoolConfig().is_on
    assert PoolConfig(pool_min=2).is_on


MASS = {"pool_min": 4, "pool_rule": "top_p", "pool_top_p": 0.5}


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"pool_min": 0}, ["--pool-min"]),
        ({"pool_min": 4, "pool_max": 3}, ["--pool-max"]),
        ({"pool_min": 4, "pool_forced": 5}, ["--pool-forced"]),
        ({"pool_min": 4, "pool_unrestricted": 1.5}, ["--pool-unrestricted"]),
        ({"pool_min": 4, "pool_rule": "top_p"}, ["--pool-top-p"]),
        ({"pool_min": 4, "pool_top_p": 0.5}, ["--pool-top-p"]),
        ({"pool_min": 4, "pool_rule": "top_p", "pool_top_p": 1.0}, ["--pool-top-p"]),
        ({"pool_min": 4, "pool_rule": "nearest"}, ["--pool-rule"]),
        ({"pool_min": 4, "pool_min_start": 8}, ["--pool-min-decay-samples"]),
        ({"pool_min": 4, "pool_min_start": 2, "pool_min_decay_samples": 9}, ["--pool-min-start"]),
        ({"pool_min": 4, "pool_max": 8, "pool_min_start": 9, "pool_min_decay_samples": 9}, ["--pool-min-start"]),
        ({"pool_max": 8, "pool_forced": 1, "pool_eval": 4}, ["--pool-max", "--pool-forced", "--pool-eval"]),
        ({"pool_min": 4, "pool_forced": 3, "pool_eval": 2}, ["--pool-forced", "--pool-eval"]),
        ({"pool_min": 4, "pool_rule": "top_p", "pool_top_p": 0.5, "pool_unrestricted": 0.1}, ["--pool-unrestricted"]),
        ({"pool_mask": "selection", "pool_scope": "sample"}, ["--pool-mask", "--pool-scope"]),
        ({"pool_min": 4, "pool_max": 3, "pool_forced": -1}, ["--pool-max", "--pool-forced"]),
        ({"pool_min": 4, "pool_unrestricted": float("nan")}, ["--pool-unrestricted"]),
        ({"pool_min": 4, "pool_rule": "top_p", "pool_top_p": float("nan")}, ["--pool-top-p"]),
        ({"pool_documents": "mlp"}, ["--pool-documents"]),
        ({"pool_documents": "routers", "pool_cp_partition": "document"}, ["--pool-documents", "--pool-cp-partition"]),
        *(
            ({"pool_min": 4} | {name: value}, [f"--{name.replace('_', '-')}"])
            for name in ("pool_min", "pool_max", "pool_min_start", "pool_eval", "pool_forced")
            for value in (float("nan"), float("inf"), 2.5, True)
        ),
        ({"pool_min_decay_samples": float("inf"), "pool_seed": None}, ["-decay-", "--pool-seed"]),
        *(({"pool_min": 4, "pool_skew": value}, ["--pool-skew"]) for value in (0.0, -1.0, float("nan"), float("inf"))),
        ({"pool_min": 4, "pool_rule": "top_p", "pool_top_p": 0.5, "pool_skew": 2.0}, ["--pool-skew"]),
        (MASS | {"pool_score": "gate_with_bias"}, ["--pool-score"]),
        (MASS | {"pool_group_scope": "document"}, ["--pool-group-scope"]),
        ({"pool_min": 4, "pool_group_scope": "document", "pool_forced": 1}, ["--pool-forced"]),
        ({"pool_min": 4, "pool_delay_samples": -1}, ["--pool-delay-samples"]),
        ({"pool_min": 4, "pool_delay_samples": 0.5}, ["--pool-delay-samples"]),
        ({"pool_skew": 2.0, "pool_delay_samples": 9}, ["--pool-skew", "--pool-delay-samples"]),
    ],
)
def test_problems_name_their_flags_together(fields, names):
    with pytest.raises(ValueError, match="pool configuration") as caught:
        PoolConfig(**fields)
    for name in names:
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"pool_min": 1}, "--pool-min"),
        ({"pool_min": 4, "pool_max": 64}, "--pool-max"),
        ({"pool_min": 40}, "--pool-min"),
        ({"pool_min": 4, "pool_eval": 1}, "--pool-eval"),
    ],
)
def test_problems_with_the_model(fields, name):
    problems = PoolConfig(**fields).problems_with_model(num_experts=32, top_k=2)
    assert len(problems) == 1
    assert name in problems[0]


def test_lower_bound_falls_linearly_and_stays():
    config = PoolConfig(pool_min=4, pool_min_decay_samples=100)
    lows = [config.size_bounds(num_experts=32, consumed_samples=n)[0] for n in (0, 25, 50, 100, 500)]
    assert lows == [32, 25, 18, 4, 4]
    assert config.size_bounds(num_experts=32, consumed_samples=0)[1] == 32


def test_lower_bound_starts_where_it_is_told():
    config = PoolConfig(pool_min=4, pool_max=20, pool_min_start=12, pool_min_decay_samples=10)
    assert config.size_bounds(num_experts=32, consumed_samples=0) == (12, 20)
    assert config.size_bounds(num_experts=32, consumed_samples=5) == (8, 20)


def test_pools_start_and_the_lower_bound_falls_after_the_delay():
    config = PoolConfig(pool_min=4, pool_min_decay_samples=100, pool_delay_samples=50)
    counts = (0, 49, 50, 75, 100, 150, 500)
    assert [config.is_on_after(n) for n in counts] == [False] * 2 + [True] * 5
    lows = [config.size_bounds(num_experts=32, consumed_samples=n)[0] for n in counts[2:]]
    assert lows == [32, 25, 18, 4, 4]
    assert PoolConfig(pool_min=4).is_on_after(0)
    assert not PoolConfig().is_on_after(10**9)


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("{}", {}),
        ('{"pool_min": 8, "pool_unrestricted": 1}', {"pool_min": 8, "pool_unrestricted": 1.0}),
        (
            '{"pool_min": 8, "pool_eval": null, "pool_check": true, "pool_mask": "selection"}',
            {"pool_min": 8, "pool_check": True, "pool_mask": "selection"},
        ),
        (
            '{"pool_min": 8, "pool_skew": 2, "pool_delay_samples": 100}',
            {"pool_min": 8, "pool_skew": 2.0, "pool_delay_samples": 100},
        ),
    ],
)
def test_a_file_holds_any_fields(tmp_path, text, fields):
    path = tmp_path / "pool.json"
    path.write_text(text)
    assert load_pool_config(path) == PoolConfig(**fields)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, ["must be an existing file"]),
        ("{pool_min: 8}", ["not readable JSON", "line 1 column 2"]),
        (b"\xff\xfe", ["not readable JSON"]),
        ("[8]", ["must be a JSON object", "got [8]"]),
        ('{"pool_min": 8, "pool_mix": 1, "min": 2}', ["pool_mix, did you mean pool_m", "min;", "pool_max"]),
        ('{"pool_min": "8"}', ['pool_min must be a whole number or null; got "8" (a string)']),
        ('{"pool_min": true, "pool_seed": 1.5}', ["pool_min must be", "pool_seed must be"]),
        (
            '{"pool_check": 1, "pool_top_p": "a"}',
            ["pool_check must be true or false; got 1", "pool_top_p must be a number or null"],
        ),
        ('{"pool_min": 8, "pool_mask": "weights"}', ["--pool-mask must be one of"]),
    ],
)
def test_a_wrong_file_is_one_clear_error(tmp_path, text, says):
    path = tmp_path / "pool.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="pool") as error:
        load_pool_config(path)
    for part in [str(path), *says]:
        assert part in str(error.value)
    assert str(error.value).count("pool configuration") == 1
