"""EASY-EP by its authors (arXiv 2504.06792, RUCAIBox/EASYEP): pruning/expert_selection.py chooses the experts.

The authors' first stage, pruning/inf_new.py, runs DeepSeek-R1 on CUDA devices. This script records the same values of a
Qwen2-MoE in the same file format: chosen experts, gates, norms of the outputs, and the cosine between the residual
stream before and after the routed experts. The second stage reads this file. The second stage is written for 58 layers
of 256 experts, so the file has that many, and layers beyond those of the model choose no experts.

As published, the second stage ends in an UnboundLocalError, because main() imports json again after its first use. With
--mended, the second import is taken out, and nothing else.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from arguments import Arguments, read_arguments

LAYERS = 58
"""Layers that expert_selection.py reads."""
SECOND_IMPORT = "        import json\n"


def record(arguments: Arguments) -> list[dict[str, Any]]:
    """The values of every document, as pruning/inf_new.py writes them."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(arguments.model), torch_dtype="auto").eval()
    residual: list[torch.Tensor] = []
    values: list[tuple[Any, Any, Any, Any]] = []

    def before(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        residual.append(inputs[0].flatten(0, -2))

    def after(block: Any, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        input_TH = inputs[0].flatten(0, -2)
        weights_TK, experts_TK = output[1].float().softmax(-1).topk(block.top_k, dim=-1)
        if block.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        norms_TK, routed_TH = torch.zeros_like(weights_TK), torch.zeros_like(input_TH)
        for expert in experts_TK.unique().tolist():
            tokens, slots = (experts_TK == expert).nonzero(as_tuple=True)
            output_NH = block.experts[expert](input_TH[tokens])
            norms_TK[tokens, slots] = output_NH.norm(dim=-1)
            routed_TH[tokens] += output_NH * weights_TK[tokens, slots, None]
        stream_TH = residual.pop()
        cosine_T = torch.nn.functional.cosine_similarity(stream_TH, stream_TH + routed_TH, dim=-1)
        values.append((experts_TK.tolist(), weights_TK.tolist(), norms_TK.tolist(), [cosine_T.tolist()]))

    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_pre_hook(before)
        layer.mlp.register_forward_hook(after)
    samples = []
    for tokens in arguments.documents:
        values.clear()
        with torch.no_grad():
            model(input_ids=torch.tensor([tokens]))
        nothing = ([[]] * len(tokens), [[]] * len(tokens), [[]] * len(tokens), [[1.0] * len(tokens)])
        columns = zip(*values, *[nothing] * (LAYERS - len(values)), strict=True)
        samples.append(dict(zip(("idxs", "weights", "norms", "simibr"), columns, strict=True)))
    return samples


def main(arguments: Arguments, *, mended: bool) -> None:
    """Record, choose, and write kept.json: for each layer, the kept experts."""
    arguments.output.mkdir(parents=True)
    recorded, mask = arguments.output / "recorded.jsonl", arguments.output / "mask.json"
    recorded.write_text("".join(json.dumps(sample) + "\n" for sample in record(arguments)), encoding="utf-8")
    script = importlib.util.find_spec("pruning.expert_selection")
    assert script is not None
    assert script.origin is not None
    sys.argv[1:] = ["--input_file", str(recorded), "--output_file", str(arguments.output / "scores.pt")]
    sys.argv += ["--expert_mask", str(mask), "--target_number", str(arguments.keep)]
    source = Path(script.origin).read_text(encoding="utf-8")
    if mended:
        assert source.count(SECOND_IMPORT) == 1
        source = source.replace(SECOND_IMPORT, "")
    exec(compile(source, script.origin, "exec"), {"__name__": "__main__"})
    config = json.loads((arguments.model / "config.json").read_text(encoding="utf-8"))
    rows = json.loads(mask.read_text(encoding="utf-8"))[: config["num_hidden_layers"]]
    kept = [[expert for expert, value in enumerate(row) if value] for row in rows]
    Path(arguments.output / "kept.json").write_text(json.dumps(kept), encoding="utf-8")
    recorded.unlink()


if __name__ == "__main__":
    mended = "--mended" in sys.argv
    if mended:
        sys.argv.remove("--mended")
    main(read_arguments(), mended=mended)
