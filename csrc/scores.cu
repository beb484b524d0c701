// Document scores and pools on a GPU. For the scores a warp takes one token after the other of a
// short run, a block is eight warps; for the pools a warp takes a document.
//
// Sums are integers, added with integer atomics: the same bits whatever the order.
#include "warp.cuh"

namespace emo::cuda {
namespace {

// At least four blocks shall fit on a multiprocessor, three with gates of more than 256 experts: no
// GPU spills registers for that up to 512 experts.
template <class T, int kChunks, bool kGates>
__global__ void __launch_bounds__(kThreads, kChunks > 16            ? 1
                                            : kChunks > 8 && kGates ? 3
                                                                    : 4)
    document_scores_kernel(ScoreArgs args, int per_warp) {
  const unsigned inside = lanes_inside<kChunks>(args.num_experts);
  const Tokens tokens(args.document_ids, args.num_tokens, args.num_documents, per_warp);
  const T* logits = static_cast<const T*>(args.logits);
  unsigned run[kChunks] = {};
  long long document = tokens.document(0);

  // one document in the whole block, in whatever order documents come: its sums are joined before
  // they leave the block
  const long long first = args.document_ids[(long long)blockIdx.x * kWarps * per_warp];
  const bool is_mine = lane_id() >= tokens.count || tokens.my_document == first;
  const bool is_joined = __syncthreads_and(is_mine) && first >= 0;

  const auto flush = [&] {
    if (document < 0) return;
    unsigned long long* to =
        reinterpret_cast<unsigned long long*>(args.sums) + document * args.num_experts;
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
      if (run[c] != 0) atomicAdd(to + c * 32 + lane_id(), (unsigned long long)run[c]);
  };
#pragma unroll 1
  for (int i = 0; i < tokens.count; ++i) {
    const long long next = tokens.document(i);
    if (next != document) {
      flush();
#pragma unroll
      for (int c = 0; c < kChunks; ++c) run[c] = 0;
      document = next;
    }
    if (document < 0) continue;
    float x[kChunks];
    load_row(logits + (tokens.begin + i) * args.num_experts, inside, x);
    if constexpr (kGates) {
      if (!(fabsf(row_max(x, inside)) < INFINITY)) continue;
      gates_of(args.scoring, x, x);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const unsigned units = __float2uint_rn(x[c] * kOne);
        run[c] += units < kMaxGateUnits ? units : kMaxGateUnits;
      }
      continue;
    }
    float exps[kChunks];
    const Softmax soft = softmax(x, inside, exps);
    if (!soft.is_finite()) continue;
    const float unit = kOne / soft.total;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) run[c] += __float2uint_rn(exps[c] * unit);
  }
  if (is_joined) {
    __shared__ unsigned of_warp[kWarps][kChunks * 32];
#pragma unroll
    for (int c = 0; c < kChunks; ++c) of_warp[warp_id()][c * 32 + lane_id()] = run[c];
    __syncthreads();
    add_over_warps(of_warp, args.num_experts, args.sums + first * args.num_experts);
  } else {
    flush();
  }
}

// A warp a document: the size-th largest score is searched bit by bit.
template <int kChunks>
__global__ void __launch_bounds__(kThreads) select_pool_kernel(SelectArgs args) {
  const long long document = (long long)blockIdx.x * kWarps + warp_id();
  if (document >= args.num_documents) return;
  const int num_free = args.num_experts - args.num_forced;
  long long wanted = args.pool_sizes[document] - args.num_forced;
  wanted = wanted < 0 ? 0 : (wanted > num_free ? num_free : wanted);

  // unsigned integers in the order of the scores; forced experts are not in the running
  unsigned long long keys[kChunks];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int e = c * 32 + lane_id();
    keys[c] = e < num_free ? (unsigned long long)args.scores[document * args.num_experts + e] ^
                                 0x8000000000000000ull
                           : 0;
  }
  // above the highest bit in which two of them differ, all are as the first
  const unsigned long long first = __shfl_sync(kAllLanes, keys[0], 0);
  unsigned long long differing = 0;
#pragma unroll
  for (int c = 0; c < kChunks; ++c)
    if (c * 32 + lane_id() < num_free) differing |= keys[c] ^ first;
  const unsigned high = __reduce_or_sync(kAllLanes, (unsigned)(differing >> 32));
  const unsigned low = __reduce_or_sync(kAllLanes, (unsigned)differing);
  const int num_bits = high != 0 ? 64 - __clz((int)high) : 32 - __clz((int)low);
  unsigned long long threshold = num_bits < 64 ? first >> num_bits << num_bits : 0;
  for (int bit = num_bits - 1; bit >= 0; --bit) {
    const unsigned long long candidate = threshold | (1ull << bit);
    int reached = 0;
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
      reached += __popc(__ballot_sync(kAllLanes, keys[c] >= candidate));
    if (reached >= wanted) threshold = candidate;
  }
  int above = 0;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) above += __popc(__ballot_sync(kAllLanes, keys[c] > threshold));
  const int equal_wanted = (int)wanted - above;
  int rank = 0;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int e = c * 32 + lane_id();
    const bool is_equal = keys[c] == threshold;  // forced ones too, but they come last and are in
    const unsigned equal = __ballot_sync(kAllLanes, is_equal);
    const bool is_tied_in = is_equal && rank + __popc(equal & lanes_below()) < equal_wanted;
    const bool is_in = e >= num_free || (wanted > 0 && (keys[c] > threshold || is_tied_in));
    if (e < args.num_experts) args.pool[document * args.num_experts + e] = is_in;
    rank += __popc(equal);
  }
}

}  // namespace

int use_device(int device) { return (int)cudaSetDevice(device); }
const char* error_text(int status) { return cudaGetErrorString((cudaError_t)status); }
bool is_unsupported(int status) {
  return status == cudaErrorNoKernelImageForDevice || status == cudaErrorInsufficientDriver ||
         status == cudaErrorUnsupportedPtxVersion || status == cudaErrorInvalidDeviceFunction ||
         status == cudaErrorNoDevice;
}

int document_scores(const ScoreArgs& args, void* stream) {
  if (args.num_tokens == 0) return 0;
  const int most = has_gates(args.scoring) ? kMaxTokensOfGates : kMaxTokensPerWarp;
  const int per_warp = tokens_per_warp(args.num_tokens, most);
  const auto launch = [&](auto is_gated) {
    return with_types(args.dtype, args.num_experts, [&](auto type, auto chunks) {
      EMO_LAUNCH((document_scores_kernel<decltype(type), decltype(chunks)::value,
                                         decltype(is_gated)::value>),
                 blocks_for(args.num_tokens, per_warp), kThreads, static_cast<cudaStream_t>(stream),
                 args, per_warp);
    });
  };
  return has_gates(args.scoring) ? launch(std::true_type{}) : launch(std::false_type{});
}

int select_pool(const SelectArgs& args, void* stream) {
  if (args.num_documents == 0) return 0;
  return with_chunks<float>(args.num_experts, [&](auto, auto chunks) {
    EMO_LAUNCH((select_pool_kernel<decltype(chunks)::value>), blocks_for(args.num_documents, 1),
               kThreads, static_cast<cudaStream_t>(stream), args);
  });
}

}  // namespace emo::cuda
