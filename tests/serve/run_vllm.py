"""Run a job (jobs.py) through vLLM on a CPU, in the Python of .venv/serve-vllm: run_vllm.py JOB RESULT."""

import os
from typing import Any

from jobs import run_job

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    # in this process, so that an error of the engine is an error of this script
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
    # the package vllm-cpu does not have the name that vLLM recognises a CPU by
    VLLM_TARGET_DEVICE="cpu",
)


def answers_of(model: str, texts: list[str], new_tokens: int, vocab_size: int) -> list[dict[str, Any]]:
    import vllm
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    engine = vllm.LLM(
        model=model, dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=8, max_logprobs=-1, seed=0
    )
    greedy = vllm.SamplingParams(
        temperature=0, max_tokens=new_tokens, ignore_eos=True, prompt_logprobs=vocab_size, detokenize=False
    )
    answers = []
    for output in engine.generate(texts, greedy):
        rows = [[row[token].logprob for token in range(vocab_size)] for row in output.prompt_logprobs[1:]]
        tokens, generated = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
        answers.append({"tokens": tokens, "log_probabilities": rows, "generated": generated})
    del engine
    # the groups of this model, so that the next one can have its own
    cleanup_dist_env_and_memory()
    return answers


if __name__ == "__main__":
    run_job("vllm-cpu", answers_of)
