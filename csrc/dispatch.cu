// Where rows go, on a GPU: a warp takes a chunk of tokens or pairs.
//
// Every place is computed from counts, so results are the same whatever the schedule.
#include "dispatch_ops.h"
#include "warp.cuh"

namespace emo::cuda {
namespace {

// The sum of what the lanes below hold.
template <class T>
__device__ __forceinline__ T warp_prefix(T x) {
  T sum = x;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const T below = __shfl_sync(kAllLanes, sum, (lane_id() - step) & 31);
    if (lane_id() >= step) sum += below;
  }
  return sum - x;
}

// Flags are bytes of 0 or 1; eight at a time where they lie so.
__device__ __forceinline__ int count_experts(const uint8_t* flags, int num_experts) {
  int count = 0;
  if ((reinterpret_cast<uintptr_t>(flags) | (unsigned)num_experts) % 8 == 0) {
    const unsigned long long* words = reinterpret_cast<const unsigned long long*>(flags);
    for (int i = 0; i < num_experts / 8; ++i) count += __popcll(words[i]);
  } else {
    for (int e = 0; e < num_experts; ++e) count += flags[e];
  }
  return count;
}

// A block takes a few tokens: pairs an expert by columns, rows a rank by tokens.
constexpr int kTokensPerBlock = 64;
__global__ void __launch_bounds__(kThreads) count_sends_kernel(CountArgs args) {
  const long long begin = (long long)blockIdx.x * kTokensPerBlock;
  const long long left = args.num_tokens - begin;
  const int count = left < kTokensPerBlock ? (int)left : kTokensPerBlock;
  const int per_rank = args.num_experts / args.num_ranks;
  unsigned long long* counts = reinterpret_cast<unsigned long long*>(args.counts);
  for (int e = threadIdx.x; e < args.num_experts; e += kThreads) {
    int pairs = 0;
    for (int i = 0; i < count; ++i) pairs += args.routing_map[(begin + i) * args.num_experts + e];
    if (pairs != 0) atomicAdd(counts + args.num_ranks + e, (unsigned long long)pairs);
  }
  // a warp a rank
  for (int rank = warp_id(); rank < args.num_ranks; rank += kWarps) {
    int rows = 0;
    for (int i = lane_id(); i < kTokensPerBlock; i += 32) {
      const uint8_t* flags = args.routing_map + (begin + i) * args.num_experts + rank * per_rank;
      const bool is_sent = i < count && count_experts(flags, per_rank) > 0;
      rows += __popc(__ballot_sync(kAllLanes, is_sent));
    }
    if (lane_id() == 0 && rows != 0) atomicAdd(counts + rank, (unsigned long long)rows);
  }
}

// A lane a token. Counting fills a line of the table; planning begins where the line says.
template <bool kPlan>
__global__ void __launch_bounds__(kThreads) send_kernel(SendArgs args) {
  const long long chunk = global_warp();
  if (chunk >= args.table.num_chunks) return;
  const int num_ranks = args.num_ranks, per_rank = args.num_experts / num_ranks;
  const long long t = chunk * kTokensPerChunk + lane_id();
  const bool is_token = t < args.num_tokens;
  const uint8_t* flags = args.routing_map + t * args.num_experts;
  int64_t* line = args.table.line(chunk);
  const int64_t* offsets = args.table.offsets();

  int rows_of_mine = 0;
  for (int rank = 0; rank < num_ranks; ++rank) {
    const int pairs = is_token ? count_experts(flags + rank * per_rank, per_rank) : 0;
    rows_of_mine += pairs > 0;
    if (kPlan) continue;
    const int pairs_below = warp_prefix(pairs);
    const int rows = __popc(__ballot_sync(kAllLanes, pairs > 0));
    if (lane_id() == 31) {
      line[rank] = rows;
      line[num_ranks + rank] = pairs_below + pairs;
    }
  }
  const int rows_below = warp_prefix(rows_of_mine);
  if (!kPlan) {
    if (lane_id() == 31) line[2 * num_ranks] = rows_below + rows_of_mine;
    return;
  }

  long long next_row = line[2 * num_ranks] + rows_below, pairs_end = 0;
  const long long rows_end = next_row + rows_of_mine;
  if (is_token) args.bounds[t] = next_row;
  if (t == args.num_tokens - 1) args.bounds[args.num_tokens] = args.num_rows;
  for (int rank = 0; rank < num_ranks; ++rank) {
    const int pairs = is_token ? count_experts(flags + rank * per_rank, per_rank) : 0;
    const unsigned senders = __ballot_sync(kAllLanes, pairs > 0);
    long long pair = offsets[num_ranks + rank] + line[num_ranks + rank] + warp_prefix(pairs);
    pairs_end = pair + pairs;
    if (pairs == 0) continue;
    const long long row = offsets[rank] + line[rank] + __popc(senders & lanes_below());
    // fewer rows or pairs than the caller said would leave the tensors
    if (row < args.num_rows) args.sources[row] = t;
    if (next_row < args.num_rows) args.copies[next_row] = row;
    ++next_row;
    bool is_first = true;
    for (int e = 0; e < per_rank; ++e) {
      if (!flags[rank * per_rank + e] || pair >= args.num_pairs) continue;
      args.places[pair] = t * args.num_experts + rank * per_rank + e;
      args.codes[pair++] = e * 2 + is_first;
      is_first = false;
    }
  }
  if (chunk != args.table.num_chunks - 1) return;
  // sizes beyond what is there: the last lane knows where rows and, of the last rank, pairs end
  const long long first_row = __shfl_sync(kAllLanes, rows_end, 31);
  const long long first_pair = __shfl_sync(kAllLanes, pairs_end, 31);
  for (long long row = first_row + lane_id(); row < args.num_rows; row += 32)
    args.sources[row] = args.copies[row] = -1;
  for (long long pair = first_pair + lane_id(); pair < args.num_pairs; pair += 32) {
    args.places[pair] = 0;
    args.codes[pair] = 0;
  }
}

// A warp takes 32 pairs after the other, and keeps where the next pair of each expert goes.
template <bool kPlan>
__global__ void __launch_bounds__(kThreads) receive_kernel(ReceiveArgs args) {
  __shared__ unsigned next_of_warp[kWarps][kMaxExperts];
  const long long chunk = global_warp();
  if (chunk >= args.table.num_chunks) return;
  unsigned* next = next_of_warp[warp_id()];
  int64_t* line = args.table.line(chunk);
  const int64_t* offsets = args.table.offsets();
  for (int e = lane_id(); e < args.num_experts; e += 32)
    next[e] = kPlan ? (unsigned)(offsets[e] + line[e]) : 0;
  long long next_row = kPlan ? line[args.num_experts] : 0;
  __syncwarp();

#pragma unroll 1
  for (int done = 0; done < kPairsPerChunk; done += 32) {
    const long long p = chunk * kPairsPerChunk + done + lane_id();
    const int code = p < args.num_pairs ? args.codes[p] : -1;
    const int expert = code < 0 || code >> 1 >= args.num_experts ? -1 : code >> 1;
    const bool is_first = expert >= 0 && (code & 1);
    const unsigned firsts = __ballot_sync(kAllLanes, is_first);
    const unsigned equals = __match_any_sync(kAllLanes, expert);
    const int rank = __popc(equals & lanes_below());
    if (kPlan && expert >= 0) {
      const long long row = next_row + __popc(firsts & lanes_below()) + is_first - 1;
      const long long place = next[expert] + rank;
      // codes that do not belong to the sizes would leave the tensors
      if (place < args.num_pairs && row >= 0 && row < args.num_rows) {
        if (is_first) args.bounds[row] = p;
        args.sources[place] = row;
        args.order[place] = p;
        args.copies[p] = place;
      }
    }
    __syncwarp();
    if (expert >= 0 && rank == 0) next[expert] += __popc(equals);
    next_row += __popc(firsts);
    __syncwarp();
  }
  if (kPlan) {
    if (chunk == args.table.num_chunks - 1 && lane_id() == 0)
      args.bounds[args.num_rows] = args.num_pairs;
  } else {
    for (int e = lane_id(); e < args.num_experts; e += 32) line[e] = next[e];
    if (lane_id() == 0) line[args.num_experts] = next_row;
  }
}

// A warp a column: counts become where each chunk's share begins, the offsets' line the totals.
constexpr int kLinesPerLane = 4;
__global__ void __launch_bounds__(kThreads) scan_kernel(Table table) {
  const long long column = global_warp();
  if (column >= table.num_columns) return;
  long long total = 0;
#pragma unroll 1
  for (long long from = 0; from < table.num_chunks; from += 32 * kLinesPerLane) {
    long long counts[kLinesPerLane], mine = 0;
#pragma unroll
    for (int i = 0; i < kLinesPerLane; ++i) {
      const long long chunk = from + lane_id() * kLinesPerLane + i;
      counts[i] = chunk < table.num_chunks ? table.line(chunk)[column] : 0;
      mine += counts[i];
    }
    long long before = total + warp_prefix(mine);
    total = __shfl_sync(kAllLanes, before + mine, 31);
#pragma unroll
    for (int i = 0; i < kLinesPerLane; ++i) {
      const long long chunk = from + lane_id() * kLinesPerLane + i;
      if (chunk < table.num_chunks) table.line(chunk)[column] = before;
      before += counts[i];
    }
  }
  if (lane_id() == 0) table.offsets()[column] = total;
}

// A warp a group: its columns' totals become where each column begins.
__global__ void __launch_bounds__(kThreads) offsets_kernel(Table table) {
  const long long begin = global_warp() * table.group;
  if (begin >= table.num_columns) return;
  long long total = 0;
#pragma unroll 1
  for (int from = 0; from < table.group; from += 32) {
    const long long column = begin + from + lane_id();
    const bool is_column = from + lane_id() < table.group && column < table.num_columns;
    const long long mine = is_column ? table.offsets()[column] : 0;
    const long long before = total + warp_prefix(mine);
    total = __shfl_sync(kAllLanes, before + mine, 31);
    if (is_column) table.offsets()[column] = before;
  }
}

void launch_scan(const Table& table, cudaStream_t stream) {
  EMO_LAUNCH(scan_kernel, blocks_for(table.num_columns, 1), kThreads, stream, table);
  const int groups = (table.num_columns + table.group - 1) / table.group;
  EMO_LAUNCH(offsets_kernel, blocks_for(groups, 1), kThreads, stream, table);
}

}  // namespace

int count_sends(const CountArgs& args, void* stream) {
  if (args.num_tokens == 0) return 0;
  const int64_t blocks = (args.num_tokens + kTokensPerBlock - 1) / kTokensPerBlock;
  EMO_LAUNCH(count_sends_kernel, (unsigned)blocks, kThreads, static_cast<cudaStream_t>(stream),
             args);
  return (int)cudaGetLastError();
}

int plan_send(const SendArgs& args, void* opaque) {
  if (args.num_tokens == 0) return 0;
  const cudaStream_t stream = static_cast<cudaStream_t>(opaque);
  const unsigned blocks = blocks_for(args.table.num_chunks, 1);
  EMO_LAUNCH(send_kernel<false>, blocks, kThreads, stream, args);
  launch_scan(args.table, stream);
  EMO_LAUNCH(send_kernel<true>, blocks, kThreads, stream, args);
  return (int)cudaGetLastError();
}

int plan_receive(const ReceiveArgs& args, void* opaque) {
  if (args.num_pairs == 0) return 0;
  const cudaStream_t stream = static_cast<cudaStream_t>(opaque);
  const unsigned blocks = blocks_for(args.table.num_chunks, 1);
  EMO_LAUNCH(receive_kernel<false>, blocks, kThreads, stream, args);
  launch_scan(args.table, stream);
  EMO_LAUNCH(receive_kernel<true>, blocks, kThreads, stream, args);
  return (int)cudaGetLastError();
}

}  // namespace emo::cuda
