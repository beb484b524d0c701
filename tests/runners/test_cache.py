"""The cache: what a measurement depends on is its key, and a damaged or foreign entry costs a measurement only."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing

import pytest
import torch
from support import experts

from emo_megatron.runners import cache as caches
from emo_megatron.runners.base import digest_of
from emo_megatron.runners.cache import Cache, CachedRunner, NoCache, open_cache

DOCUMENTS = experts.documents(7)


@pytest.fixture(autouse=True)
def _few_documents_at_once(monkeypatch):
    monkeypatch.setattr(caches, "DOCUMENTS_AT_ONCE", 3)


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


def test_an_interrupted_pass_goes_on_and_gives_the_whole(cache):
    with pytest.raises(KeyboardInterrupt):
        CachedRunner(experts.MadeUpModel(fails_at=2), cache).statistics(DOCUMENTS, outputs=False)
    again, whole = experts.MadeUpModel(), experts.MadeUpModel()
    resumed = CachedRunner(again, cache).statistics(DOCUMENTS, outputs=False)
    assert [count for count, _ in again.seen] == [1]
    assert resumed.digest() == CachedRunner(whole, NoCache()).statistics(DOCUMENTS, outputs=False).digest()
    assert [count for count, _ in whole.seen] == [3, 3, 1]
    assert resumed.num_documents == 7
    assert resumed.data == (DOCUMENTS.source | dataclasses.asdict(experts.SETTING),)


def test_what_was_measured_is_not_measured_again(cache):
    first, other = experts.MadeUpModel(), experts.MadeUpModel()
    mask = torch.ones(3, 8, dtype=torch.bool)
    for model in (first, other):
        measured = CachedRunner(model, cache)
        measured.statistics(DOCUMENTS, outputs=True)
        measured.loss(DOCUMENTS, allowed_LE=mask)
        measured.kept_experts(DOCUMENTS, allowed_LE=mask, place=1, keep=3)
    assert (len(first.seen), first.num_losses) == (4, 1)
    assert (len(other.seen), other.num_losses) == (0, 0)


CHANGES = [
    *({"metadata": dataclasses.replace(experts.METADATA, fingerprint=name)} for name in ("beef",)),
    # the same weights with another config.json
    {"metadata": dataclasses.replace(experts.METADATA, top_k=1)},
    # routers may be the same after the experts were trained
    {"setting": dataclasses.replace(experts.SETTING, weights="x")},
    {"setting": dataclasses.replace(experts.SETTING, seq_length=8)},
    {"setting": dataclasses.replace(experts.SETTING, dtype="torch.bfloat16")},
    {"setting": dataclasses.replace(experts.SETTING, megatron="--x 1")},
]


@pytest.mark.parametrize("changes", CHANGES)
def test_another_model_or_setting_is_another_question(cache, changes):
    for model in (experts.MadeUpModel(), experts.MadeUpModel(**changes)):
        measured = CachedRunner(model, cache)
        measured.loss(DOCUMENTS)
        measured.statistics(DOCUMENTS, outputs=False)
        assert (model.num_losses, len(model.seen)) == (1, 3)


def test_other_documents_experts_and_outputs_are_other_questions(cache):
    model = experts.MadeUpModel()
    measured = CachedRunner(model, cache)
    none, some = torch.zeros(3, 8, dtype=torch.bool), torch.ones(3, 8, dtype=torch.bool)
    for documents in (DOCUMENTS, experts.documents(7, name="other")):
        for allowed_LE in (None, none, some):
            measured.loss(documents, allowed_LE=allowed_LE)
    assert model.num_losses == 6
    for place, keep, allowed_LE in ((0, 3, some), (1, 3, some), (1, 4, some), (1, 4, none)):
        measured.kept_experts(DOCUMENTS, allowed_LE=allowed_LE, place=place, keep=keep)
    assert len(model.seen) == 4
    measured.statistics(DOCUMENTS, outputs=False)
    measured.statistics(DOCUMENTS, outputs=True)
    assert len(model.seen) == 4 + 2 * 3


def test_another_version_of_the_package_measures_anew(cache, monkeypatch):
    CachedRunner(experts.MadeUpModel(), cache).loss(DOCUMENTS)
    for name in ("emo_megatron", "torch"):
        others = caches.versions() | {name: "0.0.0"}
        monkeypatch.setattr(caches, "versions", lambda others=others: others)
        model = experts.MadeUpModel()
        CachedRunner(model, cache).loss(DOCUMENTS)
        assert model.num_losses == 1


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
@pytest.mark.parametrize("how", ["cut", "empty", "other", "gone", "flipped"])
def test_a_damaged_entry_is_measured_again(cache, tmp_path, suffix, how):
    want = CachedRunner(experts.MadeUpModel(), cache).statistics(DOCUMENTS, outputs=False)
    (path,) = (tmp_path / "cache").glob(f"*.{suffix}")
    stored = path.read_bytes()
    # the last byte but one of both is part of a value
    flipped = stored[:-10] + bytes([stored[-10] ^ 1]) + stored[-9:]
    damaged = {"cut": stored[:-5], "empty": b"", "other": b"[1]", "flipped": flipped}
    path.unlink()
    if how in damaged:
        path.write_bytes(damaged[how])
    model = experts.MadeUpModel()
    assert CachedRunner(model, cache).statistics(DOCUMENTS, outputs=False).digest() == want.digest()
    assert len(model.seen) == 3
    # and it is whole again
    CachedRunner(experts.MadeUpModel(fails_at=0), cache).statistics(DOCUMENTS, outputs=False)


def test_a_loss_that_was_changed_by_hand_is_measured_again(cache, tmp_path):
    CachedRunner(experts.MadeUpModel(), cache).loss(DOCUMENTS)
    (path,) = (tmp_path / "cache").iterdir()
    stored = json.loads(path.read_text())
    stored["answer"]["nats"] = 0.5
    path.write_text(json.dumps(stored))
    assert CachedRunner(experts.MadeUpModel(), cache).loss(DOCUMENTS).nats == 1.0


def test_the_least_used_go_when_there_is_no_room(tmp_path):
    cache = Cache(tmp_path / "cache", megabytes=0.004)
    for number in range(9):
        cache.put({"number": number}, "x" * 1000)
        # it is used
        assert number == 0 or cache.get({"number": 0})
    assert cache.get({"number": 8})
    assert cache.get({"number": 0})
    assert cache.get({"number": 1}) is None
    # what is larger than all of it is not kept, and costs nobody's place
    cache.put({"number": 9}, "x" * 5000)
    assert cache.get({"number": 9}) is None
    assert cache.get({"number": 8})
    assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 4000


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "cache")
    model = experts.MadeUpModel()
    for _ in range(2):
        CachedRunner(model, cache).loss(DOCUMENTS)
    assert model.num_losses == 2
    assert capfd.readouterr().err.count("warning") == 1


def write_and_read(folder, number):
    cache = Cache(folder)
    for _ in range(30):
        cache.put_statistics({"of": "all"}, experts.statistics(3))
        cache.put({"number": number}, number)
        assert cache.get({"number": number}) == number
        found = cache.get_statistics({"of": "all"})
        assert found is None or found.num_documents == 3


def test_several_processes_write_at_a_time(tmp_path):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_and_read, args=(tmp_path / "cache", number)) for number in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".json"] * 4 + [".safetensors"]


def test_the_environment_names_folder_and_limit(tmp_path, monkeypatch):
    monkeypatch.setenv(caches.FOLDER, str(tmp_path / "there"))
    open_cache().put({"a": 1}, 2)
    assert list((tmp_path / "there").iterdir())
    monkeypatch.delenv(caches.FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "base"))
    open_cache().put({"a": 1}, 2)
    assert list((tmp_path / "base" / "emo_megatron").iterdir())
    for limit in ("many", "nan", "-1", "inf"):
        monkeypatch.setenv(caches.LIMIT, limit)
        with pytest.raises(ValueError, match=caches.LIMIT):
            open_cache()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
def test_a_digest_changes_with_any_bit(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(0, 255, (5, 7, 8), generator=generator, dtype=torch.uint8).view(dtype)
    digest = digest_of([("a", weight), ("b", weight[0])])
    assert digest == digest_of([("b", weight[0].clone()), ("a", weight.clone())])
    seen = {
        digest,
        digest_of([("a", weight), ("c", weight[0])]),
        digest_of([("a", weight.flatten()), ("b", weight[0])]),
    }
    changed = weight.clone()
    bits = changed.view(torch.uint8).view(-1)
    for place in range(0, len(bits), 3):
        bits[place] ^= 128
        seen.add(digest_of([("a", changed), ("b", weight[0])]))
    # two signs at a time, then two values that change places
    assert len(seen) == 3 + len(range(0, len(bits), 3))
    swapped = weight.clone()
    swapped[0], swapped[1] = weight[1], weight[0]
    assert digest_of([("a", swapped)]) != digest_of([("a", weight)])
