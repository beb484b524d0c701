"""Run a job (jobs.py) through SGLang on a CPU, in the Python of .venv/serve-sglang: run_sglang.py JOB RESULT.

SGLang's processes import this file again, so the two changes for a CPU are made when the file is imported:

- The functions of `sgl_kernel` raise an error when they are called: the published package has no library for a CPU.
- The weighted output of the shared expert is added in torch, because SGLang's kernel for this is written in Triton.
"""

import os
import sys
import types
from collections.abc import Callable
from typing import Any

from jobs import run_job

os.environ.update(HF_HUB_OFFLINE="1", SGLANG_USE_CPU_ENGINE="1")


class NoKernels(types.ModuleType):
    """A module with every name; none of them can be called."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_args: Any, **_options: Any) -> None:
            raise NotImplementedError(f"sgl_kernel.{name} has no code for a CPU here")

        return missing


sys.modules["sgl_kernel"] = NoKernels("sgl_kernel")

import torch  # noqa: E402
from sglang.srt.models import qwen2_moe  # noqa: E402


def add_shared_expert(
    hidden_TD: torch.Tensor, gate_D: torch.Tensor, shared_TD: torch.Tensor, output_TD: torch.Tensor
) -> None:
    """SGLang's `fused_gate_sigmoid_mul_add`: output += sigmoid(hidden @ gate) * shared, in place."""
    output_TD.add_((hidden_TD @ gate_D).sigmoid()[:, None] * shared_TD)


qwen2_moe.fused_gate_sigmoid_mul_add = add_shared_expert


def answers_of(model: str, texts: list[str], new_tokens: int, vocab_size: int) -> list[dict[str, Any]]:
    import sglang

    engine = sglang.Engine(
        model_path=model,
        device="cpu",
        dtype="float32",
        attention_backend="torch_native",
        sampling_backend="pytorch",
        context_length=128,
        max_total_tokens=2048,
        max_running_requests=8,
        mem_fraction_static=0.3,
        disable_cuda_graph=True,
        disable_custom_all_reduce=True,
        disable_overlap_schedule=True,
        skip_server_warmup=True,
    )
    outputs = engine.generate(
        prompt=texts,
        sampling_params={"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True},
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=vocab_size,
    )
    engine.shutdown()
    answers = []
    for output in outputs:
        told = output["meta_info"]
        rows = [{token: value for value, token, _ in row} for row in told["input_top_logprobs"][1:]]
        answers.append(
            {
                "tokens": [token for _, token, _ in told["input_token_logprobs"]],
                "log_probabilities": [[row[token] for token in range(vocab_size)] for row in rows],
                "generated": output["output_ids"],
            }
        )
    return answers


if __name__ == "__main__":
    run_job("sglang", answers_of)
