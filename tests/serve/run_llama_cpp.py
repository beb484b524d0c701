"""Run a job (jobs.py) through llama.cpp on a CPU, in the Python of .venv/serve-llama-cpp: run_llama_cpp.py JOB RESULT.

The texts of this job are token ids. The caches of keys and values are in float32.
"""

from typing import Any

import llama_cpp
import numpy as np
from jobs import run_job


def answers_of(file: str, texts: list[list[int]], new_tokens: int, vocab_size: int) -> list[dict[str, Any]]:
    answers = []
    for tokens in texts:
        model = llama_cpp.Llama(
            file,
            n_ctx=len(tokens) + new_tokens,
            n_threads=1,
            logits_all=True,
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            flash_attn=False,
            verbose=False,
        )
        model.eval(tokens)
        logits_TV = np.array(model.scores[: len(tokens)], dtype=np.float64)
        assert logits_TV.shape[1] == vocab_size
        generated = []
        for _ in range(new_tokens):
            generated.append(int(model.scores[model.n_tokens - 1].argmax()))
            model.eval(generated[-1:])
        logits_TV -= logits_TV.max(-1, keepdims=True)
        rows_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
        answers.append({"tokens": tokens, "log_probabilities": rows_TV[:-1].tolist(), "generated": generated})
    return answers


if __name__ == "__main__":
    run_job("llama-cpp-python", answers_of)
