"""The Selection file: what it says, what it refuses, and the fingerprint that ties it to a model."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from emo_megatron.experts.selection import Selection, load_selection, router_fingerprint


def selection(**changes):
    fields = {
        "num_experts": 8,
        "experts": ((0, 3), (2, 7)),
        "layers": (2, 3),
        "method": "mean_prob",
        "seed": None,
        "model": "ab12",
        "data": {"path": "calibration.jsonl", "documents": 3},
    }
    return Selection(**(fields | changes))


def test_a_saved_selection_is_read_back(tmp_path):
    written = selection(seed=4)
    path = written.save(tmp_path / "new" / "python.json")
    assert load_selection(path) == written
    assert [p.name for p in path.parent.iterdir()] == ["python.json"]
    assert "[2, 7]" in path.read_text()


def test_mask_and_experts_are_the_same_choice():
    mask = selection().keep_mask()
    assert mask.sum(-1).tolist() == [2, 2]
    assert mask[1].nonzero().flatten().tolist() == [2, 7]
    rest = {f.name: getattr(selection(), f.name) for f in dataclasses.fields(Selection)}
    for name in ("num_experts", "experts"):
        rest.pop(name)
    assert Selection.from_mask(mask, **rest) == selection()


def test_keep_k_counts_shared_experts_and_needs_uniform_layers():
    assert selection().keep_k(num_shared=1) == 3
    uneven = selection(experts=((0,), (2, 7)))
    assert uneven.num_kept == (1, 2)
    with pytest.raises(ValueError, match="1 to 2"):
        uneven.keep_k(num_shared=1)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"experts": ((0, 3), (2, 8))}, "layer 3"),
        ({"experts": ((0, 3), ())}, "layer 3"),
        ({"experts": ((3, 0), (2, 7))}, "layer 2"),
        ({"experts": ((3, 3), (2, 7))}, "layer 2"),
        ({"experts": ((-1, 3), (2, 7))}, "layer 2"),
        ({"experts": (("0",), (2, 7))}, "layer 2"),
        ({"experts": ((0, 3),)}, "layers"),
        ({"layers": (3, 2)}, "layers"),
        ({"layers": (0, 2)}, "layers"),
        ({"layers": (), "experts": ()}, "layers"),
        ({"num_experts": 0}, "num_experts"),
        ({"num_experts": "8"}, "num_experts"),
        ({"method": ""}, "method"),
        ({"model": None}, "model"),
        ({"seed": 1.5}, "seed"),
        ({"data": []}, "data"),
    ],
)
def test_what_cannot_be_is_refused_in_memory_and_on_disk(tmp_path, changes, what):
    with pytest.raises(ValueError, match=what):
        selection(**changes)
    stored = json.loads(selection().save(tmp_path / "s.json").read_text()) | changes
    (tmp_path / "s.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=rf"s\.json.*{what}"):
        load_selection(tmp_path / "s.json")


def test_a_missing_file_is_reported_with_the_command_that_writes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no Selection file .*nope: write one with select"):
        load_selection(tmp_path / "nope")


def test_a_file_that_lacks_fields_is_refused_by_name(tmp_path):
    """Others that hold no Selection: tests/test_json_files.py."""
    (tmp_path / "s.json").write_text('{"format": "emo_megatron.selection.1", "experts": []}')
    with pytest.raises(ValueError, match=r"s\.json.*layers"):
        load_selection(tmp_path / "s.json")


def test_the_fingerprint_sees_values_and_order_and_not_the_dtype():
    one, two = torch.randn(8, 4).bfloat16(), torch.randn(8, 4).bfloat16()
    mark = router_fingerprint([one, two])
    assert mark == router_fingerprint(iter([one.float(), two.t().contiguous().t()]))
    assert mark != router_fingerprint([two, one])
    nudged = two.clone()
    nudged[7, 3] += 1
    assert mark != router_fingerprint([one, nudged])
    assert len(mark) == 64


def test_a_selection_of_another_model_is_refused():
    chosen = selection()
    chosen.check_model("ab12", num_experts=8, layers=[2, 3])
    for arguments, what in [
        ({"fingerprint": "ab13", "num_experts": 8, "layers": [2, 3]}, "fingerprint ab13"),
        ({"fingerprint": "ab12", "num_experts": 16, "layers": [2, 3]}, "16 routed experts"),
        ({"fingerprint": "ab12", "num_experts": 8, "layers": [1, 3]}, r"MoE layers \[1, 3\]"),
    ]:
        fingerprint = arguments.pop("fingerprint")
        with pytest.raises(ValueError, match=what):
            chosen.check_model(fingerprint, **arguments)


def test_a_failing_write_leaves_what_was_there(tmp_path):
    from emo_megatron.files import whole

    path = selection().save(tmp_path / "s.json")
    before = path.read_text()

    def fail():
        with whole(path) as unfinished:
            unfinished.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="exists"), whole(tmp_path / "folder"):
        pass


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("num_experts", (8.0, True, None, [], -8, 10**15, 10**30)),
        ("experts", (1, None, "ab", [1], [None], [[0.0]], [[True]], [[[0]], [1]], {"a": 1})),
        ("layers", (1, None, "ab", [2.0, 3.0], [None, 3], [[2], [3]], [2, 10**30])),
        ("seed", ("1", True, [])),
        ("data", (None, 1, "text")),
        ("created_by", (None, 1, [])),
    ],
)
def test_a_field_of_another_type_is_refused_with_the_file(field, values, tmp_path):
    path = selection().save(tmp_path / "s.json")
    stored = json.loads(path.read_text())
    for value in values:
        path.write_text(json.dumps(stored | {field: value}))
        with pytest.raises(ValueError, match=r"s\.json") as told:
            load_selection(path)
        assert "\n" not in str(told.value)
