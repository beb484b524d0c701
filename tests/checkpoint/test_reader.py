"""The reader gives weights by one set of names, whatever layout wrote them; the writer writes the same bits."""

from __future__ import annotations

import argparse
import errno
import gc
import pickle
import resource
import shutil

import pytest
import torch
from support import checkpoints
from support.checkpoints import ARGS, UNEQUAL
from torch.distributed.checkpoint.metadata import Metadata

from emo_megatron.checkpoint.reader import MegatronCheckpoint
from emo_megatron.checkpoint.writer import LazyWeight, write_checkpoint

EXPERTS = "decoder.layers.1.mlp.experts.experts.linear_fc1.weight"


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """A checkpoint of equal layers, which Megatron stacks, and what it holds."""
    folder = tmp_path_factory.mktemp("saved") / "parent"
    (weights,) = ranks(1).run(checkpoints.save, folder=str(folder), layout={}, config={})
    return folder, weights


def _same(checkpoint, weights):
    assert set(checkpoint.names) == set(weights)
    return [n for n, w in weights.items() if not torch.equal(checkpoint.read(n), w)]


@pytest.mark.parametrize(
    ("layout", "singletons"),
    [
        ({"expert_model_parallel_size": 2}, False),
        ({"tensor_model_parallel_size": 2}, True),
        ({"pipeline_model_parallel_size": 2}, True),
    ],
    ids=["EP2", "TP2 one by one", "PP2 one by one"],
)
def test_one_set_of_names(ranks, saved, tmp_path, layout, singletons):
    folder, weights = saved
    ranks(2).run(
        checkpoints.save,
        folder=str(tmp_path / "again"),
        layout=layout,
        config={},
        singletons=singletons,
        source=str(folder),
    )
    assert _same(MegatronCheckpoint(tmp_path / "again"), weights) == []


def test_layers_with_names_of_their_own(ranks, tmp_path):
    (weights,) = ranks(1).run(checkpoints.save, folder=str(tmp_path / "a"), layout={}, config=UNEQUAL)
    reader = MegatronCheckpoint(tmp_path / "a")
    assert _same(reader, weights) == []
    assert reader.moe_layers == (2, 3, 4)


def test_slices(saved):
    folder, weights = saved
    reader = MegatronCheckpoint(folder)
    whole = weights[EXPERTS]
    for index in (3, -1, slice(2, 7, 2), [5, 0, 5], slice(4, 4)):
        assert torch.equal(reader.read(EXPERTS, index), whole[index])
    assert torch.equal(reader.read_box(EXPERTS, (2, 5, 1), (3, 20, 4)), whole[2:5, 5:25, 1:5])
    with pytest.raises(IndexError):
        reader.read(EXPERTS, 8)
    with pytest.raises(KeyError):
        reader.read("decoder.layers.9.mlp.router.weight")


def test_layers_and_flags(saved):
    folder, weights = saved
    reader = MegatronCheckpoint(folder / "iter_0000007")
    assert reader.moe_layers == (1, 2)
    view = reader.layer_view(2)
    assert torch.equal(view.read("mlp.router.weight"), weights["decoder.layers.1.mlp.router.weight"])
    assert reader.args.num_experts == ARGS["num_experts"]
    with pytest.raises(ValueError, match="no layer 3"):
        reader.layer_view(3)


@pytest.mark.parametrize("is_lazy", [False, True], ids=["tensors", "lazy"])
def test_written_bits(saved, tmp_path, is_lazy):
    folder, weights = saved
    given = weights
    if is_lazy:
        given = {
            name: LazyWeight(shape=tuple(w.shape), dtype=w.dtype, rows=lambda a, b, w=w: w[a:b])
            for name, w in weights.items()
        }
    args = MegatronCheckpoint(folder).args
    written = MegatronCheckpoint(write_checkpoint(tmp_path / "written", given, args=args))
    assert _same(written, weights) == []
    assert written.path.name == "release"
    assert written.args.consumed_train_samples == 0
    assert written.args.tensor_model_parallel_size == 1
    # the caller's flags are left as they were
    assert args.consumed_train_samples == 1000


def test_nothing_is_left_of_a_failure(saved, tmp_path):
    folder, weights = saved

    def fail(start, stop):
        raise ValueError("cannot make it")

    bad = {**weights, EXPERTS: LazyWeight(shape=(8, 32, 32), dtype=torch.float32, rows=fail)}
    with pytest.raises(ValueError, match="cannot make it"):
        write_checkpoint(tmp_path / "written", bad, args=MegatronCheckpoint(folder).args)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "written").mkdir()
    with pytest.raises(ValueError, match="exists"):
        write_checkpoint(tmp_path / "written", weights, args=MegatronCheckpoint(folder).args)


def test_stock_names_are_all_there(saved, tmp_path):
    """Megatron asks for its layers' empty objects too."""
    folder, weights = saved
    apart = MegatronCheckpoint(folder)._metadata.state_dict_metadata
    written = write_checkpoint(tmp_path / "w", weights, args=MegatronCheckpoint(folder).args)
    names = MegatronCheckpoint(written)._metadata.state_dict_metadata
    wanted = {
        key.replace("decoder.layers.", f"decoder.layers.{layer}.")
        .replace(f"shard_{layer}.", "shard_")
        .replace("_2.8", "_8")
        .replace(f"shard_{layer}_2", "shard_0_1")
        for key in apart
        if "_extra_state" in key
        for layer in [int(key.rpartition("shard_")[2][0])]
    }
    assert wanted
    assert wanted <= set(names)


def test_damage_is_told(saved, tmp_path):
    folder, _ = saved
    copy = tmp_path / "copy"

    def damaged(change):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        change(copy / "iter_0000007")
        return pytest.raises(ValueError, match=r"not whole|not a torch_dist|no checkpoint")

    def data_file(path):
        return max(path.glob("*.distcp"), key=lambda file: file.stat().st_size)

    def cut(path):
        file = data_file(path)
        file.write_bytes(file.read_bytes()[:-5000])

    for change in (
        lambda path: data_file(path).unlink(),
        cut,
        lambda path: (path / "metadata.json").unlink(),
        lambda path: (path / ".metadata").unlink(),
        shutil.rmtree,
    ):
        with damaged(change):
            MegatronCheckpoint(copy)


def test_damaged_metadata_is_said(saved, tmp_path):
    folder, _ = saved
    shutil.copytree(folder, tmp_path / "cut")
    (metadata,) = tmp_path.rglob(".metadata")
    whole = metadata.read_bytes()
    for left in (0, 2, len(whole) // 2):
        metadata.write_bytes(whole[:left])
        with pytest.raises(ValueError, match=r"not whole: its file \.metadata is damaged"):
            MegatronCheckpoint(tmp_path / "cut")


def shortened(file, left):
    """Cut a file after so many bytes, or so large a part of them."""
    whole = file.read_bytes()
    file.write_bytes(whole[: int(left * len(whole)) if isinstance(left, float) else left])


@pytest.mark.parametrize("left", [0, 10, 0.5, -1])
def test_a_data_file_that_was_cut_is_named(saved, tmp_path, left):
    shutil.copytree(saved[0], tmp_path / "cut")
    (file,) = tmp_path.rglob("*.distcp")
    shortened(file, left)
    with pytest.raises(ValueError, match=f"not whole: its file {file.name} was cut short"):
        MegatronCheckpoint(tmp_path / "cut")


def test_a_data_file_that_was_overwritten_is_named(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "cut")
    (file,) = tmp_path.rglob("*.distcp")
    file.write_bytes(bytes(file.stat().st_size))
    reader = MegatronCheckpoint(tmp_path / "cut")
    for read in (lambda: reader.read(EXPERTS), lambda: reader.args):
        with pytest.raises(ValueError, match=f"its file {file.name} is damaged") as error:
            read()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("left", [0, 10, 0.5, -1])
def test_a_common_file_that_was_cut_is_named(saved, tmp_path, left):
    """Earlier versions of Megatron keep what is no tensor in a file of its own, which is still read."""
    folder, _ = saved
    shutil.copytree(folder, tmp_path / "old")
    common = MegatronCheckpoint(folder).common
    file = tmp_path / "old" / "iter_0000007" / "common.pt"
    torch.save(common | {"iteration": 5}, file)
    assert MegatronCheckpoint(tmp_path / "old").common["iteration"] == 5
    shortened(file, left)
    with pytest.raises(ValueError, match=r"not whole: its file common\.pt is damaged") as error:
        assert MegatronCheckpoint(tmp_path / "old").args
    assert "\n" not in str(error.value)


def test_no_file_is_replaced_by_a_checkpoint(saved, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file exists; name one that does not"):
        write_checkpoint(tmp_path / "file", {}, args=MegatronCheckpoint(saved[0]).args)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("limit", [0, 5_000, 300_000])
def test_a_full_disk_names_the_folder_and_leaves_nothing(limit, tmp_path):
    """Of chunks that are larger than a buffer torch's own writer tells an unexpected position."""
    names = ("decoder.layers.0.mlp.experts.experts.linear_fc1.weight", "output_layer.weight")
    weights = {name: torch.zeros(8, 100, 100) for name in names}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match="too large") as told:
            write_checkpoint(tmp_path / "new" / "out", weights, args=argparse.Namespace())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (told.value.errno, told.value.filename) == (errno.EFBIG, str(tmp_path / "new" / "out"))
    assert list(tmp_path.iterdir()) == []
    # what the failed write left behind is collected without harm
    del told
    gc.collect()


@pytest.mark.parametrize("said", ["", "seven", "7.5", "-1", "\u0667", "7 8", b"\xff\xfe7"])
def test_a_tracker_that_names_no_iteration_is_named(said, tmp_path):
    file = tmp_path / "latest_checkpointed_iteration.txt"
    file.write_bytes(said if isinstance(said, bytes) else said.encode())
    with pytest.raises(ValueError, match=f"{file.name} must hold the number"):
        MegatronCheckpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "1", "null", "[" * 10_000, '{"new": 1}', "{}"])
def test_a_description_that_is_no_description_is_named(saved, text, tmp_path):
    shutil.copytree(saved[0], tmp_path / "cut")
    (file,) = tmp_path.rglob("metadata.json")
    file.write_text(text)
    with pytest.raises(ValueError, match=r"iter_0000007") as told:
        MegatronCheckpoint(tmp_path / "cut")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("held", [None, 1, {}, [1], argparse.Namespace(), Metadata({})])
def test_metadata_of_something_else_is_named(saved, held, tmp_path):
    shutil.copytree(saved[0], tmp_path / "cut")
    (file,) = tmp_path.rglob(".metadata")
    file.write_bytes(pickle.dumps(held))
    with pytest.raises(ValueError, match=r"its file \.metadata is damaged|\.metadata is damaged") as told:
        MegatronCheckpoint(tmp_path / "cut")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("held", [None, 1, [], {}, {"args": None}, {"args": argparse.Namespace(a=1)}])
def test_a_common_file_without_flags_is_named(saved, held, tmp_path):
    shutil.copytree(saved[0], tmp_path / "old")
    torch.save(held, tmp_path / "old" / "iter_0000007" / "common.pt")
    with pytest.raises(ValueError, match=r"iter_0000007") as told:
        assert MegatronCheckpoint(tmp_path / "old").args
    assert "\n" not in str(told.value)
