"""The reader gives weights by one set of names, whatever layout wrote them; the writer writes the same bits."""

from __future__ import annotations

import argparse
import contextlib
import errno
import gc
import pickle
import resource
import shutil
from pathlib import Path

import pytest
import torch
from support import checkpoints
from support.checkpoints import ARGS, UNEQUAL
from support.running import limited
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from emo_megatron.checkpoint.folders import reading
from emo_megatron.checkpoint.reader import MegatronCheckpoint
from emo_megatron.checkpoint.writer import LazyWeight, write_checkpoint
from emo_megatron.experts.selection import router_fingerprint

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
    routers = [weights[f"decoder.layers.{layer}.mlp.router.weight"] for layer in (0, 1)]
    assert reader.fingerprint == router_fingerprint(routers)
    assert reader.args.num_experts == ARGS["num_experts"]


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


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of the checkpoint to damage, and its iteration's folder."""
    folder = shutil.copytree(saved[0], tmp_path / "copy")
    return folder, folder / "iter_0000007"


@contextlib.contextmanager
def told(*names):
    """One line with one of these files' names; what raised it is chained, where it is no file that is missing."""
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        yield error
    assert any(name in str(error.value) for name in names), error.value
    assert "\n" not in str(error.value)


def shortened(file, left):
    """Cut a file after so many bytes, or so large a part of them."""
    whole = file.read_bytes()
    file.write_bytes(whole[: int(left * len(whole)) if isinstance(left, float) else left])


@pytest.mark.parametrize("name", ["metadata.json", ".metadata", "__0_0.distcp", ""])
def test_a_missing_file_is_named(copied, name):
    folder, iteration = copied
    (iteration / name).unlink() if name else shutil.rmtree(iteration)
    with told("torch_dist" if name == "metadata.json" else name or "iter_0000007"):
        MegatronCheckpoint(folder)


@pytest.mark.parametrize("left", [0, 2, 10, 0.5, -1])
@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_a_file_that_was_cut_is_named(copied, name, left):
    folder, iteration = copied
    shortened(iteration / name, left)
    with told(name):
        MegatronCheckpoint(folder)


def test_a_data_file_that_was_overwritten_is_named(copied):
    (file,) = copied[1].glob("*.distcp")
    file.write_bytes(bytes(file.stat().st_size))
    reader = MegatronCheckpoint(copied[0])
    for read in (lambda: reader.read(EXPERTS), lambda: reader.args):
        with told(file.name):
            read()


@pytest.mark.parametrize("left", [0, 10, 0.5, -1])
def test_a_common_file_that_was_cut_is_named(saved, copied, left):
    """Earlier versions of Megatron keep what is no tensor in a file of its own, which is still read."""
    file = copied[1] / "common.pt"
    torch.save(MegatronCheckpoint(saved[0]).common | {"iteration": 5}, file)
    assert MegatronCheckpoint(copied[0]).common["iteration"] == 5
    shortened(file, left)
    with told("common.pt"):
        assert MegatronCheckpoint(copied[0]).args


@pytest.mark.parametrize("wrap", [lambda e: e, lambda e: CheckpointException("load", {0: (e, None)})])
@pytest.mark.parametrize(
    "error", [EOFError(), pickle.UnpicklingError("cut\nhere"), OSError("cut"), MemoryError(), AttributeError("no X")]
)
def test_what_a_file_causes_names_it_and_keeps_its_cause(error, wrap):
    raised = wrap(error)
    with pytest.raises(ValueError, match=r"^folder/a .*[^\n]*$") as found, reading(Path("folder/a")):
        raise raised
    assert found.value.__cause__ is raised
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("wrap", [lambda e: e, lambda e: CheckpointException("load", {0: (e, None)})])
@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied", "a"), KeyboardInterrupt()])
def test_what_is_no_files_fault_is_told_as_it_is(error, wrap):
    with pytest.raises(type(error)) as found, reading(Path("a")):
        raise wrap(error)
    assert found.value is error


@pytest.mark.parametrize("name", ["mlp.linear_fc1.weight_v", "mlp.experts.experts.1.linear_fc1.weight"])
def test_a_part_of_a_weight_is_refused(name, tmp_path):
    """The other half, or the first expert, would be read as whatever memory holds."""
    weights = {f"decoder.layers.0.{name}": torch.ones(2, 2)}
    written = write_checkpoint(tmp_path / "part", weights, args=argparse.Namespace())
    with pytest.raises(ValueError, match=r"part of decoder\.layers\.0\.mlp.*linear_fc1"):
        MegatronCheckpoint(written)


def test_no_file_is_replaced_by_a_checkpoint(saved, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file exists; give another path"):
        write_checkpoint(tmp_path / "file", {}, args=MegatronCheckpoint(saved[0]).args)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("limit", [0, 5_000, 300_000])
def test_a_full_disk_names_the_folder_and_leaves_nothing(limit, tmp_path):
    """Of chunks that are larger than a buffer torch's own writer tells an unexpected position."""
    names = ("decoder.layers.0.mlp.experts.experts.linear_fc1.weight", "output_layer.weight")
    weights = {name: torch.zeros(8, 100, 100) for name in names}
    with limited(resource.RLIMIT_FSIZE, limit), pytest.raises(OSError, match="too large") as told:
        write_checkpoint(tmp_path / "new" / "out", weights, args=argparse.Namespace())
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


@pytest.mark.parametrize("held", [None, 1, {}, [1], argparse.Namespace(), Metadata({})])
def test_metadata_of_something_else_is_named(copied, held):
    (copied[1] / ".metadata").write_bytes(pickle.dumps(held))
    with told(".metadata"):
        MegatronCheckpoint(copied[0])


@pytest.mark.parametrize("held", [None, 1, [], {}, {"args": None}, {"args": argparse.Namespace(a=1)}])
def test_a_common_file_without_flags_is_named(copied, held):
    torch.save(held, copied[1] / "common.pt")
    with told("iter_0000007"):
        assert MegatronCheckpoint(copied[0]).args


def test_a_checkpoint_of_megatron_bridge_is_named(copied):
    torch.save({"iteration": 7}, copied[1] / "common.pt")
    (copied[1] / "run_config.yaml").write_text("model: {}")
    with told("AutoBridge, see docs/bridge.md#checkpoints"):
        assert MegatronCheckpoint(copied[0]).args


@pytest.mark.parametrize("kind", ["adapter.linear_in", "adapter.adapter_q.linear_in", "adapters.linear_in"])
def test_an_adapter_of_megatron_bridge_that_was_not_merged_is_named(kind, tmp_path):
    name = f"decoder.layers.0.self_attention.linear_qkv.{kind}.weight"
    path = write_checkpoint(tmp_path / "lora", {name: torch.zeros(4, 8)}, args=argparse.Namespace(**ARGS))
    with pytest.raises(ValueError, match=r"lora.*\.adapter.*export_adapter_ckpt") as raised:
        MegatronCheckpoint(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["[]", "null", "{}"])
def test_a_description_that_is_no_description_is_named(copied, text):
    (copied[1] / "metadata.json").write_text(text)
    with told("iter_0000007"):
        MegatronCheckpoint(copied[0])


def test_what_modelopt_has_changed_is_named(copied):
    folder, iteration = copied
    (iteration / "modelopt_state").mkdir()
    with told("remove the folder modelopt_state"):
        MegatronCheckpoint(folder)


@pytest.mark.parametrize("name", ["mlp.experts.experts.linear_fc1.weight_quantizer._amax", "mlp.linear_fc1._amax"])
def test_quantizers_are_named(name, tmp_path):
    written = write_checkpoint(
        tmp_path / "out", {f"decoder.layers.0.{name}": torch.ones(4, 3)}, args=argparse.Namespace()
    )
    (written / "modelopt_state").mkdir()
    with told(name) as error:
        MegatronCheckpoint(written)
    # the weights would then be read as if they were not quantised
    assert "remove" not in str(error.value)
