"""Merge a LoRA adapter of Hugging Face peft into the exported folder that the adapter was trained on.

transformers loads the folder, and peft's own code loads and merges the adapter: linear layers (`target_modules`) and
the stacked weights of experts and routers (`target_parameters`). The result is a temporary folder with the same tensor
names and the same config.json.

The logits before and after the merge are compared, because peft may merge an adapter wrongly.

Memory: all weights once, in float32, and changed copies of the experts of one layer. Disk: a second
copy of the folder, until the caller is done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import reprlib
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import safe_open
from torch import Tensor

from emo_megatron.files import machine_error, one_line, writing
from emo_megatron.hf import folder as folders
from emo_megatron.hf.adapter_base import CONFIG, check_base, configuration
from emo_megatron.hf.folder import HuggingFaceFolder
from emo_megatron.hf.formats import QWEN2_MOE

WEIGHTS = "adapter_model.safetensors"
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the weights of the model as they are. Others train changed weights."""
_UNSUPPORTED = (
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config"),
    *("use_bdlora", "use_qalora", "velora_config"),
)
"""Fields of variants of LoRA without a tested merge into the weights."""
_PREFIX, _LORA_A = "base_model.model.", ".lora_A.weight"
"""Start and end of the name of an adapter's first factor, [rank, inputs]."""
_ONE_EXPERT = re.compile(
    r"(?P<experts>.*\.layers\.(?P<layer>\d+)\.mlp\.experts)\.(?P<number>\d+)\.(?P<kind>gate|up|down)_proj"
)
_STACKED = {"gate": "gate_up_proj", "up": "gate_up_proj", "down": "down_proj"}
"""Kind of an expert's weight -> the stacked weight of transformers 5."""
_STACKABLE = (("down",), ("gate", "up", "down"))
"""Kinds that an expert's adapter may have."""
_TIED = re.compile(r".*\b(?P<target>embed_tokens|lm_head)\..*\blora_.*")
"""Name of an adapter's tensor that adds to the weights of the embedding or of the output."""
_TOKENS = 32
"""Number of random tokens on which the adapted model and the merged model are compared."""
_TOLERANCE = 1e-3
"""Largest difference of a token's logits, relative to the largest logit: a merge changes only the order of sums, which
gives 4e-6 on the test models, and a deep model may add up more."""
_TOKENS_WITHIN = 0.9
"""Share of the tokens that must be within the tolerance: a token with two experts of nearly equal score can choose the
other one."""
_LEARNED = {
    "qkv_bias": "biases of q_proj, k_proj and v_proj (bias)",
    "shared_gate": "shared_expert_gate (target_modules)",
    "shared_hidden": "shared_expert (target_modules)",
}
"""Properties of a model that tensors of constants lack until an adapter changes the tensors -> what was trained."""


@contextlib.contextmanager
def merged(base: HuggingFaceFolder, adapter: Path, *, output: Path) -> Iterator[HuggingFaceFolder]:
    """The model of `base` with an adapter's changes, in a temporary folder beside `output`.

    Raises:
        NotImplementedError: the kind of adapter cannot be merged.
        ValueError: the adapter was trained on another model, does not fit, changes what the model does not have, or
            the logits of the merged model are not those of the adapted model.
    """
    check(base, adapter)
    near = next(above for above in output.absolute().parents if above.is_dir())
    with tempfile.TemporaryDirectory(dir=near, prefix=".merged-") as name:
        with writing(output, under=Path(name)):
            _merge(base, adapter).save_pretrained(name)
            # transformers writes other fields, and the model is the same
            shutil.copyfile(base.path / folders.CONFIG, Path(name, folders.CONFIG))
        yield _opened(Path(name), base, adapter)


def check(base: HuggingFaceFolder, adapter: Path) -> None:
    """Raise the errors of `merged` that can be known from the adapter's configuration."""
    _check_kind(base, adapter)
    check_base(base, adapter)


def _check_kind(base: HuggingFaceFolder, adapter: Path) -> None:
    if base.format is not QWEN2_MOE:
        raise ValueError(
            f"--adapter needs a folder of the format {QWEN2_MOE.model_type}; {base.path} has the format "
            f"{base.format.model_type}: export with --format {QWEN2_MOE.model_type}, and train the adapter on that"
        )
    for file in (CONFIG, WEIGHTS):
        if not (adapter / file).is_file():
            raise ValueError(
                f"--adapter must name a folder that peft's save_pretrained wrote, with {CONFIG} and {WEIGHTS}; "
                f"{adapter} has no {file}"
            )
    config = configuration(adapter)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise NotImplementedError(
            f"{adapter / CONFIG}: peft_type must be LORA; got {reprlib.repr(kind)}: train the adapter with LoraConfig"
        )
    if variants := [name for name in _UNSUPPORTED if config.get(name)]:
        raise NotImplementedError(
            f"{adapter / CONFIG}: {', '.join(variants)} must not be set, because peft_type LORA is merged without "
            "these variants: train the adapter without"
        )
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise NotImplementedError(
            f"{adapter / CONFIG}: init_lora_weights must be true, false, gaussian, orthogonal or eva; got "
            f"{reprlib.repr(start)}, which starts from other weights than {base.path}: save the adapter with peft's "
            "path_initial_model_for_weight_conversion"
        )
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    if unknown := sorted(name for name in config.keys() - known if config[name]):
        raise NotImplementedError(
            f"{adapter / CONFIG}: peft {peft.__version__} does not know the fields {', '.join(map(repr, unknown))}: "
            "install the version of peft that wrote the file"
        )


def _merge(base: HuggingFaceFolder, adapter: Path) -> Any:
    """transformers' model of `base` with the adapter merged in."""
    from transformers import Qwen2MoeForCausalLM

    with _cannot_be_merged(base, adapter):
        if base.architecture.tied:
            _check_tied(adapter)
        config = _peft_config(base, adapter)
    # other implementations need sizes that are multiples of 16 bytes
    eager: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": "eager"}
    # in float32 the comparison sees small changes, and the sums are rounded once, when they are saved
    model: Any = Qwen2MoeForCausalLM.from_pretrained(
        str(base.path), dtype=torch.float32, local_files_only=True, **eager
    )
    with _cannot_be_merged(base, adapter), torch.no_grad(), warnings.catch_warnings():
        # peft warns that these patterns match no module, because they name stacked weights
        warnings.filterwarnings("ignore", message=".*_pattern keys did not match")
        adapted: Any = peft.PeftModel(model, config)
        # from_pretrained only warns about weights of the adapter that have no place, or are not there
        loaded = adapted.load_adapter(str(adapter), "default", torch_device="cpu")
        if misfits := [*loaded.missing_keys, *loaded.unexpected_keys]:
            raise ValueError(f"{len(misfits)} tensors are missing or have no place, for example {min(misfits)}")
        wanted_TV = _logits(adapted, base)
        merged_model = adapted.merge_and_unload(safe_merge=True)
        _check_merge(_logits(merged_model, base), wanted_TV)
        return merged_model.to(base.dtype)


@contextlib.contextmanager
def _cannot_be_merged(base: HuggingFaceFolder, adapter: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # peft raises errors of many types, and some have several lines
        if isinstance(error, MemoryError) or machine_error(error):
            raise
        raise ValueError(
            f"the adapter {adapter} cannot be merged into {base.path}: {one_line(error) or type(error).__name__}"
        ) from error


def _check_tied(adapter: Path) -> None:
    """Raise ValueError if an adapter of a tied model adds to the embedding or to the output: peft changes both."""
    with safe_open(adapter / WEIGHTS, framework="pt") as file:
        targets = sorted({match["target"] for name in file.keys() if (match := _TIED.fullmatch(name))})  # noqa: SIM118
    if targets:
        raise ValueError(
            f"LoRA must not train {' and '.join(targets)} if tie_word_embeddings is true, because embedding and output "
            "are one weight, and the merge would change both: train the adapter without this target, or with "
            "modules_to_save=['embed_tokens'] and ensure_weight_tying=True"
        )


def _logits(model: Any, base: HuggingFaceFolder) -> Tensor:
    """[T, V] float32 logits of random tokens, which are the same in every call."""
    generator = torch.Generator().manual_seed(0)
    count = min(_TOKENS, base.architecture.max_positions)
    tokens_1T = torch.randint(base.architecture.vocab_size, (1, count), generator=generator)
    logits_TV: Tensor = model.eval()(input_ids=tokens_1T, use_cache=False).logits[0].float()
    return logits_TV


def _check_merge(found_TV: Tensor, wanted_TV: Tensor) -> None:
    """Raise ValueError if the logits of the merged model are not those of the adapted model."""
    error_T = (found_TV - wanted_TV).abs().amax(-1) / wanted_TV.abs().max().clamp(min=1.0)
    error = float(error_T.quantile(_TOKENS_WITHIN))
    # this form of the condition is also true for a difference that is NaN
    if not error <= _TOLERANCE:
        raise ValueError(
            f"the logits of the merged model must be those of the adapted model up to {_TOLERANCE} of the "
            f"largest logit; got {error:.2g}, so peft {peft.__version__} does not merge this adapter right: "
            "use another version of peft, or train the adapter with other settings of LoraConfig"
        )


def _peft_config(base: HuggingFaceFolder, adapter: Path) -> Any:
    """peft's configuration. An adapter whose tensors have one name per expert, or whose router is a linear layer, gets
    the targets of transformers 5: transformers 4 had such layers, and Megatron-Bridge writes such adapters.

    Raises:
        ValueError: the experts have different ranks or scales, or adapters of different weights, which peft cannot
            stack.
    """
    config: Any = peft.PeftConfig.from_pretrained(str(adapter))
    with safe_open(adapter / WEIGHTS, framework="pt") as file:
        ranks = {
            name.removeprefix(_PREFIX).removesuffix(_LORA_A): file.get_slice(name).get_shape()[0]
            for name in file.keys()  # noqa: SIM118  not a dict
            if name.endswith(_LORA_A)
        }
    experts = {name: match for name in ranks if (match := _ONE_EXPERT.fullmatch(name))}
    routers = {name for name in ranks if name.endswith(".mlp.gate")}
    named = list(config.target_parameters or ())
    if not experts and (not routers or any(name.endswith("gate.weight") for name in named)):
        return config
    found = {ranks[name] for name in experts}
    if len(found) > 1:
        raise ValueError(f"all routed experts must have one rank; got the ranks {sorted(found)}")
    if experts and config.alpha_pattern:
        raise ValueError(f"alpha_pattern must be empty if every expert has tensors; got {config.alpha_pattern}")
    _check_kinds(experts.values(), num_experts=base.architecture.num_experts)
    stacked = {f"{match['experts']}.{_STACKED[match['kind']]}" for match in experts.values()}
    config.target_modules = set(ranks) - experts.keys() - routers
    config.target_parameters = sorted({*named, *stacked, *(f"{name}.weight" for name in routers)})
    for rank in found:
        # peft stacks gate and up, so that their ranks add up, and the scale alpha / rank must stay
        config.rank_pattern |= {"experts.gate_up_proj": 2 * rank, "experts.down_proj": rank}
        times = math.sqrt(2) if config.use_rslora else 2
        config.alpha_pattern |= {"experts.gate_up_proj": times * config.lora_alpha}
    return config


def _check_kinds(experts: Iterable[re.Match[str]], *, num_experts: int) -> None:
    """Raise ValueError unless all experts of a layer have adapters of the same, stackable kinds of weights."""
    kinds: dict[int, dict[int, set[str]]] = {}
    for match in experts:
        kinds.setdefault(int(match["layer"]), {}).setdefault(int(match["number"]), set()).add(match["kind"])
    for layer, of_expert in sorted(kinds.items()):
        numbers = sorted({*range(num_experts), *of_expert})
        found = Counter(tuple(k for k in _STACKABLE[-1] if k in of_expert.get(n, ())) for n in numbers)
        if len(found) > 1 or not found.keys() <= set(_STACKABLE):
            got = [f"{' and '.join(f'{k}_proj' for k in has) or 'none'} of {n} experts" for has, n in found.items()]
            raise ValueError(
                f"layer {layer}: every routed expert must have an adapter of down_proj, or of gate_proj, up_proj and "
                f"down_proj; got {', '.join(got)}"
            )


def _opened(path: Path, base: HuggingFaceFolder, adapter: Path) -> HuggingFaceFolder:
    """The merged folder; ValueError if its model has other parts than that of `base`."""
    try:
        model = HuggingFaceFolder(path)
    except ValueError as error:
        said = str(error).replace(str(path), "the merged model").replace(os.sep + folders.CONFIG, "")
        raise ValueError(f"the adapter {adapter} does not fit {base.path}: {said}") from None
    before, after = (dataclasses.asdict(folder.architecture) for folder in (base, model))
    if changed := [name for name, value in before.items() if after[name] != value]:
        what = " and ".join(_LEARNED.get(name, name) for name in changed)
        raise ValueError(
            f"the adapter {adapter} trains {what}, which the model in {base.path} does not have: train the adapter "
            "without these modules in target_modules and modules_to_save, and with bias='none'"
        )
    return model
