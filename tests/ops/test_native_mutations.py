"""The tests of the compiled ops see each rule break: a line of csrc/ is changed in a copy, and a test must fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.emulator import CSRC_VARIABLE

ROOT = Path(__file__).resolve().parents[2]

CUDA_MUTATIONS: dict[str, tuple[str, str, str]] = {
    "nothing: the copy itself passes": ("routing.cu", "", ""),
    "one equal key too many at the boundary": (
        "warp.cuh",
        "rank + __popc(equal & lanes_below()) < surplus_rank",
        "rank + __popc(equal & lanes_below()) <= surplus_rank",
    ),
    "minus zero is below zero": ("warp.cuh", "__float_as_uint(x + 0.0f)", "__float_as_uint(x)"),
    "the pool of the first document serves all": (
        "warp.cuh",
        "if (wanted == row) return false;",
        "if (row != -2) return false;",
    ),
    "padding keeps out of a pool that serves all": (
        "pool_ops.h",
        "if (args.num_pools == 1) return 0;",
        "if (args.num_pools == 1) return document < 0 ? -1 : 0;",
    ),
    "ids past the last document are taken": ("warp.cuh", "if (my_document >= num_documents) my_document = -1;", ""),
    "the mask of the choice also masks the weights": (
        "warp.cuh",
        "return args.mask_logits ? allowed : inside;",
        "return allowed;",
    ),
    "a block looks at its first tokens only to see one document": (
        "scores.cu",
        "lane_id() >= tokens.count || tokens.my_document == first",
        "tokens.count == 0 || tokens.document(0) == first",
    ),
    "a pool is one expert too large": (
        "scores.cu",
        "const int equal_wanted = (int)wanted - above;",
        "const int equal_wanted = (int)wanted - above + 1;",
    ),
    "padding weighs as any token": ("routing.cu", "is_counted ? scores[c] * factor : uncounted", "scores[c] * factor"),
    "the bias counts the other way": (
        "routing.cu",
        "score += args.expert_bias[c * 32 + lane_id()]",
        "score -= args.expert_bias[c * 32 + lane_id()]",
    ),
    "sums leave the block before all its warps are done": (
        "routing.cu",
        "  __syncthreads();\n  if (of_documents.is_joined)",
        "  if (of_documents.is_joined)",
    ),
    "a warp collective in a divergent branch": (
        "routing.cu",
        "logf(total) - weighted_log",
        "lane_id() != 0 ? 0.0f : logf(total) - weighted_log",
    ),
    "the gradient's mean is a lane's own": ("routing.cu", "dz - warp_sum(dot)", "dz - dot"),
    "renormalised weights do not share a gradient": ("routing.cu", "(weight_grads[c] - mean)", "weight_grads[c]"),
    "the gradient of z misses a sigmoid router": (
        "routing.cu",
        "dx[c] * (1.0f - gates[c]) + dz * soft[c] * inverse",
        "dx[c] * (1.0f - gates[c])",
    ),
    "a row begins with every pair": ("dispatch.cu", "      is_first = false;", ""),
    "a token counts among those below itself": (
        "dispatch.cu",
        "__popc(senders & lanes_below())",
        "__popc(senders & (lanes_below() * 2 + 1))",
    ),
    "chunks do not see those before the last 128": (
        "dispatch.cu",
        "total + warp_prefix(mine);\n    total = __shfl_sync(kAllLanes, before + mine, 31);\n#pragma",
        "warp_prefix(mine);\n    total = __shfl_sync(kAllLanes, before + mine, 31);\n#pragma",
    ),
    "lanes count pairs before the others have looked": (
        "dispatch.cu",
        "    __syncwarp();\n    if (expert >= 0 && rank == 0)",
        "    if (expert >= 0 && rank == 0)",
    ),
    "a row's first pair belongs to the row before": (
        "dispatch.cu",
        "__popc(firsts & lanes_below()) + is_first - 1",
        "__popc(firsts & lanes_below()) - 1",
    ),
    "the last columns are not added up": (
        "rows.cu",
        "const long long packs = args.width / kCount;",
        "const long long packs = args.width / kCount - (args.width > 200);",
    ),
    "any address may hold a vector to copy": ("rows.cu", "!is_aligned(args.rows, args.copies, sizeof(Unit))", "false"),
    "any address may hold a vector to add": (
        "rows.cu",
        "args.width % kCount == 0 && is_aligned(args.copies, args.rows, 16)",
        "args.width % kCount == 0",
    ),
    "copies of rows from beyond are not written": ("rows.cu", "copies[p * units + i] = Unit{};", "continue;"),
    "copies beyond the tensor are written": (
        "rows.cu",
        "if (copy < (unsigned long long)args.num_copies) copies[copy * units + i] = unit;",
        "copies[copy % args.num_copies * units + i] = unit;",
    ),
    "copies lie in the order of their rows": (
        "rows.cu",
        "copies[copy * units + i] = unit;",
        "copies[j * units + i] = unit;",
    ),
    "pairs that are not there have a place": ("dispatch.cu", "    args.places[pair] = 0;\n", ""),
    "pairs that are not there have a code": ("dispatch.cu", "    args.codes[pair] = 0;\n", ""),
    "rows that are not there have a token": (
        "dispatch.cu",
        "args.sources[row] = args.copies[row] = -1;",
        "args.sources[row] = args.copies[row] = 0;",
    ),
    "negative scores are the largest": ("scores.cu", "0x8000000000000000ull", "0ull"),
    "a non-finite token counts": (
        "routing.cu",
        "is_counted = !is_padding && soft.is_finite()",
        "is_counted = !is_padding",
    ),
    "a non-finite token has a gradient": ("routing.cu", "is_counted ? dx[c] : 0.0f", "dx[c]"),
    "a non-finite token goes by its logits": (
        "routing.cu",
        "soft.is_finite() ? order_key(score) : kExcluded",
        "order_key(score)",
    ),
    "NaN outside the pool is not seen": (
        "warp.cuh",
        "if (!(x[c] < INFINITY)) top = INFINITY;",
        "if (has(set, c) && !(x[c] < INFINITY)) top = INFINITY;",
    ),
    "padding is a non-finite token": (
        "routing.cu",
        "facts[warp_id()][1] += !is_padding && !is_counted;",
        "facts[warp_id()][1] += !is_counted;",
    ),
    "the entropy of padding counts": (
        "routing.cu",
        "is_counted ? __float2uint_rn(fmaxf(entropy, 0.0f) * kOne) : 0u",
        "__float2uint_rn(fmaxf(entropy, 0.0f) * kOne)",
    ),
    "experts used go to the next document": (
        "documents.cu",
        "      flush();\n      document = next;",
        "      document = next;\n      flush();",
    ),
    "experts used by padding count": (
        "documents.cu",
        "    if (document >= 0 && word != 0)\n      atomicOr(reinterpret_cast<unsigned*>(args.used) + document",
        "    if (word != 0)\n      atomicOr((unsigned*)args.used + (document < 0 ? 0 : document)",
    ),
    "experts used go on into the next document": ("documents.cu", "    used = 0;\n", ""),
    "pools of documents without tokens count": ("documents.cu", "total > 0 ? pool_size : 0", "pool_size"),
    "a draw's second step shifts by 26": ("document_ops.h", "x >> 27", "x >> 26"),
    "copies from beyond are added": ("rows.cu", "if (copy >= (unsigned long long)args.num_copies) continue;", ""),
    "sixteen large gates add up": (
        "scores.cu",
        "has_gates(args.scoring) ? kMaxTokensOfGates : kMaxTokensPerWarp",
        "kMaxTokensPerWarp",
    ),
    "a gate has no limit": ("scores.cu", "units < kMaxGateUnits ? units : kMaxGateUnits", "units"),
    "a non-finite token adds its gates to its document": (
        "scores.cu",
        "if (!(fabsf(row_max(x, inside)) < INFINITY)) continue;",
        "",
    ),
    "far below zero a gate vanishes": ("warp.cuh", "x < kFarBelow ? root : sqrtf(", "sqrtf("),
    "far below zero a gate falls as its square": ("routing.cu", "softplus < 1e-7f ? 0.5f", "softplus < 1e-7f ? 1.0f"),
    "every gate falls as a sigmoid": ("routing.cu", "dx[c] * log_slope(gates[c])", "dx[c] * (1.0f - gates[c])"),
    "entropy takes a root of softplus for a sigmoid": (
        "routing.cu",
        "else if (scoring == Scoring::kSqrtSoftplus)\n    add(",
        "else if (scoring == Scoring::kSigmoid)\n    add(",
    ),
    "sums of a document go to the next one": (
        "routing.cu",
        "    flush(args, out, scores);\n    document = (int)next;",
        "    document = (int)next;\n    flush(args, out, scores);",
    ),
    "sums of a document go on into the next one": ("routing.cu", "      scores[e] = 0;\n", ""),
    "sums of a document are joined where a block only begins with it": (
        "routing.cu",
        "lane_id() >= tokens.count || tokens.my_document == wanted",
        "tokens.count == 0 || tokens.document(0) == wanted",
    ),
    "sums of a document in a whole block lack its choices": (
        "routing.cu",
        "if (kIsGeneral && args.by_document && of_documents.is_joined)",
        "if (false)",
    ),
    "choices of a block with several documents are lost in sums of a document": (
        "routing.cu",
        "add_count(out.document_choices + (long long)document * args.num_experts + expert, 1);",
        "",
    ),
    "gradients of sums of a document reach the next one": (
        "routing.cu",
        "    if (row == score_row) return;",
        "    if (score_row >= 0) return;",
    ),
    "a group ranks by its best expert alone": ("groups.cuh", "if (counted > 1) sum += value(next);", ""),
    "a group ranks by its two best experts": ("groups.cuh", "if (counted > k) sum += value(next);", ""),
    "a group ranks by logits instead of probabilities": ("groups.cuh", "is_exp ? expf(x - softmax_max) : x", "x"),
    "thin groups rank as full ones": ("groups.cuh", "is_left && counted + 1u == most", "is_left"),
    "equal groups: the higher one": (
        "groups.cuh",
        "__ffs(__ballot_sync(kAllLanes, is_candidate && mine == highest)) - 1",
        "31 - __clz(__ballot_sync(kAllLanes, is_candidate && mine == highest))",
    ),
    "thin groups let no further group in": (
        "groups.cuh",
        "(i < args.group_topk || held < args.top_k)",
        "i < args.group_topk",
    ),
    "groups that are not admitted are open": ("groups.cuh", "if (!is_open) keys[c]", "if (false) keys[c]"),
    "groups of the first document serve all": ("routing.cu", "if (is_other_pool) groups.set", "if (i == 0) groups.set"),
    "padding counts where groups are too many": ("routing.cu", "[2] += is_counted && is_over", "[2] += is_over"),
    "groups that are admitted count as used": (
        "routing.cu",
        "is_over = groups.used(chosen) > args.group_topk",
        "is_over = true",
    ),
    "a non-finite token keeps to groups": (
        "routing.cu",
        "if (limits_groups(args) && soft.is_finite())",
        "if (limits_groups(args))",
    ),
    "groups hold what lies before them": ("groups.cuh", "below_past & ~below_first", "below_past"),
    "groups are read before they are written": (
        "groups.cuh",
        "      __syncwarp();\n      const int from",
        "      const int from",
    ),
    "groups are written before they were read": (
        "groups.cuh",
        "      __syncwarp();\n#pragma unroll\n      for (int c = part",
        "#pragma unroll\n      for (int c = part",
    ),
    "equal keys of a group count once": ("groups.cuh", "if (taken == equal) {", "if (true) {"),
    "two equal best keys of a group count as one": ("groups.cuh", "best == next ? 2 : 1", "1"),
}
CPU_MUTATIONS: dict[str, tuple[str, str, str]] = {
    "nothing: the copy itself passes": ("routing_cpu.cpp", "", ""),
    "one equal key too few at the boundary": ("routing_cpu.cpp", "--wanted < 0", "--wanted < 1"),
    "a document's sums are dropped when the next one starts": (
        "scores_cpu.cpp",
        "      flush();\n      document = args",
        "      document = args",
    ),
    "threads overwrite each other's sums": (
        "vectors.h",
        "__atomic_fetch_add(to, value, __ATOMIC_RELAXED);",
        "*to = value;",
    ),
    "a coefficient of exp is rounded": ("vectors.h", "5.0000001201e-1f", "5.0001e-1f"),
    "renormalised weights count twice in the gradient": (
        "routing_cpu.cpp",
        "is_after ? score_grads.floats[b] : score_grads.floats[b] + upstream.floats[b]",
        "score_grads.floats[b] + upstream.floats[b]",
    ),
    "lanes past the last expert are not reset": ("vectors.h", "out.f[e] = fill;", "out.f[e] = 0.0f;"),
    "experts past the last eight are not seen": (
        "dispatch_cpu.cpp",
        "    if (flags[e]) visit(e);",
        "    if (flags[e] && num_experts < 8) visit(e);",
    ),
    "pairs for earlier ranks are not counted": (
        "dispatch_cpu.cpp",
        "if (c % table.group == 0) before = 0;",
        "if (c % table.group < 2) before = 0;",
    ),
    "a row begins with every pair": ("dispatch_cpu.cpp", "* 2 + is_first;", "* 2 + 1;"),
    "the last columns are not added up": (
        "dispatch_cpu.cpp",
        "for (int h = 0; h < length; ++h) sums[h] +=",
        "for (int h = 0; h < length - 1; ++h) sums[h] +=",
    ),
    "copies lie in the order of their rows": (
        "dispatch_cpu.cpp",
        "copies + args.order[j] * args.row_bytes",
        "copies + j * args.row_bytes",
    ),
    "a non-finite token counts": (
        "routing_cpu.cpp",
        "is_counted = !is_padding && soft.is_finite",
        "is_counted = !is_padding",
    ),
    "a non-finite token adds to its document": (
        "scores_cpu.cpp",
        "if (!(shift > -INFINITY) || largest(-is_bad) != 0) continue;",
        "",
    ),
    "a non-finite token has a gradient": ("routing_cpu.cpp", "document < 0 || !whole.is_finite", "document < 0"),
    "experts used go to the next document": (
        "documents_cpu.cpp",
        "      flush();\n      document = args.document_ids[t];",
        "      document = args.document_ids[t];\n      flush();",
    ),
    "threads overwrite each other's experts": (
        "documents_cpu.cpp",
        "__atomic_fetch_or(args.used + document * words + w, (int32_t)used[w], __ATOMIC_RELAXED);",
        "args.used[document * words + w] = (int32_t)used[w];",
    ),
    "sums begin with those of the row before": (
        "dispatch_cpu.cpp",
        "Sum sums[kStretch] = {};",
        "static thread_local Sum sums[kStretch];",
    ),
    "a gate has no limit": ("scores_cpu.cpp", "std::min(units.i[e], kMaxGateUnits)", "units.i[e]"),
    "far below zero a gate vanishes": (
        "vectors.h",
        "where(x < kFarBelow, root, square_root(softplus))",
        "square_root(softplus)",
    ),
    "far below zero a gate has no slope": (
        "routing_cpu.cpp",
        "where(x < kFarBelow, splat(0.5f), sigmoid(x) / (2.0f * g * g))",
        "sigmoid(x) / (2.0f * g * g)",
    ),
    "logarithms are off by a factor of two": ("vectors.h", "(i >> 23) - 127", "(i >> 23) - 126"),
    "sums of a document are dropped when the next one starts": (
        "routing_cpu.cpp",
        "    flush(args, out);\n    row = document;",
        "    row = document;",
    ),
    "choices in sums of a document go on into the next one": (
        "routing_cpu.cpp",
        "    std::memset(choices, 0, args.num_experts * sizeof(int64_t));\n",
        "",
    ),
    "gradients of sums of a document reach the next one": (
        "routing_cpu.cpp",
        "if (args.by_document && document != score_row)",
        "if (args.by_document && score_row < 0)",
    ),
    "a group ranks by experts that it does not hold": (
        "groups_cpu.cpp",
        "groups.counted.blocks[b] > k ? rows",
        "groups.counted.blocks[b] >= 0 ? rows",
    ),
    "a group ranks by logits instead of probabilities": (
        "groups_cpu.cpp",
        "softmax_max != nullptr ? exp_nonpositive(x - *softmax_max) : x",
        "x",
    ),
    "a group ranks by all it holds": ("groups_cpu.cpp", "count < groups.wanted ? count : groups.wanted", "count"),
    "thin groups rank as full ones": ("groups_cpu.cpp", "(n < other) | ((n == other) & is_better)", "is_better"),
    "equal groups: the higher one": ("groups_cpu.cpp", "(index > g)", "(index < g)"),
    "thin groups let no further group in": (
        "groups_cpu.cpp",
        "(rank < groups.group_topk) | (held < groups.top_k)",
        "rank < groups.group_topk",
    ),
    "groups that are not admitted are open": ("groups_cpu.cpp", "if (admitted.i[g]) continue;", "continue;"),
    "groups of the first document serve all": (
        "routing_cpu.cpp",
        "pool.set(args, document) && is_limited",
        "pool.set(args, document) && is_limited && t == begin",
    ),
    "groups that are admitted count as used": (
        "routing_cpu.cpp",
        "facts[2] += groups_used(groups, chosen) > args.group_topk",
        "facts[2] += 1",
    ),
    "a non-finite token keeps to groups": ("routing_cpu.cpp", "is_limited && soft.is_finite", "is_limited"),
}
WORDS = {"non-finite": "nonfinite", "NaN": "nonfinite", "group": "groups", "gate": "gates", "sums of a": "gates"}
"""In the names of mutations, and the tests that must see those."""
WIDE = "256 or 512 or 1000 or 1024 or odd or more or float16"
"""Cases that take long on the emulator and find nothing that narrower ones do not."""
CASES = [("cuda", name) for name in CUDA_MUTATIONS] + [("cpu", name) for name in CPU_MUTATIONS]


def suites_of(name: str, file: str, *, is_whole: bool) -> list[str]:
    """The test files that must see a mutation."""
    if is_whole:
        return ["native", "groups", "nonfinite", "gates", "documents", "dispatch"]
    for word, suite in WORDS.items():
        if word in name:
            return [suite]
    if file.startswith("document"):
        return ["documents"]
    return ["dispatch" if file.startswith(("dispatch", "rows")) else "native"]


@pytest.mark.slow
@pytest.mark.parametrize(("kernels", "name"), CASES)
def test_a_broken_line_is_seen(kernels: str, name: str, tmp_path: Path) -> None:
    file, before, after = (CUDA_MUTATIONS if kernels == "cuda" else CPU_MUTATIONS)[name]
    csrc = shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    if before:
        text = (csrc / file).read_text()
        assert text.count(before) == 1, f"{before!r} is not one place of {file} any more"
        (csrc / file).write_text(text.replace(before, after))
    chosen = f"({'emulated or schedule' if kernels == 'cuda' else '[cpu or threads'}) and not ({WIDE})"
    tests = [f"tests/ops/test_{which}.py" for which in suites_of(name, file, is_whole=not before)]
    done = subprocess.run(
        [*(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"), *(*tests, "-k", chosen)],
        cwd=ROOT,
        env={**os.environ, CSRC_VARIABLE: str(csrc)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    told = done.stdout[-3000:] + done.stderr[-500:]
    if not before:
        assert done.returncode == 0, told
        return
    # a test failed on what the kernels gave; not the build, not the collection
    assert done.returncode == 1, told
    assert f"FAILED {tests[0]}" in done.stdout, told
    assert " error" not in done.stdout.splitlines()[-1], told
