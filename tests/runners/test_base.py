"""The pass over calibration documents: it resumes, reuses what is whole, and leaves nothing half done."""

from __future__ import annotations

import dataclasses

import pytest
from support import experts

from emo_megatron.experts.stats import load_stats
from emo_megatron.runners.base import collect_stats

DOCUMENTS = experts.documents(7)


def collect(model, output, **options):
    return collect_stats(
        model,
        options.pop("documents", DOCUMENTS),
        output=output,
        outputs=options.pop("outputs", False),
        documents_at_once=3,
    )


def test_an_interrupted_pass_goes_on_and_gives_the_whole(tmp_path):
    output = tmp_path / "s.safetensors"
    stopped = experts.MadeUpModel(fails_at=2)
    with pytest.raises(KeyboardInterrupt):
        collect(stopped, output)
    assert not output.exists()
    again = experts.MadeUpModel()
    resumed = collect(again, output)
    assert [count for count, _ in again.seen] == [1]
    whole = collect(experts.MadeUpModel(), tmp_path / "whole.safetensors")
    for name, tensor in whole.tensors().items():
        assert resumed.tensors()[name].equal(tensor)
    assert resumed.num_documents == 7
    assert resumed.data == (DOCUMENTS.source | dataclasses.asdict(experts.SETTING),)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.safetensors", "whole.safetensors"]


def test_a_whole_file_is_not_measured_again_and_another_is_not_replaced(tmp_path):
    output = tmp_path / "s.safetensors"
    collect(experts.MadeUpModel(), output)
    idle = experts.MadeUpModel()
    assert collect(idle, output).num_documents == 7
    assert idle.seen == []
    before = output.read_bytes()
    other = dataclasses.replace(experts.FACTS, fingerprint="beef")
    for options in (
        {"documents": experts.documents(2, name="other")},
        {"outputs": True},
        {"model": experts.MadeUpModel(facts=other)},
        *(
            # routers may be the same after the experts were trained
            {"model": experts.MadeUpModel(setting=dataclasses.replace(experts.SETTING, **change))}
            for change in ({"weights": "x"}, {"seq_length": 8}, {"dtype": "torch.bfloat16"}, {"megatron": "--x 1"})
        ),
    ):
        with pytest.raises(ValueError, match="something else"):
            collect(options.pop("model", experts.MadeUpModel()), output, **options)
    assert output.read_bytes() == before


def test_a_file_that_does_not_tell_flags_is_of_none(tmp_path):
    output = tmp_path / "s.safetensors"
    stats = collect(experts.MadeUpModel(), output)
    source = {name: value for name, value in stats.data[0].items() if name != "megatron"}
    stats.of(source).save(output)
    idle = experts.MadeUpModel()
    collect(idle, output)
    assert idle.seen == []


def test_what_is_left_of_another_pass_is_not_gone_on_with(tmp_path):
    output = tmp_path / "s.safetensors"
    with pytest.raises(KeyboardInterrupt):
        collect(experts.MadeUpModel(fails_at=1), output, documents=experts.documents(5, name="b"))
    model = experts.MadeUpModel()
    collect(model, output)
    assert sum(count for count, _ in model.seen) == 7
    assert [entry["sha256"] for entry in load_stats(output).data] == [DOCUMENTS.source["sha256"]]
