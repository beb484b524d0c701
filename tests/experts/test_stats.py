"""Statistics files: what they hold, that they add up, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import experts

from emo_megatron.cli import main
from emo_megatron.experts.stats import FIRST_NAMES, LayerSums, load_stats, merge_stats, residual_change_of
from emo_megatron.finite import NotFiniteError


def assert_same(got, want):
    assert got.tensors().keys() == want.tensors().keys()
    for name, tensor in want.tensors().items():
        assert torch.equal(got.tensors()[name], tensor), name
    for name in ("model", "num_documents", "num_tokens", "data"):
        assert getattr(got, name) == getattr(want, name)


@pytest.mark.parametrize("outputs", [True, False])
def test_a_saved_file_is_read_back(tmp_path, outputs):
    stats = experts.statistics(outputs=outputs)
    assert_same(load_stats(stats.save(tmp_path / "new" / "s.safetensors")), stats)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["s.safetensors"]


@pytest.mark.parametrize("outputs", [True, False])
def test_a_file_of_the_first_format_is_read(tmp_path, outputs):
    stats = experts.statistics(outputs=outputs)
    old_name = {new: old for old, new in FIRST_NAMES.items()}
    tensors = {old_name.get(name, name): tensor for name, tensor in stats.tensors().items()}
    assert ("norm_LE" in tensors) == outputs
    with safe_open(stats.save(tmp_path / "new.safetensors"), framework="pt") as file:
        described = file.metadata() | {"format": "emo_megatron.stats.1"}
    described["model"] = json.dumps(json.loads(described["model"]) | {"num_shared": 1})
    save_file(tensors, tmp_path / "old.safetensors", metadata=described)
    assert_same(load_stats(tmp_path / "old.safetensors"), stats)


def test_scores_are_means():
    stats = experts.statistics(5)
    tokens = stats.num_tokens
    torch.testing.assert_close(stats.mean_probability_LE * tokens, stats.probability_LE)
    torch.testing.assert_close(stats.frequency_LE * tokens, stats.count_LE.double())
    torch.testing.assert_close(stats.reap_LE * stats.count_LE, stats.gated_norm_LE)
    assert torch.equal(stats.easy_ep_LE, stats.residual_change_LE)
    unused = dataclasses.replace(
        stats, count_LE=torch.zeros_like(stats.count_LE), gated_norm_LE=torch.zeros_like(stats.gated_norm_LE)
    )
    assert (unused.reap_LE == 0).all()


def test_without_outputs_their_scores_are_refused():
    stats = experts.statistics(outputs=False)
    for name in ("reap_LE", "easy_ep_LE"):
        with pytest.raises(ValueError, match="--outputs"):
            getattr(stats, name)


def test_parts_add_up_to_the_whole():
    model, whole = experts.MadeUpModel(), experts.documents(7)
    parts = [model.statistics(whole.tokens[low:high], outputs=True) for low, high in ((0, 3), (3, 7))]
    assert_same(merge_stats(parts), model.statistics(whole.tokens, outputs=True))


def test_what_does_not_add_up_is_refused():
    stats = experts.statistics(name="one")
    other = dataclasses.replace(stats.model, fingerprint="beef")
    with pytest.raises(ValueError, match=r"different models.*fingerprint f00d and beef"):
        merge_stats([stats, experts.statistics(name="two", model=other)])
    with pytest.raises(ValueError, match="same documents"):
        merge_stats([stats, experts.statistics(name="two"), stats])
    with pytest.raises(ValueError, match="--outputs for all or for none"):
        merge_stats([stats, experts.statistics(name="two", outputs=False)])
    with pytest.raises(ValueError, match="no statistics"):
        merge_stats([])
    # another format of the same model may hold other constants
    same = dataclasses.replace(stats.model, other_parameters=7)
    assert merge_stats([stats, experts.statistics(name="two", model=same)]).num_documents == 6


def test_other_and_damaged_files_are_refused_by_name(tmp_path):
    path = experts.statistics().save(tmp_path / "s.safetensors")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"s\.safetensors.*cut short"):
        load_stats(path)
    save_file({"tokens": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"s\.safetensors is not a statistics file"):
        load_stats(path)
    with pytest.raises(FileNotFoundError, match="write one with stats"):
        load_stats(tmp_path / "missing.safetensors")
    with pytest.raises(ValueError, match=r"count_LE must be \[3, 8\]"):
        experts.statistics(count_LE=torch.zeros(3, 7, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"count_LE .*negative.*-1"):
        experts.statistics(count_LE=torch.full((3, 8), -1))


@pytest.mark.parametrize("name", ["num_documents", "num_tokens"])
def test_sums_over_nothing_are_no_statistics(tmp_path, name):
    path = experts.statistics().save(tmp_path / "s.safetensors")
    with safe_open(path, framework="pt") as file:
        described = file.metadata()
    for count in ("0", "-1"):
        save_file(experts.statistics().tensors(), path, metadata=described | {name: count})
        with pytest.raises(ValueError, match=rf"s\.safetensors is a damaged .*{name}.*{count}"):
            load_stats(path)


def test_sums_leave_out_padding():
    sums = LayerSums(3, outputs=True, device="cpu")
    sums.add(
        # whatever padding computes
        probs_TE=torch.tensor([[0.5, 0.25, 0.25], [math.nan] * 3]),
        routing_map_TE=torch.tensor([[True, True, False], [True, True, True]]),
        is_counted_T=torch.tensor([True, False]),
        norms_TE=torch.tensor([[2.0, 4.0, 0.0], [math.nan] * 3]),
        change_T=torch.tensor([0.5, math.nan]),
    )
    assert sums.probability_E.tolist() == [0.5, 0.25, 0.25]
    assert sums.coactivation_EE.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert sums.gated_norm_E.tolist() == [2.0, 4.0, 0.0]
    assert sums.residual_change_E.tolist() == [1.0, 2.0, 0.0]


def test_change_is_one_minus_the_cosine_and_never_negative():
    before = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    output = torch.tensor([[0.0, 0.0], [-1.0, 1.0], [-2.0, 0.0]])
    torch.testing.assert_close(residual_change_of(before, output), torch.tensor([0.0, 1.0, 2.0]).double())
    assert (residual_change_of(before, before * 3) >= 0).all()
    # a layer that hardly turns its input: 1 - cos(a) is a^2 / 2
    slight = residual_change_of(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1e-5]]))
    assert slight.item() == pytest.approx(0.5e-10, rel=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["probability_LE", "gated_norm_LE", "residual_change_LE"])
def test_sums_that_are_not_finite_are_no_statistics(name, value):
    spoiled = experts.statistics().tensors()[name].clone()
    spoiled[1, 5] = spoiled[2, 0] = value
    with pytest.raises(NotFiniteError, match=f"layer 3, expert 5: {name} is {value}"):
        experts.statistics(**{name: spoiled})
    spoiled[1, 6:] = value
    with pytest.raises(NotFiniteError, match="layer 3, expert 5 and 2 more"):
        experts.statistics(**{name: spoiled})


def test_an_earlier_layers_sums_come_first():
    stats = experts.statistics()
    later, earlier = stats.probability_LE.clone(), stats.residual_change_LE.clone()
    later[1, 0] = earlier[0, 4] = float("nan")
    with pytest.raises(NotFiniteError, match="layer 2, expert 4: residual_change_LE"):
        experts.statistics(probability_LE=later, residual_change_LE=earlier)


def test_files_of_sums_that_are_not_finite_make_nothing(tmp_path, capsys):
    """As an earlier version has written them: no command merges, ranks or places by them."""
    good = experts.statistics(name="good").save(tmp_path / "good.safetensors")
    bad = tmp_path / "bad.safetensors"
    with safe_open(good, framework="pt") as file:
        described = file.metadata()
    sums = load_file(good)
    sums["probability_LE"][1, 5] = float("nan")
    save_file(sums, bad, metadata=described)
    selection = tmp_path / "selection.json"
    assert main(["select", "--stats", str(good), "--keep", "3 routed", "--output", str(selection)]) == 0
    for command in (
        ["merge-stats", "--stats", str(good), str(bad)],
        *(
            ["select", "--stats", str(bad), "--keep", "3 routed", "--method", method]
            for method in ("mean_prob", "reap", "random")
        ),
        ["place", "--stats", str(bad), "--ranks", "2"],
        ["compose", "--selections", str(selection), "--stats", str(bad), "--keep", "3 routed"],
    ):
        capsys.readouterr()
        assert main([*command, "--output", str(tmp_path / "new")]) == 2, command
        told = capsys.readouterr().err
        assert "bad.safetensors" in told
        assert "layer 3, expert 5" in told
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "value"), [("data", '["sha256"]'), ("data", "{}"), ("model", "[]"), ("model", '{"top_k": 2.0}')]
)
def test_what_statistics_say_of_themselves_is_checked(name, value, tmp_path):
    path = experts.statistics().save(tmp_path / "s.safetensors")
    with safe_open(path, framework="pt") as file:
        described = file.metadata()
    save_file(load_file(path), path, metadata=described | {name: value})
    with pytest.raises(ValueError, match=rf"s\.safetensors.*{name}"):
        load_stats(path)


def test_a_file_of_another_version_names_the_command_that_writes_it_again(tmp_path):
    path = experts.statistics().save(tmp_path / "s.safetensors")
    with safe_open(path, framework="pt") as file:
        described = file.metadata()
    save_file(load_file(path), path, metadata=described | {"format": "emo_megatron.stats.0"})
    with pytest.raises(ValueError, match=r"emo_megatron\.stats\.0.* with stats$"):
        load_stats(path)
