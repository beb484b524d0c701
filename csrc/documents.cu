// What documents drew and used, on a GPU. For the experts used a warp takes one token after the
// other of a short run; for the statistics a warp takes a document; a draw is a thread's.
//
// What warps share is joined with integer atomics: the same bits whatever the order.
#include "document_ops.h"
#include "warp.cuh"

namespace emo::cuda {
namespace {

template <int kChunks>
__global__ void __launch_bounds__(kThreads) experts_used_kernel(UsedArgs args, int per_warp) {
  const unsigned inside = lanes_inside<kChunks>(args.num_experts);
  const Tokens tokens(args.document_ids, args.num_tokens, args.num_documents, per_warp);
  const int words = (args.num_experts + 31) / 32;
  unsigned used = 0;  // bit c for expert c * 32 + lane
  long long document = tokens.document(0);

  // bit `lane` of word c is expert c * 32 + lane; lane c keeps it
  const auto flush = [&] {
    unsigned word = 0;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const unsigned of_chunk = __ballot_sync(kAllLanes, has(used, c));
      if (lane_id() == c) word = of_chunk;
    }
    if (document >= 0 && word != 0)
      atomicOr(reinterpret_cast<unsigned*>(args.used) + document * words + lane_id(), word);
    used = 0;
  };
#pragma unroll 1
  for (int i = 0; i < tokens.count; ++i) {
    const long long next = tokens.document(i);
    if (next != document) {
      flush();
      document = next;
    }
    const uint8_t* flags = args.routing_map + (tokens.begin + i) * args.num_experts;
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
      if (has(inside, c)) used |= (unsigned)flags[c * 32 + lane_id()] << c;
  }
  flush();
}

template <class T>
__device__ __forceinline__ T sum_over_lanes(T x) {
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

__global__ void __launch_bounds__(kThreads) document_statistics_kernel(StatisticsArgs args) {
  __shared__ unsigned long long of_warp[kWarps][kNumStatistics];
  if (lane_id() < kNumStatistics) of_warp[warp_id()][lane_id()] = 0;
  __syncwarp();
  const long long document = global_warp();
  if (document < args.num_documents) {
    const int64_t* scores = args.scores + document * args.num_experts;
    long long total = 0;
    int pool_size = 0, num_used = 0;
    for (int e = lane_id(); e < args.num_experts; e += 32) {
      if (args.scores != nullptr) total += scores[e];
      if (args.pool != nullptr) pool_size += args.pool[document * args.num_experts + e];
    }
    total = sum_over_lanes(total);
    double entropy = 0.0;
    if (total > 0) {
      const double inverse = 1.0 / (double)total;
      for (int e = lane_id(); e < args.num_experts; e += 32) {
        const float share = (float)((double)scores[e] * inverse);
        if (share > 0.0f) entropy -= (double)(share * logf(share));
      }
    }
    entropy = sum_over_lanes(entropy);
    pool_size = sum_over_lanes(pool_size);
    for (int w = lane_id(); args.used != nullptr && w < args.num_words; w += 32)
      num_used += __popc((unsigned)args.used[document * args.num_words + w]);
    num_used = sum_over_lanes(num_used);
    if (lane_id() == 0) {
      unsigned long long* mine = of_warp[warp_id()];
      mine[0] = total > 0;
      mine[1] = total > 0 ? pool_size : 0;
      mine[2] = entropy > 0.0 ? (unsigned long long)__double2ll_rn(entropy * kOne) : 0;
      mine[3] = num_used > 0;
      mine[4] = num_used;
    }
  }
  __syncthreads();
  add_over_warps(of_warp, kNumStatistics, args.sums);
}

__global__ void __launch_bounds__(kThreads) draw_bits_kernel(DrawArgs args) {
  const long long i = (long long)blockIdx.x * kThreads + threadIdx.x;
  if (i < args.num_layers * args.num_documents) args.bits[i] = bits_of(args, i);
}

}  // namespace

int experts_used(const UsedArgs& args, void* stream) {
  if (args.num_tokens == 0) return 0;
  const int per_warp = tokens_per_warp(args.num_tokens);
  return with_chunks<float>(args.num_experts, [&](auto, auto chunks) {
    EMO_LAUNCH((experts_used_kernel<decltype(chunks)::value>),
               blocks_for(args.num_tokens, per_warp), kThreads, static_cast<cudaStream_t>(stream),
               args, per_warp);
  });
}

int document_statistics(const StatisticsArgs& args, void* stream) {
  if (args.num_documents == 0) return 0;
  EMO_LAUNCH(document_statistics_kernel, blocks_for(args.num_documents, 1), kThreads,
             static_cast<cudaStream_t>(stream), args);
  return (int)cudaGetLastError();
}

int draw_bits(const DrawArgs& args, void* stream) {
  const int64_t count = args.num_layers * args.num_documents;
  if (count == 0) return 0;
  EMO_LAUNCH(draw_bits_kernel, (unsigned)((count + kThreads - 1) / kThreads), kThreads,
             static_cast<cudaStream_t>(stream), args);
  return (int)cudaGetLastError();
}

}  // namespace emo::cuda
