// Routing inside pools on a CPU, and its gradient: one token after the other, sixteen experts at a
// time.
//
// A range of tokens is one thread's work; what tokens share is a sum of integers, so results do not
// depend on how tokens are split over threads.
#include "groups_cpu.h"
#include "vectors.h"

namespace emo::cpu {
namespace {

// Which experts the tokens of a document may choose, and which carry weight; kept while the
// document stays the same.
struct Pool {
  Row allowed, inside;
  int64_t row = -2;

  EMO_INLINE explicit Pool(int num_experts) {
    for (int e = 0; e < num_blocks(num_experts) * kLanes; ++e)
      inside.i[e] = e < num_experts ? -1 : 0;
  }
  // Returns whether it is another one than before.
  EMO_INLINE bool set(const RoutingArgs& args, int64_t document) {
    const int64_t wanted = pool_row(args, document);
    if (wanted == row) return false;
    row = wanted;
    if (wanted < 0) {
      allowed = inside;
      return true;
    }
    const uint8_t* from = args.pool + wanted * args.num_experts;
    for (int e = 0; e < args.num_experts; ++e) allowed.i[e] = from[e] ? -1 : 0;
    for (int e = args.num_experts; e < num_blocks(args.num_experts) * kLanes; ++e) allowed.i[e] = 0;
    return true;
  }
  EMO_INLINE const Row& carrying(const RoutingArgs& args) const {
    return args.mask_logits ? allowed : inside;
  }
};

// Log-sum-exp over the experts that carry weight; `exps` receives e^(x - max), 0 for the others.
struct Softmax {
  float max, total, mean_shift;  // mean_shift: sum of e^s * s over total
  bool is_finite;  // no logit at all is NaN or +inf, and one that carries weight is above -inf
};
EMO_INLINE Softmax softmax(const Row& logits, const Row& carrying, int blocks, Row& exps) {
  Floats top = splat(-INFINITY);
  Ints is_bad = splat(0);
  for (int b = 0; b < blocks; ++b) {
    top = max(top, where(carrying.ints[b], logits.floats[b], splat(-INFINITY)));
    is_bad |= is_nan_or_inf(logits.floats[b]);
  }
  const float shift = largest(top);
  Floats total = splat(0.0f), weighted = splat(0.0f);
  for (int b = 0; b < blocks; ++b) {
    const Floats shifted = where(carrying.ints[b], logits.floats[b], splat(-INFINITY)) - shift;
    const Floats e = exp_nonpositive(shifted);
    exps.floats[b] = e;
    total += e;
    // 0 * -inf is not a number
    weighted += where(e > 0.0f, e * shifted, splat(0.0f));
  }
  const float sum_exps = sum(total);
  const bool is_finite = shift > -INFINITY && largest(-is_bad) == 0;
  return {shift, sum_exps, sum(weighted) / sum_exps, is_finite};
}

struct GateSums {
  float total, weighted_log;  // over the experts that carry weight: sum of g, sum of g * log g
};
EMO_INLINE GateSums sigmoid_gates(const Row& logits, const Row& carrying, int blocks, Row& gates) {
  Floats total = splat(0.0f), weighted = splat(0.0f);
  for (int b = 0; b < blocks; ++b) {
    const Floats x = logits.floats[b];
    const Floats g = sigmoid(x);
    gates.floats[b] = g;
    const Floats counted = where(carrying.ints[b], g, splat(0.0f));
    total += counted;
    const Floats log_g =
        where(x < 0.0f, x, splat(0.0f)) - log1p_unit(exp_nonpositive(where(x > 0.0f, -x, x)));
    weighted += where(counted > 0.0f, counted * log_g, splat(0.0f));
  }
  return {sum(total), sum(weighted)};
}
EMO_INLINE GateSums sqrt_softplus_gates(const Row& logits, const Row& carrying, int blocks,
                                        Row& gates) {
  Floats total = splat(0.0f), weighted = splat(0.0f);
  for (int b = 0; b < blocks; ++b) {
    const Floats g = sqrt_softplus(logits.floats[b]);
    gates.floats[b] = g;
    const Floats counted = where(carrying.ints[b], g, splat(0.0f));
    total += counted;
    weighted += where(counted > 0.0f, counted * log_positive(g), splat(0.0f));
  }
  return {sum(total), sum(weighted)};
}
EMO_INLINE GateSums gate_sums(Scoring scoring, const Row& logits, const Row& carrying, int blocks,
                              Row& gates) {
  return scoring == Scoring::kSigmoid ? sigmoid_gates(logits, carrying, blocks, gates)
                                      : sqrt_softplus_gates(logits, carrying, blocks, gates);
}
// d log g / dx: with g it gives the gradient of a gate, 0 where the gate is 0.
EMO_INLINE void log_slopes(Scoring scoring, const Row& logits, const Row& gates, int blocks,
                           Row& slopes) {
  if (scoring == Scoring::kSigmoid) {
    for (int b = 0; b < blocks; ++b) slopes.floats[b] = 1.0f - gates.floats[b];
    return;
  }
  for (int b = 0; b < blocks; ++b) {
    const Floats x = logits.floats[b], g = gates.floats[b];
    slopes.floats[b] = where(x < kFarBelow, splat(0.5f), sigmoid(x) / (2.0f * g * g));
  }
}

// Sums over a range of tokens: of all of them, or of the documents one after the other.
struct Sums {
  int64_t choices[kMaxExperts] = {}, scores[kMaxExperts] = {};
  int64_t row = 0;

  EMO_INLINE void set(const RoutingArgs& args, const RoutingOutputs& out, int64_t document) {
    if (!args.by_document || document == row) return;
    flush(args, out);
    row = document;
    std::memset(choices, 0, args.num_experts * sizeof(int64_t));
    std::memset(scores, 0, args.num_experts * sizeof(int64_t));
  }
  // Another thread may hold a part of this document too.
  EMO_INLINE void flush(const RoutingArgs& args, const RoutingOutputs& out) const {
    const int64_t start = row * args.num_experts;
    for (int e = 0; e < args.num_experts; ++e) {
      if (scores[e] != 0) add_shared(out.score_units + start + e, scores[e]);
      if (choices[e] == 0) continue;
      add_shared(out.counts + e, choices[e]);
      if (args.by_document) add_shared(out.document_choices + start + e, choices[e]);
    }
  }
};

EMO_INLINE int count_at_least(const Row& keys, int blocks, int32_t threshold) {
  Ints count = splat(0);
  for (int b = 0; b < blocks; ++b) count -= keys.ints[b] >= threshold;
  return sum(count);
}

EMO_INLINE int32_t largest_up_to(const Row& keys, int blocks, int32_t limit) {
  Ints best = splat(kBeyond);
  for (int b = 0; b < blocks; ++b)
    best = max(best, where(keys.ints[b] <= limit, keys.ints[b], splat(kBeyond)));
  return largest(best);
}

// The key that exactly K keys reach. Of equal keys at the boundary those with higher indices are
// struck out.
EMO_INLINE int32_t top_k_threshold(Row& keys, int blocks, int num_experts, int top_k) {
  int32_t threshold = largest_up_to(keys, blocks, INT_MAX);
  for (int k = 1; k < top_k; ++k) {
    const int32_t next = largest_up_to(keys, blocks, threshold - 1);
    if (next == kBeyond) break;
    threshold = next;
  }
  if (count_at_least(keys, blocks, threshold) == top_k) return threshold;
  // equal keys: walk down again, this time counting them
  threshold = largest_up_to(keys, blocks, INT_MAX);
  int above = 0, reached = count_at_least(keys, blocks, threshold);
  while (reached < top_k) {
    above = reached;
    threshold = largest_up_to(keys, blocks, threshold - 1);
    reached = count_at_least(keys, blocks, threshold);
  }
  int wanted = top_k - above;
  for (int e = 0; e < num_experts; ++e)
    if (keys.i[e] == threshold && --wanted < 0) keys.i[e] = kBeyond;
  return threshold;
}

// One of `values` at the chosen experts, times `factor`, 0 elsewhere.
EMO_INLINE void write_choice(const RoutingArgs& args, const RoutingOutputs& out, int64_t token,
                             const Row& values, float factor, const Row& chosen, Row& scratch) {
  const int blocks = num_blocks(args.num_experts);
  for (int b = 0; b < blocks; ++b)
    scratch.floats[b] = where(chosen.ints[b], values.floats[b] * factor, splat(0.0f));
  store_row(scratch, args.dtype, token, args.num_experts, out.probs);
  uint8_t* map = out.routing_map + token * args.num_experts;
  for (int e = 0; e < args.num_experts; ++e) map[e] = (uint8_t)(chosen.i[e] & 1);
}

EMO_INLINE float sum_chosen(const Row& values, const Row& chosen, int blocks) {
  Floats total = splat(0.0f);
  for (int b = 0; b < blocks; ++b) total += where(chosen.ints[b], values.floats[b], splat(0.0f));
  return sum(total);
}

// Softmax over the chosen alone: `exps` receives e^(x - max) there; returns their sum.
EMO_INLINE float softmax_chosen(const Row& logits, const Row& chosen, int blocks, Row& exps) {
  Floats top = splat(-INFINITY);
  for (int b = 0; b < blocks; ++b)
    top = max(top, where(chosen.ints[b], logits.floats[b], splat(-INFINITY)));
  const float shift = largest(top);
  for (int b = 0; b < blocks; ++b)
    exps.floats[b] =
        exp_nonpositive(where(chosen.ints[b], logits.floats[b] - shift, splat(-INFINITY)));
  return sum_chosen(exps, chosen, blocks);
}

}  // namespace

EMO_CLONES void pool_topk(const RoutingArgs& args, const RoutingOutputs& out, int64_t begin,
                          int64_t end) {
  const int num_experts = args.num_experts, blocks = num_blocks(num_experts);
  const bool is_gated = has_gates(args.scoring), is_limited = limits_groups(args);
  Pool pool(num_experts);
  Groups groups(args);
  Row logits, scores, gates, keys, chosen, scratch, bias;
  Sums run;
  int64_t facts[kNumFacts] = {};
  for (int e = 0; e < blocks * kLanes; ++e)
    bias.f[e] = args.expert_bias != nullptr && e < num_experts ? args.expert_bias[e] : 0.0f;

  for (int64_t t = begin; t < end; ++t) {
    const int64_t document = args.document_ids != nullptr ? args.document_ids[t] : 0;
    if (pool.set(args, document) && is_limited) set_pool(groups, pool.allowed);
    const Row& carrying = pool.carrying(args);
    load_row(args.logits, args.dtype, t, num_experts, -INFINITY, logits);

    const Softmax soft = softmax(logits, carrying, blocks, scores);
    float z = soft.max + log_of_sum(soft.total);
    float entropy = log_of_sum(soft.total) - soft.mean_shift, total = soft.total;
    if (is_gated) {
      const GateSums sums = gate_sums(args.scoring, logits, carrying, blocks, gates);
      total = sums.total + kTiny;
      entropy = log_of_sum(total) - sums.weighted_log / total;
      for (int b = 0; b < blocks; ++b)
        scores.floats[b] = where(carrying.ints[b], gates.floats[b], splat(0.0f));
    }

    for (int b = 0; b < blocks; ++b) {
      const Ints key = order_keys(is_gated ? gates.floats[b] + bias.floats[b] : logits.floats[b]);
      keys.ints[b] = where(pool.allowed.ints[b],
                           soft.is_finite ? max(key, splat(kExcluded + 1)) : splat(kExcluded + 1),
                           where(pool.inside.ints[b], splat(kExcluded), splat(kBeyond)));
    }
    int num_admitted = 0;
    if (is_limited && soft.is_finite)
      num_admitted = limit_to_groups(
          groups, keys, args.scoring == Scoring::kSoftmaxThenTopK ? &soft.max : nullptr);
    const int32_t threshold = top_k_threshold(keys, blocks, num_experts, args.top_k);
    for (int b = 0; b < blocks; ++b) chosen.ints[b] = keys.ints[b] >= threshold;

    const bool is_padding = document < 0, is_counted = !is_padding && soft.is_finite;
    out.z[t] = is_counted ? z : 0.0f;
    facts[0] += is_counted;
    facts[1] += !is_padding && !is_counted;
    if (!is_counted) {
      for (int b = 0; b < blocks; ++b) gates.floats[b] = splat(is_padding ? 0.0f : NAN);
      write_choice(args, out, t, gates, 1.0f, chosen, scratch);
      continue;
    }
    if (num_admitted > args.group_topk) facts[2] += groups_used(groups, chosen) > args.group_topk;
    // of one expert that has all the weight it may round to less than none
    facts[3] += entropy > 0.0f ? (int64_t)std::nearbyint(entropy * kOne) : 0;
    const float scaling = args.scaling;
    if (args.scoring == Scoring::kSoftmaxThenTopK) {
      write_choice(args, out, t, scores, scaling / total, chosen, scratch);
    } else if (args.scoring == Scoring::kTopKThenSoftmax) {
      const float sum_exps = softmax_chosen(logits, chosen, blocks, gates);
      write_choice(args, out, t, gates, scaling / sum_exps, chosen, scratch);
    } else {
      const float divisor = args.top_k > 1 ? sum_chosen(gates, chosen, blocks) + kTiny : 1.0f;
      write_choice(args, out, t, gates, scaling / divisor, chosen, scratch);
    }
    run.set(args, out, document);
    const float unit = kOne / total;
    for (int b = 0; b < blocks; ++b)
      scratch.ints[b] = __builtin_convertvector(scores.floats[b] * unit + 0.5f, Ints);
    for (int e = 0; e < num_experts; ++e) {
      run.scores[e] += scratch.i[e];
      run.choices[e] -= chosen.i[e];
    }
  }
  run.flush(args, out);
  for (int i = 0; i < kNumFacts; ++i) add_shared(out.counts + num_experts + i, facts[i]);
}

void pool_topk_finish(const RoutingArgs& args, const RoutingOutputs& out) {
  const int64_t size = num_sums(args) * args.num_experts;
  for (int64_t i = 0; i < size; ++i) out.score_sums[i] = (float)((double)out.score_units[i] / kOne);
}

// With s the scores, w the weights and upstream gradients dS (of the token's score sums), dW (of
// the weights), dz:
//   softmax:  dx = s (g - <s, g> + dz),  g = dS, plus dW at the chosen experts if the weights are
//   scores; weights over the chosen alone add w (dW - <w, dW>) there
//   gates:  dg = (dS - <s, dS>) / sum g, plus (dW - <w, dW>) / sum of chosen g there;
//   dx = dg g (d log g / dx) + dz softmax
EMO_CLONES void pool_topk_backward(const RoutingArgs& args, const RoutingGradients& grads,
                                   int64_t begin, int64_t end) {
  const int num_experts = args.num_experts, blocks = num_blocks(num_experts);
  Pool pool(num_experts);
  Row logits, soft, upstream, chosen, gates, weights, slopes, out, score_grads;
  const auto load_score_grads = [&](int64_t row) {
    for (int b = 0; b < blocks; ++b) score_grads.floats[b] = splat(0.0f);
    if (grads.grad_score_sums != nullptr)
      load_row(grads.grad_score_sums, DType::kFloat32, row, num_experts, 0.0f, score_grads);
  };
  int64_t score_row = args.by_document ? -1 : 0;
  if (!args.by_document) load_score_grads(0);

  for (int64_t t = begin; t < end; ++t) {
    const int64_t document = args.document_ids != nullptr ? args.document_ids[t] : 0;
    pool.set(args, document);
    const Row& carrying = pool.carrying(args);
    load_row(args.logits, args.dtype, t, num_experts, -INFINITY, logits);
    const Softmax whole = softmax(logits, carrying, blocks, soft);
    if (document < 0 || !whole.is_finite) {
      for (int b = 0; b < blocks; ++b) out.floats[b] = splat(0.0f);
      store_row(out, args.dtype, t, num_experts, grads.grad_logits);
      continue;
    }
    if (args.by_document && document != score_row) load_score_grads(score_row = document);
    const uint8_t* map = grads.routing_map + t * num_experts;
    for (int e = 0; e < num_experts; ++e) chosen.i[e] = map[e] ? -1 : 0;
    for (int e = num_experts; e < blocks * kLanes; ++e) chosen.i[e] = 0;
    if (grads.grad_probs != nullptr)
      load_row(grads.grad_probs, args.dtype, t, num_experts, 0.0f, upstream);
    // gradients at experts that were not chosen are of no weight, whatever they are
    for (int b = 0; b < blocks; ++b)
      upstream.floats[b] =
          grads.grad_probs == nullptr
              ? splat(0.0f)
              : where(chosen.ints[b], upstream.floats[b] * args.scaling, splat(0.0f));

    const float dz = grads.grad_z != nullptr ? grads.grad_z[t] : 0.0f;
    const float inverse = 1.0f / whole.total;
    for (int b = 0; b < blocks; ++b) soft.floats[b] *= inverse;
    if (has_gates(args.scoring)) {
      const float total = gate_sums(args.scoring, logits, carrying, blocks, gates).total + kTiny;
      log_slopes(args.scoring, logits, gates, blocks, slopes);
      const bool is_normalised = args.top_k > 1;
      const float chosen_total = is_normalised ? sum_chosen(gates, chosen, blocks) + kTiny : 1.0f;
      Floats score_dot = splat(0.0f), weight_dot = splat(0.0f);
      for (int b = 0; b < blocks; ++b) {
        score_dot += where(carrying.ints[b], gates.floats[b] * score_grads.floats[b], splat(0.0f));
        weight_dot += where(chosen.ints[b], gates.floats[b] * upstream.floats[b], splat(0.0f));
      }
      const float score_mean = sum(score_dot) / total;
      const float weight_mean = is_normalised ? sum(weight_dot) / chosen_total : 0.0f;
      for (int b = 0; b < blocks; ++b) {
        const Floats g = gates.floats[b];
        const Floats from_scores =
            where(carrying.ints[b], (score_grads.floats[b] - score_mean) / total, splat(0.0f));
        const Floats from_weights =
            where(chosen.ints[b], (upstream.floats[b] - weight_mean) / chosen_total, splat(0.0f));
        out.floats[b] = (from_scores + from_weights) * g * slopes.floats[b] + dz * soft.floats[b];
      }
    } else {
      const bool is_after = args.scoring == Scoring::kTopKThenSoftmax;
      Floats dot = splat(0.0f);
      for (int b = 0; b < blocks; ++b) {
        const Floats g =
            is_after ? score_grads.floats[b] : score_grads.floats[b] + upstream.floats[b];
        out.floats[b] = g;
        dot += soft.floats[b] * g;
      }
      const float centre = dz - sum(dot);
      for (int b = 0; b < blocks; ++b) out.floats[b] = soft.floats[b] * (out.floats[b] + centre);
      if (is_after) {
        const float sum_exps = softmax_chosen(logits, chosen, blocks, weights);
        Floats weight_dot = splat(0.0f);
        for (int b = 0; b < blocks; ++b) weight_dot += weights.floats[b] * upstream.floats[b];
        const float mean = sum(weight_dot) / sum_exps;
        for (int b = 0; b < blocks; ++b)
          out.floats[b] += weights.floats[b] / sum_exps * (upstream.floats[b] - mean);
      }
    }
    store_row(out, args.dtype, t, num_experts, grads.grad_logits);
  }
}

}  // namespace emo::cpu
