"""--sft: a document is a conversation, and the padding after the last one belongs to none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.utils import Split
from support import tiny, words
from support.pretraining import logged, pretrain

from emo_megatron.ops import draw_pool_sizes

SEQ = 16
WORDS = [f"w{i}" for i in range(40)]


def _messages(*conversations: tuple[int, ...]) -> list[dict[str, str]]:
    """The messages of a sample, of so many words each; a system message opens a conversation."""
    return [
        {"role": role, "content": " ".join(WORDS[(7 * n + i) % len(WORDS)] for i in range(n))}
        for lengths in conversations
        for role, n in zip(("system", "user", "assistant"), lengths, strict=False)
    ]


# lengths of messages, conversation by conversation, and what follows: bounds of the documents and padding
SAMPLES = {
    "padded": ([(2, 3, 2), (1, 2)], [0, 7, SEQ], 6),
    "full": ([(2, 3, 4), (3, 4)], [0, 9, SEQ], 0),
    "cut": ([(2, 3, 4), (3, 9), (1, 1)], [0, 9, SEQ], 0),
    "next one lies outside": ([(2, 3, 11), (3, 1)], [0, SEQ], 0),
    "a prompt alone": ([(4,)], [0, SEQ], 12),
}


def _documents(samples: list[list[tuple[int, ...]]]) -> list[Any]:
    """Of samples with messages of these lengths: boundaries and padding."""
    from emo_megatron.mcore.batches import NUM_PADDING, PoolSFTDataset

    class Tokenizer:
        """A token a word, the last of every message the end-of-document token, which is the padding's too."""

        eod = pad = 1
        vocab_size = 512
        unique_identifiers = "words"

        def tokenize_conversation(self, conversation, **_):
            lengths = [len(message["content"].split()) for message in conversation]
            tokens = np.concatenate([np.array([5] * (n - 1) + [1]) for n in lengths])
            return tokens, tokens.copy()

    tiny.setup()
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=SEQ,
        context_parallel_size=1,
        blend=(["talk"], None),
        split="100,0,0",
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    lines = [_messages(*sample) for sample in samples]
    dataset = PoolSFTDataset(lines, None, np.arange(len(lines)), len(lines), Split.train, config)
    found = [dataset[i] for i in range(len(lines))]
    return [(sample["cu_seqlens"].unique().tolist(), sample[NUM_PADDING]) for sample in found]


def test_padding_belongs_to_no_conversation(ranks):
    """What it has no vote in: tests/mcore/test_padding.py."""
    samples = [lengths for lengths, _, _ in SAMPLES.values()]
    (documents,) = ranks(1).run(_documents, samples=samples)
    assert documents == [(bounds, padding) for _, bounds, padding in SAMPLES.values()]


@pytest.fixture
def talk(tmp_path, monkeypatch) -> dict[str, Path]:
    """Files of a run: a tokenizer that ends conversations, and eight samples."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    template = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}" + words.END
    special = {"eos_token": words.END, "chat_template": template}
    tokenizer = words.write_tokenizer(tmp_path / "tokenizer", size=60, around="$A", **special)
    samples = [_messages((2, 5, 9 + n), (1, 3 * n + 1)) for n in range(8)]
    lines = [json.dumps({"messages": messages}) for messages in samples]
    (tmp_path / "talk.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"tokenizer": tokenizer, "data": tmp_path / "talk.jsonl"}


def test_a_run_on_conversations(talk):
    flags: list[object] = ["--sft", "--tokenizer-type", "SFTTokenizer", "--pool-min", 3]
    flags += ["--sft-tokenizer-prompt-format", "default", "--tokenizer-model", talk["tokenizer"]]
    output = pretrain(1, *flags, "--micro-batch-size", 4, data=talk["data"])
    losses, means = logged(output), logged(output, "pool_size")
    assert len(losses) == len(means) == 4
    assert losses[-1] < losses[0]
    # every step has the eight samples, in their order, with two conversations each
    starts = torch.tensor([start for n in range(8) for start in (0, 17 + n)])
    for step, mean in enumerate(means):
        sizes_LD = draw_pool_sizes(
            8 * step + torch.arange(8).repeat_interleave(2),
            offsets_D=starts,
            layer_number=range(2, 5),
            seed=1234,
            low=3,
            high=8,
            unrestricted_share=0.0,
            num_experts=8,
        )
        assert mean == pytest.approx(sizes_LD.double().mean().item(), abs=1e-2)
