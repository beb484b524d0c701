"""Which backend the ops take, and that they say why."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from support.emulator import ROOT, load_compiled, setup_module
from support.routing import assert_equal, random_logits

from emo_megatron import ops
from emo_megatron.ops import dispatch, native, reference


def _probs(**options: object) -> torch.Tensor:
    return ops.pool_topk(random_logits(50, 40), top_k=3, **options).probs_TE


def test_the_compiled_ops_are_taken_where_they_can() -> None:
    assert ops.why_not_native("cpu") == ""
    assert ops.available_backends()["native (cpu)"] == ""
    compiled = native.load_native().pool_topk(random_logits(50, 40), top_k=3).probs_TE
    plain = reference.pool_topk(random_logits(50, 40), top_k=3).probs_TE
    # they differ in their last bits, which tells them apart
    assert not torch.equal(compiled, plain)
    assert_equal("default", _probs(), compiled)
    assert_equal("native", _probs(backend="native"), compiled)
    assert_equal("reference", _probs(backend="reference"), plain)


def test_the_environment_can_ask_for_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMO_OPS", "reference")
    assert ops.why_not_native("cpu") == "EMO_OPS=reference is set"
    assert_equal("default", _probs(), _probs(backend="reference"))
    monkeypatch.setenv("EMO_OPS", "fast")
    with pytest.raises(ValueError, match=r"EMO_OPS must be one of .*; got 'fast'"):
        _probs()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"device_type": "meta"}, "without kernels for meta"),
        ({"device_type": "cpu", "num_experts": 1025}, "at most 1024 experts"),
        ({"device_type": "cpu", "top_k": 33}, "top-32"),
        ({"device_type": "cpu", "num_groups": 33}, "at most 32 groups"),
        ({"device_type": "cpu", "dtype": torch.float64}, "not torch.float64"),
    ],
)
def test_what_the_compiled_ops_cannot_do_is_said(arguments: dict[str, object], reason: str) -> None:
    assert reason in ops.why_not_native(**arguments)


def test_what_they_cannot_do_the_reference_does() -> None:
    logits_TE = random_logits(4, 1100)
    got = ops.pool_topk(logits_TE, top_k=40)
    assert_equal("probs", got.probs_TE, reference.pool_topk(logits_TE, top_k=40).probs_TE)
    ids_T = torch.zeros(4, dtype=torch.int64)
    scores_DE = ops.document_scores(logits_TE.double(), document_ids_T=ids_T, num_documents=1)
    assert ops.select_pool(scores_DE, pool_sizes_D=torch.tensor([7])).sum() == 7
    groups = {"top_k": 4, "num_groups": 40, "group_topk": 2}
    got = ops.pool_topk(logits_TE[:, :80], **groups)
    assert_equal("probs", got.probs_TE, reference.pool_topk(logits_TE[:, :80], **groups).probs_TE)


def test_compiled_ops_asked_for_by_name_do_not_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMO_OPS", "native")
    assert_equal("native", _probs(), _probs(backend="native"))
    with pytest.raises(RuntimeError, match=r"EMO_OPS=native .* top-32"):
        ops.pool_topk(random_logits(4, 1100), top_k=40)
    monkeypatch.setattr(native, "_own", None)
    monkeypatch.setattr(native, "LIBRARY", Path("nowhere"))
    for op in (_probs, lambda: dispatch.count_sends(torch.ones(2, 4).bool(), num_ranks=2)):
        with pytest.raises(RuntimeError, match=r"EMO_OPS=native .* not built"):
            op()
    # one that is named where it is called is the caller's choice
    assert _probs(backend="reference").shape == (50, 40)


def test_a_probe_that_failed_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail(*_: object, **__: object) -> None:
        calls.append("failed")
        raise RuntimeError("out of memory\nand where")

    monkeypatch.setattr(native, "_proven", set())
    with monkeypatch.context() as broken:
        broken.setattr(native.NativeOps, "document_scores", fail)
        assert ops.why_not_native("cpu") == ops.why_not_native("cpu") == "out of memory"
        assert calls == ["failed"] * 2
    assert ops.why_not_native("cpu") == ""
    # what has run once is not tried again
    with monkeypatch.context() as broken:
        broken.setattr(native.NativeOps, "document_scores", fail)
        assert ops.why_not_native("cpu") == ""


@pytest.mark.parametrize(("error", "is_of_this_gpu"), [(209, True), (35, True), (100, True), (2, False), (700, False)])
def test_an_error_of_cuda_is_told_as_what_it_is(
    monkeypatch: pytest.MonkeyPatch, error: int, is_of_this_gpu: bool
) -> None:
    emulated = load_compiled("cuda")
    ids_T = torch.zeros(3, dtype=torch.int64)
    monkeypatch.setenv("EMO_EMULATOR_ERROR", str(error))
    with pytest.raises(RuntimeError, match="emulated error") as caught:
        emulated.document_scores(random_logits(3, 4), document_ids_T=ids_T, num_documents=1)
    assert ("cannot run on this GPU" in str(caught.value)) == is_of_this_gpu
    monkeypatch.delenv("EMO_EMULATOR_ERROR")
    emulated.document_scores(random_logits(3, 4), document_ids_T=ids_T, num_documents=1)


@pytest.mark.parametrize("content", [None, "not a library"])
def test_without_a_library_that_loads_the_reference_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    library = tmp_path / "_native.so"
    if content is not None:
        library.write_text(content)
    monkeypatch.setattr(native, "LIBRARY", library)
    monkeypatch.setattr(native, "_own", None)
    reason = ops.why_not_native("cpu")
    assert ("`make native`" if content is None else "do not load") in reason
    assert_equal("default", _probs(), _probs(backend="reference"))
    with pytest.raises(RuntimeError, match=r"not built|do not load"):
        _probs(backend="native")


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_a_library_for_gpus_loads_where_a_stream_getter_is_missing(tmp_path: Path) -> None:
    """Either of two getters serves; as weak symbols neither is needed to load."""
    setup, torch_dir = setup_module(), Path(torch.__file__).parent
    includes = [f"-I{torch_dir}/include", f"-I{torch_dir}/include/torch/csrc/api/include"]
    target = tmp_path / "binding.o"
    subprocess.run(
        [
            *(os.environ.get("CXX", "c++"), *setup.CPP, *includes, "-O0", "-DEMO_WITH_CUDA"),
            *(f"-DTORCH_TARGET_VERSION={setup.STABLE_ABI}", "-c"),
            *(str(ROOT / "csrc" / "documents_binding.cpp"), "-o", str(target)),
        ],
        check=True,
    )
    told = subprocess.run(["nm", target], capture_output=True, text=True, check=True).stdout
    for getter in ("aoti_torch_get_current_cuda_stream", "torch_stream_native_handle"):
        assert re.search(rf"^ +w {getter}$", told, re.MULTILINE)
