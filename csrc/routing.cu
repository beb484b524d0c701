// Routing inside pools on a GPU, and its gradient. A warp routes one token after the other of a
// short run; a block is eight warps.
//
// Rows are read with 32 lanes on 32 neighbouring experts. What tokens share is a sum of integers,
// added with integer atomics: the same bits whatever the order. Nothing waits for the host and
// nothing is allocated here.
#include "groups.cuh"
#include "warp.cuh"

namespace emo::cuda {
namespace {

template <int kChunks>
__device__ __forceinline__ float sum_of(const float (&x)[kChunks], unsigned set) {
  float total = 0.0f;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) total += has(set, c) ? x[c] : 0.0f;
  return warp_sum(total);
}

// sum of score * log(score), for softmax of those over their maximum: the part of the entropy that
// is no logarithm of the sum
template <int kChunks>
__device__ __forceinline__ float weighted_log(const float (&x)[kChunks],
                                              const float (&scores)[kChunks], unsigned set,
                                              Scoring scoring, float shift) {
  float total = 0.0f;
  // one branch a token, not one an expert
  const auto add = [&](auto log_of) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
      // 0 * -inf is not a number
      if (has(set, c) && scores[c] > 0.0f) total += scores[c] * log_of(c);
  };
  if (scoring == Scoring::kSigmoid)
    add([&](int c) { return fminf(x[c], 0.0f) - log1pf(expf(-fabsf(x[c]))); });
  else if (scoring == Scoring::kSqrtSoftplus)
    add([&](int c) { return logf(scores[c]); });
  else
    add([&](int c) { return x[c] - shift; });
  return warp_sum(total);
}

// Blocks that shall fit on a multiprocessor: as many as leave enough registers on every GPU.
constexpr int blocks_of(int chunks, int most_chunks_of_two) {
  return chunks <= 4 ? 4 : chunks <= most_chunks_of_two ? 2 : 1;
}

__device__ __forceinline__ void add_count(int64_t* to, unsigned count) {
  atomicAdd(reinterpret_cast<unsigned long long*>(to), (unsigned long long)count);
}

// What a kernel has that knows neither groups nor sums by document: a block holds one row of sums,
// the first.
struct NoGroups {
  __device__ __forceinline__ explicit NoGroups(const RoutingArgs&) {}
};
template <int kChunks, bool kIsGeneral>
struct DocumentSums {
  static constexpr bool is_joined = true;

  __device__ __forceinline__ DocumentSums(const RoutingArgs&, const Tokens&, int) {}
  __device__ __forceinline__ static long long first(const RoutingArgs&, int) { return 0; }
  template <class... Any>
  __device__ __forceinline__ void set(const Any&...) {}
  template <class... Any>
  __device__ __forceinline__ void count(const Any&...) {}
  template <class... Any>
  __device__ __forceinline__ void finish(const Any&...) {}
};
// A lane's sums leave when its warp comes to another document; if the block holds a single
// document, whatever the order, they are joined before they leave, as they are where none are asked
// for.
template <int kChunks>
struct DocumentSums<kChunks, true> {
  int document = -1;
  bool is_joined;

  __device__ __forceinline__ DocumentSums(const RoutingArgs& args, const Tokens& tokens,
                                          int per_warp) {
    is_joined = true;
    if (!args.by_document) return;
    const long long wanted = first(args, per_warp);
    const bool is_mine = lane_id() >= tokens.count || tokens.my_document == wanted;
    is_joined = __syncthreads_and(is_mine) && wanted >= 0;
  }
  // The document of the block's first token; read again, for want of registers.
  __device__ __forceinline__ static long long first(const RoutingArgs& args, int per_warp) {
    return args.by_document ? args.document_ids[(long long)blockIdx.x * kWarps * per_warp] : 0;
  }
  __device__ __forceinline__ void set(const RoutingArgs& args, const RoutingOutputs& out,
                                      long long next, unsigned* scores) {
    if (next == document || is_joined) return;
    flush(args, out, scores);
    document = (int)next;
  }
  // Choices leave one by one: there is no room for those of a warp beside its scores and groups.
  __device__ __forceinline__ void count(const RoutingArgs& args, const RoutingOutputs& out,
                                        int expert) {
    if (is_joined) return;
    add_count(out.document_choices + (long long)document * args.num_experts + expert, 1);
  }
  __device__ __forceinline__ void finish(const RoutingArgs& args, const RoutingOutputs& out,
                                         unsigned* scores) {
    flush(args, out, scores);
  }

 private:
  __device__ __forceinline__ void flush(const RoutingArgs& args, const RoutingOutputs& out,
                                        unsigned* scores) {
    if (document < 0) return;  // so it stays in a joined block
#pragma unroll 1
    for (int e = lane_id(); e < args.num_experts; e += 32) {
      const long long at = (long long)document * args.num_experts + e;
      if (scores[e] != 0) add_count(out.score_units + at, scores[e]);
      scores[e] = 0;
    }
  }
};

// d log g / dx of a root g of softplus, which tells its x without a register for it: sigmoid(x) is
// 1 - e^-softplus(x).
__device__ __forceinline__ float log_slope(float g) {
  const float softplus = g * g;
  return softplus < 1e-7f ? 0.5f : -expm1f(-softplus) / (2.0f * softplus);
}

constexpr int forward_blocks_of(int chunks, bool is_general) {
  return is_general && chunks == 4 ? 3 : blocks_of(chunks, is_general ? 8 : 16);
}

// The general kernel limits groups and sums by document, where it is asked to; the other has the
// registers for itself.
template <class T, int kChunks, bool kIsGeneral>
__global__ void __launch_bounds__(kThreads, forward_blocks_of(kChunks, kIsGeneral))
    pool_topk_kernel(RoutingArgs args, RoutingOutputs out, int per_warp) {
  Pool<kChunks> pool(args.num_experts);
  std::conditional_t<kIsGeneral, Groups<kChunks>, NoGroups> groups(args);
  const Tokens tokens(args.document_ids, args.num_tokens, num_documents(args), per_warp);
  const bool is_gated = has_gates(args.scoring);
  __shared__ unsigned choices[kChunks * 32];
  for (int e = threadIdx.x; e < kChunks * 32; e += kThreads) choices[e] = 0;
  // of each warp its own; of the score sums each lane its own: registers are scarcer
  __shared__ unsigned long long facts[kWarps][kNumFacts];
  if (threadIdx.x < kWarps * kNumFacts) facts[threadIdx.x / kNumFacts][threadIdx.x % kNumFacts] = 0;
  __syncthreads();
  __shared__ unsigned score_sums[kWarps][kChunks * 32];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) score_sums[warp_id()][c * 32 + lane_id()] = 0;
  DocumentSums<kChunks, kIsGeneral> of_documents(args, tokens, per_warp);

#pragma unroll 1
  for (int i = 0; i < tokens.count; ++i) {
    const long long document = tokens.document(i);
    const long long row = (tokens.begin + i) * args.num_experts;
    const bool is_other_pool = pool.set(args, document);
    if constexpr (kIsGeneral)
      if (is_other_pool) groups.set(pool.allowed);
    const unsigned carrying = pool.carrying(args);
    float x[kChunks], scores[kChunks];
    load_row(static_cast<const T*>(args.logits) + row, pool.inside, x);

    const Softmax soft = softmax(x, carrying, scores);
    const bool is_padding = document < 0, is_counted = !is_padding && soft.is_finite();
    float total = soft.total;
    const float z = soft.max + logf(soft.total);
    if (is_gated) {
      gates_of(args.scoring, x, scores);
      total = sum_of(scores, carrying) + kTiny;
    }
    const float entropy =
        logf(total) - weighted_log(x, scores, carrying, args.scoring, soft.max) / total;

    unsigned keys[kChunks];
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      float score = is_gated ? scores[c] : x[c];
      if (args.expert_bias != nullptr && has(pool.inside, c))
        score += args.expert_bias[c * 32 + lane_id()];
      const unsigned key = soft.is_finite() ? order_key(score) : kExcluded;
      keys[c] = has(pool.allowed, c) ? (key > kExcluded ? key : kExcluded + 1)
                                     : (has(pool.inside, c) ? kExcluded : kBeyond);
    }
    int num_admitted = 0;
    if constexpr (kIsGeneral)
      if (limits_groups(args) && soft.is_finite())
        num_admitted = groups.limit(args, soft.max, keys);
    const unsigned chosen = top_k(keys, args.top_k);
    bool is_over = false;
    if constexpr (kIsGeneral)
      if (num_admitted > args.group_topk) is_over = groups.used(chosen) > args.group_topk;

    if (is_counted) {
      of_documents.set(args, out, document, score_sums[warp_id()]);
      const float unit = kOne / total;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        if (has(carrying, c))
          score_sums[warp_id()][c * 32 + lane_id()] += __float2uint_rn(scores[c] * unit);
        if (has(chosen, c)) {
          atomicAdd(choices + c * 32 + lane_id(), 1u);
          of_documents.count(args, out, c * 32 + lane_id());
        }
      }
    }
    float divisor = total;
    if (args.scoring == Scoring::kTopKThenSoftmax) {
      divisor = softmax(x, chosen, scores).total;
    } else if (is_gated) {
      divisor = args.top_k > 1 ? sum_of(scores, chosen) + kTiny : 1.0f;
    }
    const float factor = args.scaling / divisor, uncounted = is_padding ? 0.0f : NAN;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (!has(pool.inside, c)) continue;
      const long long at = row + c * 32 + lane_id();
      const float weight = is_counted ? scores[c] * factor : uncounted;
      from_float(has(chosen, c) ? weight : 0.0f, static_cast<T*>(out.probs) + at);
      out.routing_map[at] = has(chosen, c);
    }
    if (lane_id() == 0) {
      out.z[tokens.begin + i] = is_counted ? z : 0.0f;
      facts[warp_id()][0] += is_counted;
      facts[warp_id()][1] += !is_padding && !is_counted;
      if constexpr (kIsGeneral) facts[warp_id()][2] += is_counted && is_over;
      // of one expert that has all the weight it may round to less than none
      facts[warp_id()][3] += is_counted ? __float2uint_rn(fmaxf(entropy, 0.0f) * kOne) : 0u;
    }
  }
  of_documents.finish(args, out, score_sums[warp_id()]);
  __syncthreads();
  if (of_documents.is_joined)
    add_over_warps(score_sums, args.num_experts,
                   out.score_units + of_documents.first(args, per_warp) * args.num_experts);
  if (threadIdx.x < kNumFacts) {
    unsigned long long total = 0;
#pragma unroll 1  // eight sums of 64 bits at once would take registers from everything above
    for (int w = 0; w < kWarps; ++w) total += facts[w][threadIdx.x];
    if (total != 0)
      atomicAdd(reinterpret_cast<unsigned long long*>(out.counts) + args.num_experts + threadIdx.x,
                total);
  }
  for (int e = threadIdx.x; e < args.num_experts; e += kThreads) {
    if (choices[e] == 0) continue;
    add_count(out.counts + e, choices[e]);
    if (kIsGeneral && args.by_document && of_documents.is_joined)
      add_count(out.document_choices + of_documents.first(args, per_warp) * args.num_experts + e,
                choices[e]);
  }
}

__global__ void __launch_bounds__(kThreads) finish_kernel(RoutingOutputs out, long long num_sums) {
  const long long i = (long long)blockIdx.x * kThreads + threadIdx.x;
  if (i >= num_sums) return;
  out.score_sums[i] = (float)((double)out.score_units[i] / kOne);
}

// The formulas are at emo::cpu::pool_topk_backward.
template <class T, int kChunks>
__global__ void __launch_bounds__(kThreads, blocks_of(kChunks, 8))
    pool_topk_backward_kernel(RoutingArgs args, RoutingGradients grads, int per_warp) {
  Pool<kChunks> pool(args.num_experts);
  const Tokens tokens(args.document_ids, args.num_tokens, num_documents(args), per_warp);
  float score_grads[kChunks];
  int score_row = -1;
  const auto load_score_grads = [&](int row) {
    if (row == score_row) return;
    score_row = row;
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
      score_grads[c] =
          grads.grad_score_sums != nullptr && has(pool.inside, c)
              ? grads.grad_score_sums[(long long)row * args.num_experts + c * 32 + lane_id()]
              : 0.0f;
  };

#pragma unroll 1
  for (int i = 0; i < tokens.count; ++i) {
    const long long document = tokens.document(i);
    const long long row = (tokens.begin + i) * args.num_experts;
    float dx[kChunks] = {};
    bool is_counted = document >= 0;
    if (is_counted) {
      pool.set(args, document);
      load_score_grads(args.by_document ? (int)document : 0);
      const unsigned carrying = pool.carrying(args);
      float x[kChunks], soft[kChunks], weight_grads[kChunks];
      load_row(static_cast<const T*>(args.logits) + row, pool.inside, x);
      unsigned chosen = 0;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const long long at = row + c * 32 + lane_id();
        const bool is_chosen = has(pool.inside, c) && grads.routing_map[at];
        chosen |= (unsigned)is_chosen << c;
        weight_grads[c] = is_chosen && grads.grad_probs != nullptr
                              ? to_float(static_cast<const T*>(grads.grad_probs)[at]) * args.scaling
                              : 0.0f;
      }
      const float dz = grads.grad_z != nullptr ? grads.grad_z[tokens.begin + i] : 0.0f;
      const Softmax whole = softmax(x, carrying, soft);
      is_counted = whole.is_finite();
      const float inverse = 1.0f / whole.total;
      if (has_gates(args.scoring)) {
        float gates[kChunks];
        gates_of(args.scoring, x, gates);
        const float total = sum_of(gates, carrying) + kTiny;
        const float chosen_total = args.top_k > 1 ? sum_of(gates, chosen) + kTiny : 1.0f;
        float score_dot = 0.0f, weight_dot = 0.0f;
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          score_dot += has(carrying, c) ? gates[c] * score_grads[c] : 0.0f;
          weight_dot += gates[c] * weight_grads[c];
        }
        const float score_mean = warp_sum(score_dot) / total;
        const float weight_mean = args.top_k > 1 ? warp_sum(weight_dot) / chosen_total : 0.0f;
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          const float from_scores = has(carrying, c) ? (score_grads[c] - score_mean) / total : 0.0f;
          const float from_weights =
              has(chosen, c) ? (weight_grads[c] - weight_mean) / chosen_total : 0.0f;
          dx[c] = (from_scores + from_weights) * gates[c];
        }
        if (args.scoring == Scoring::kSigmoid) {
#pragma unroll
          for (int c = 0; c < kChunks; ++c)
            dx[c] = dx[c] * (1.0f - gates[c]) + dz * soft[c] * inverse;
        } else {
#pragma unroll
          for (int c = 0; c < kChunks; ++c)
            dx[c] = dx[c] * log_slope(gates[c]) + dz * soft[c] * inverse;
        }
      } else {
        const bool is_after = args.scoring == Scoring::kTopKThenSoftmax;
        float dot = 0.0f;
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          soft[c] *= inverse;
          dx[c] = is_after ? score_grads[c] : score_grads[c] + weight_grads[c];
          dot += soft[c] * dx[c];
        }
        const float centre = dz - warp_sum(dot);
#pragma unroll
        for (int c = 0; c < kChunks; ++c) dx[c] = soft[c] * (dx[c] + centre);
        if (is_after) {
          float weights[kChunks];
          const float sum_exps = softmax(x, chosen, weights).total;
          float weight_dot = 0.0f;
#pragma unroll
          for (int c = 0; c < kChunks; ++c) weight_dot += weights[c] * weight_grads[c];
          const float mean = warp_sum(weight_dot) / sum_exps;
#pragma unroll
          for (int c = 0; c < kChunks; ++c)
            dx[c] += weights[c] / sum_exps * (weight_grads[c] - mean);
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
      if (has(pool.inside, c))
        from_float(is_counted ? dx[c] : 0.0f,
                   static_cast<T*>(grads.grad_logits) + row + c * 32 + lane_id());
  }
}

}  // namespace

int pool_topk(const RoutingArgs& args, const RoutingOutputs& out, void* stream) {
  const int per_warp = tokens_per_warp(args.num_tokens);
  const auto launch = [&](auto is_general) {
    return with_types(args.dtype, args.num_experts, [&](auto type, auto chunks) {
      EMO_LAUNCH(
          (pool_topk_kernel<decltype(type), decltype(chunks)::value, decltype(is_general)::value>),
          blocks_for(args.num_tokens, per_warp), kThreads, static_cast<cudaStream_t>(stream), args,
          out, per_warp);
    });
  };
  int status = 0;
  if (args.num_tokens > 0)
    status = limits_groups(args) || args.by_document ? launch(std::true_type{})
                                                     : launch(std::false_type{});
  if (status != 0) return status;
  const int64_t size = num_sums(args) * args.num_experts;
  if (size == 0) return status;
  EMO_LAUNCH(finish_kernel, (unsigned)((size + kThreads - 1) / kThreads), kThreads,
             static_cast<cudaStream_t>(stream), out, (long long)size);
  return (int)cudaGetLastError();
}

int pool_topk_backward(const RoutingArgs& args, const RoutingGradients& grads, void* stream) {
  if (args.num_tokens == 0) return 0;
  const int per_warp = tokens_per_warp(args.num_tokens);
  return with_types(args.dtype, args.num_experts, [&](auto type, auto chunks) {
    EMO_LAUNCH((pool_topk_backward_kernel<decltype(type), decltype(chunks)::value>),
               blocks_for(args.num_tokens, per_warp), kThreads, static_cast<cudaStream_t>(stream),
               args, grads, per_warp);
  });
}

}  // namespace emo::cuda
