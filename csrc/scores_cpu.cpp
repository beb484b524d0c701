// Document scores and pools on a CPU: one token after the other, sixteen experts at a time.
//
// A range of tokens is one thread's work; sums are integers, so results do not depend on how tokens
// are split over threads.
#include <algorithm>

#include "vectors.h"

namespace emo::cpu {

// Add a token's gates, in units, to the run of its document.
static EMO_INLINE void add_gates(Scoring scoring, const Row& logits, int num_experts,
                                 int64_t* run) {
  Row units;
  for (int b = 0; b < num_blocks(num_experts); ++b) {
    const Floats x = logits.floats[b];
    const Floats g = scoring == Scoring::kSigmoid ? sigmoid(x) : sqrt_softplus(x);
    // the limit is no float; the one above it is, and still an int32
    const Floats limited = g < 8.0f ? g : splat(8.0f);
    units.ints[b] = __builtin_convertvector(limited * kOne + 0.5f, Ints);
  }
  for (int e = 0; e < num_experts; ++e) run[e] += std::min(units.i[e], kMaxGateUnits);
}

EMO_CLONES void document_scores(const ScoreArgs& args, int64_t begin, int64_t end) {
  const int num_experts = args.num_experts, blocks = num_blocks(num_experts);
  Row logits;
  int64_t run[kMaxExperts];
  int64_t document = -1;
  const auto flush = [&] {
    // another thread may hold a part of this document too
    for (int e = 0; document >= 0 && e < num_experts; ++e)
      add_shared(args.sums + document * num_experts + e, run[e]);
  };
  for (int64_t t = begin; t < end; ++t) {
    if (t == begin || args.document_ids[t] != document) {
      flush();
      document = args.document_ids[t];
      std::memset(run, 0, num_experts * sizeof(int64_t));
    }
    if (document < 0) continue;
    load_row(args.logits, args.dtype, t, num_experts, -INFINITY, logits);
    Floats top = splat(-INFINITY);
    Ints is_bad = splat(0);
    for (int b = 0; b < blocks; ++b) {
      top = max(top, logits.floats[b]);
      is_bad |= is_nan_or_inf(logits.floats[b]);
    }
    const float shift = largest(top);
    if (!(shift > -INFINITY) || largest(-is_bad) != 0) continue;
    if (has_gates(args.scoring)) {
      add_gates(args.scoring, logits, num_experts, run);
      continue;
    }
    Floats total = splat(0.0f);
    for (int b = 0; b < blocks; ++b) {
      logits.floats[b] = exp_nonpositive(logits.floats[b] - shift);
      total += logits.floats[b];
    }
    const float unit = kOne / sum(total);
    for (int b = 0; b < blocks; ++b)
      logits.ints[b] = __builtin_convertvector(logits.floats[b] * unit + 0.5f, Ints);
    for (int e = 0; e < num_experts; ++e) run[e] += logits.i[e];
  }
  flush();
}

void select_pool(const SelectArgs& args, int64_t begin, int64_t end) {
  const int num_free = args.num_experts - args.num_forced;
  int order[kMaxExperts];
  for (int64_t d = begin; d < end; ++d) {
    const int64_t* scores = args.scores + d * args.num_experts;
    uint8_t* pool = args.pool + d * args.num_experts;
    const int64_t wanted = args.pool_sizes[d] - args.num_forced;
    const int kept = (int)std::clamp<int64_t>(wanted, 0, num_free);
    for (int e = 0; e < num_free; ++e) order[e] = e;
    std::nth_element(order, order + kept, order + num_free, [scores](int a, int b) {
      return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
    });
    std::memset(pool, 0, num_free);
    std::memset(pool + num_free, 1, args.num_forced);
    for (int i = 0; i < kept; ++i) pool[order[i]] = 1;
  }
}

}  // namespace emo::cpu
