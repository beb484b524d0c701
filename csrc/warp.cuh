// What the kernels share. Routing: a warp holds one row of experts, lane l the experts l, l + 32, l
// + 64, ...
//
// A row is kChunks registers a lane; expert chunk * 32 + lane. Loads and stores of a chunk are 32
// neighbouring experts, and chunk-major order is the order of the experts, so ties to the lower
// index fall out of ballots.
#pragma once
#ifdef EMO_EMULATE
#include "cuda_emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define EMO_LAUNCH(kernel, blocks, threads, stream, ...) \
  kernel<<<blocks, threads, 0, stream>>>(__VA_ARGS__)
#define EMO_CHECK_ALIGNED(pointer, type)  // the emulator looks, a GPU traps
#endif

#include <type_traits>

#include "pool_ops.h"

namespace emo::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarps = 8;  // in a block
constexpr int kThreads = kWarps * 32;
constexpr int kMaxTokensPerWarp = 16;  // so many scores of at most 2^27 add up within 32 bits
constexpr int kMaxTokensOfGates = 4;   // and so many gates of at most 2^30

// Keys order experts as their scores do. Keys of experts that may be chosen lie above both.
constexpr unsigned kBeyond = 0;    // past the last expert: never chosen
constexpr unsigned kExcluded = 1;  // not to be chosen: only if there are fewer than K that may be

__device__ __forceinline__ int lane_id() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp_id() { return threadIdx.x / 32; }
__device__ __forceinline__ long long global_warp() {
  return (long long)blockIdx.x * kWarps + warp_id();
}
__device__ __forceinline__ unsigned lanes_below() { return (1u << lane_id()) - 1u; }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ double to_float(double x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ void from_float(float x, float* to) { *to = x; }
__device__ __forceinline__ void from_float(double x, double* to) { *to = x; }
__device__ __forceinline__ void from_float(float x, __nv_bfloat16* to) {
  *to = __float2bfloat16(x);
}
__device__ __forceinline__ void from_float(float x, __half* to) { *to = __float2half(x); }

// A butterfly: one order of the additions, the same result in every lane.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// Unsigned integers in the order of the floats: ties compare exactly, -0 equals 0, a positive NaN
// is the largest.
__device__ __forceinline__ unsigned order_key(float x) {
  const unsigned u = __float_as_uint(x + 0.0f);
  return u ^ ((u & 0x80000000u) ? 0xffffffffu : 0x80000000u);
}
__device__ __forceinline__ float key_to_float(unsigned key) {
  return __uint_as_float(key ^ ((key & 0x80000000u) ? 0x80000000u : 0xffffffffu));
}
__device__ __forceinline__ float warp_max(float x) {
  return key_to_float(__reduce_max_sync(kAllLanes, order_key(x)));
}

template <int kChunks>
__device__ __forceinline__ unsigned lanes_inside(int num_experts) {
  unsigned inside = 0;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) inside |= (unsigned)(c * 32 + lane_id() < num_experts) << c;
  return inside;
}

__device__ __forceinline__ bool has(unsigned set, int chunk) { return (set >> chunk) & 1u; }

template <class T, int kChunks>
__device__ __forceinline__ void load_row(const T* row, unsigned inside, float (&x)[kChunks]) {
#pragma unroll
  for (int c = 0; c < kChunks; ++c)
    x[c] = has(inside, c) ? to_float(row[c * 32 + lane_id()]) : -INFINITY;
}

// The experts a token may choose, bit c for expert c * 32 + lane; kept while the document stays the
// same.
template <int kChunks>
struct Pool {
  unsigned inside, allowed;
  long long row = -2;

  __device__ __forceinline__ explicit Pool(int num_experts)
      : inside(lanes_inside<kChunks>(num_experts)) {}

  // Returns whether it is another one than before.
  __device__ __forceinline__ bool set(const RoutingArgs& args, long long document) {
    const long long wanted = pool_row(args, document);
    if (wanted == row) return false;
    row = wanted;
    allowed = inside;
    if (wanted < 0) return true;
    const uint8_t* from = args.pool + wanted * args.num_experts;
    allowed = 0;
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
      if (has(inside, c) && from[c * 32 + lane_id()]) allowed |= 1u << c;
    return true;
  }
  __device__ __forceinline__ unsigned carrying(const RoutingArgs& args) const {
    return args.mask_logits ? allowed : inside;
  }
};

// The run of tokens of this warp, and the document of each: lane i holds that of the i-th. Ids past
// the last document would reach beyond the tensors; the host cannot look at them without waiting,
// so they count as padding.
struct Tokens {
  long long begin;
  int count;
  long long my_document;

  __device__ __forceinline__ Tokens(const int64_t* document_ids, int64_t num_tokens,
                                    int64_t num_documents, int per_warp) {
    begin = ((long long)blockIdx.x * kWarps + warp_id()) * per_warp;
    const long long left = num_tokens - begin;
    count = left < 0 ? 0 : (left < per_warp ? (int)left : per_warp);
    my_document = -1;
    if (lane_id() < count)
      my_document = document_ids == nullptr ? 0 : document_ids[begin + lane_id()];
    if (my_document >= num_documents) my_document = -1;
  }
  // for every lane to call together
  __device__ __forceinline__ long long document(int i) const {
    return __shfl_sync(kAllLanes, my_document, i);
  }
};

// Few tokens are spread over more warps: a launch has about this many before a warp takes more than
// one token.
#ifndef EMO_WARPS_WANTED
#define EMO_WARPS_WANTED 2048
#endif
constexpr int64_t kWarpsWanted = EMO_WARPS_WANTED;
inline int tokens_per_warp(int64_t num_tokens, int most = kMaxTokensPerWarp) {
  const int64_t wanted = (num_tokens + kWarpsWanted - 1) / kWarpsWanted;
  return (int)(wanted < 1 ? 1 : wanted > most ? most : wanted);
}
// Documents that ids may name: with one pool or none, any, unless each has sums of its own.
__device__ __forceinline__ int64_t num_documents(const RoutingArgs& args) {
  const int64_t of_pools = args.num_pools > 1 ? args.num_pools : INT64_MAX;
  const bool is_fewer = args.by_document && args.num_documents < of_pools;
  return is_fewer ? args.num_documents : of_pools;
}
inline unsigned blocks_for(int64_t num_tokens, int per_warp) {
  const int64_t per_block = (int64_t)per_warp * kWarps;
  return (unsigned)((num_tokens + per_block - 1) / per_block);
}

// e^(x - max) over a set of experts, 0 elsewhere, and what belongs to it. A row that holds NaN or
// +inf, in the set or not, has the maximum +inf; one without a number above -inf in the set has
// -inf.
struct Softmax {
  float max, total;

  __device__ __forceinline__ bool is_finite() const { return fabsf(max) < INFINITY; }
};
template <int kChunks>
__device__ __forceinline__ float row_max(const float (&x)[kChunks], unsigned set) {
  float top = -INFINITY;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    if (has(set, c)) top = fmaxf(top, x[c]);
    if (!(x[c] < INFINITY)) top = INFINITY;
  }
  return warp_max(top);
}
template <int kChunks>
__device__ __forceinline__ Softmax softmax(const float (&x)[kChunks], unsigned set,
                                           float (&exps)[kChunks]) {
  const float top = row_max(x, set);
  float total = 0.0f;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    exps[c] = has(set, c) ? expf(x[c] - top) : 0.0f;
    total += exps[c];
  }
  return {top, warp_sum(total)};
}

__device__ __forceinline__ float sigmoid(float x) {
  const float t = expf(-fabsf(x));
  return (x >= 0.0f ? 1.0f : t) / (1.0f + t);
}
// Far below zero softplus is e^x, whose root is taken in the exponent: it is 0 later by half.
constexpr float kFarBelow = -20.0f;
__device__ __forceinline__ float sqrt_softplus(float x) {
  const float root = expf(-0.5f * fabsf(x));  // of e^-|x|
  return x < kFarBelow ? root : sqrtf(fmaxf(x, 0.0f) + log1pf(root * root));
}
template <int kChunks>
__device__ __forceinline__ void gates_of(Scoring scoring, const float (&x)[kChunks],
                                         float (&gates)[kChunks]) {
  if (scoring == Scoring::kSigmoid) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) gates[c] = sigmoid(x[c]);
  } else {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) gates[c] = sqrt_softplus(x[c]);
  }
}

// Largest key that does not exceed `limit`, over the warp.
template <int kChunks>
__device__ __forceinline__ unsigned largest_up_to(const unsigned (&keys)[kChunks], unsigned limit) {
  unsigned best = kBeyond;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) best = keys[c] <= limit && keys[c] > best ? keys[c] : best;
  return __reduce_max_sync(kAllLanes, best);
}

template <int kChunks>
__device__ __forceinline__ int count_at_least(const unsigned (&keys)[kChunks], unsigned threshold) {
  int count = 0;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) count += __popc(__ballot_sync(kAllLanes, keys[c] >= threshold));
  return count;
}

// The K largest keys as a set; of equal keys at the boundary the lower experts.
template <int kChunks>
__device__ __forceinline__ unsigned top_k(const unsigned (&keys)[kChunks], int k) {
  unsigned threshold = largest_up_to(keys, kAllLanes);
#pragma unroll 1
  for (int i = 1; i < k; ++i) {
    const unsigned next = largest_up_to(keys, threshold - 1);
    if (next == kBeyond) break;
    threshold = next;
  }
  int surplus_rank = 32 * kChunks;  // equal keys from this rank on are not taken
  if (count_at_least(keys, threshold) != k) {
    // equal keys: walk down again, this time counting them; the same branch in every lane
    threshold = largest_up_to(keys, kAllLanes);
    int above = 0, reached = count_at_least(keys, threshold);
#pragma unroll 1
    while (reached < k) {
      above = reached;
      threshold = largest_up_to(keys, threshold - 1);
      reached = count_at_least(keys, threshold);
    }
    surplus_rank = k - above;
  }
  unsigned chosen = 0;
  int rank = 0;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const unsigned equal = __ballot_sync(kAllLanes, keys[c] == threshold);
    const bool is_taken =
        keys[c] == threshold && rank + __popc(equal & lanes_below()) < surplus_rank;
    if (keys[c] > threshold || is_taken) chosen |= 1u << c;
    rank += __popc(equal);
  }
  return chosen;
}

// Add up what the warps of a block counted and add it to `to`: one atomic an expert and block.
template <class Count, int kExperts>
__device__ __forceinline__ void add_over_warps(const Count (&of_warp)[kWarps][kExperts],
                                               int num_experts, int64_t* to) {
  for (int e = threadIdx.x; e < num_experts; e += kThreads) {
    unsigned long long total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += of_warp[w][e];
    if (total != 0) atomicAdd(reinterpret_cast<unsigned long long*>(to) + e, total);
  }
}

// Calls `launch` with the type of the logits and the number of chunks that hold a row.
template <class T, class Launch>
int with_chunks(int num_experts, Launch launch) {
  if (num_experts <= 32)
    launch(T{}, std::integral_constant<int, 1>{});
  else if (num_experts <= 64)
    launch(T{}, std::integral_constant<int, 2>{});
  else if (num_experts <= 128)
    launch(T{}, std::integral_constant<int, 4>{});
  else if (num_experts <= 256)
    launch(T{}, std::integral_constant<int, 8>{});
  else if (num_experts <= 512)
    launch(T{}, std::integral_constant<int, 16>{});
  else
    launch(T{}, std::integral_constant<int, 32>{});
  return (int)cudaGetLastError();
}
template <class Launch>
int with_types(DType dtype, int num_experts, Launch launch) {
  if (dtype == DType::kFloat32) return with_chunks<float>(num_experts, launch);
  if (dtype == DType::kBFloat16) return with_chunks<__nv_bfloat16>(num_experts, launch);
  return with_chunks<__half>(num_experts, launch);
}

}  // namespace emo::cuda
