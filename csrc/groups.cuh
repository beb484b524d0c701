// Which groups of neighbouring experts a token may use, on a GPU; the definition is
// emo_megatron/ops/groups.py. A warp ranks the groups of a token, lane g group g.
#pragma once
#include "warp.cuh"

namespace emo::cuda {

template <int kChunks>
class Groups {
  // keys pass from the lanes of the experts to those of the groups through shared memory; of the
  // widest rows a part after the other, for its size
  static constexpr int kPart = kChunks <= 16 ? kChunks : 8;

  int size, wanted;  // experts in a group; how many of them its rank counts at most
  unsigned inverse;  // 2^20 over it, rounded up: exact for fewer than 1024 experts in a group
  int in_pool;       // experts of the pool in this lane's group

  // The inverse, for the expert's group: expert * inverse >> 20. Without the barrier the compiler
  // would keep the group of every chunk in a register over all tokens.
  __device__ __forceinline__ unsigned groups_in_place() const {
    unsigned hidden = inverse;
    asm volatile("" : "+r"(hidden));
    return hidden;
  }

  // How many experts of a set lie in this lane's group; for every lane to call together.
  __device__ __forceinline__ int count(unsigned set) const {
    int total = 0;
#pragma unroll 1
    for (int c = 0; c < kChunks; ++c) {
      const unsigned lanes = __ballot_sync(kAllLanes, has(set, c));
      // the group's lanes in this chunk are those from `first` on, but for those from `past` on
      const int first = lane_id() * size - c * 32, past = first + size;
      const unsigned below_past = past >= 32 ? kAllLanes : past <= 0 ? 0u : (1u << past) - 1u;
      const unsigned below_first = first >= 32 ? kAllLanes : first <= 0 ? 0u : (1u << first) - 1u;
      total += __popc(lanes & below_past & ~below_first);
    }
    return total;
  }

  // This warp's copy of a part of a row. A word lies between groups: lanes that read the same place
  // of their groups use different banks.
  static __device__ __forceinline__ unsigned* staged() {
    __shared__ unsigned keys[kWarps][kPart * 32 + kMaxGroups];
    return keys[warp_id()];
  }

  // Calls `visit` with every key of this lane's group; for every lane to call together.
  template <class Visit>
  __device__ __forceinline__ void for_members(const unsigned (&keys)[kChunks], Visit visit) const {
    unsigned* const mine = staged();
    const int own = lane_id() * size;
    const unsigned in_groups = groups_in_place();
#pragma unroll
    for (int part = 0; part < kChunks; part += kPart) {
      const int begin = part * 32, end = begin + kPart * 32,
                skipped = begin + (int)(begin * in_groups >> 20);
      __syncwarp();
#pragma unroll
      for (int c = part; c < part + kPart; ++c) {
        const int e = c * 32 + lane_id(), group = e * in_groups >> 20;
        if (group < kMaxGroups) mine[e + group - skipped] = keys[c];
      }
      __syncwarp();
      const int from = own > begin ? own : begin, past = own + size < end ? own + size : end;
#pragma unroll 4
      for (int e = from; e < past; ++e) visit(mine[e + lane_id() - skipped]);
    }
  }

 public:
  __device__ __forceinline__ explicit Groups(const RoutingArgs& args)
      : size(args.num_experts / (limits_groups(args) ? args.num_groups : 1)),
        wanted(args.top_k / (limits_groups(args) ? args.group_topk : 1)),
        inverse(((1u << 20) + size - 1) / size) {}

  // For another pool.
  __device__ __forceinline__ void set(unsigned allowed) { in_pool = count(allowed); }

  // Exclude the experts of groups that are not admitted; returns how many groups are. Groups are
  // ranked by sums of what the keys are made of, or, with the maximum of a softmax, of e^(x - max).
  __device__ __forceinline__ int limit(const RoutingArgs& args, float softmax_max,
                                       unsigned (&keys)[kChunks]) const {
    const int counted = in_pool < wanted ? in_pool : wanted;
    const bool is_exp = args.scoring == Scoring::kSoftmaxThenTopK;
    const auto value = [&](unsigned key) {
      const float x = key_to_float(key);
      return is_exp ? expf(x - softmax_max) : x;
    };
    unsigned best = kBeyond, next = kBeyond;
    for_members(keys, [&](unsigned key) {
      const unsigned lower = best < key ? best : key;
      best = best > key ? best : key;
      next = next > lower ? next : lower;
    });
    float sum = counted > 0 ? value(best) : 0.0f;
    if (counted > 1) sum += value(next);
    int taken = best == next ? 2 : 1;  // of those that equal `next`
#pragma unroll 1
    for (int k = 2; k < wanted; ++k) {
      int equal = 0;
      unsigned below = kBeyond;
      for_members(keys, [&](unsigned key) {
        equal += key == next;
        below = key < next && key > below ? key : below;
      });
      if (taken == equal) {
        next = below;
        taken = 0;
      }
      ++taken;
      if (counted > k) sum += value(next);
    }

    // the best group left: of those that count most experts, and rank highest, the lowest
    const unsigned mine = order_key(sum);
    bool is_left = lane_id() < args.num_groups;
    unsigned admitted = 0;
    int held = 0;  // experts of the pool in admitted groups
#pragma unroll 1
    for (int i = 0; i < args.num_groups && (i < args.group_topk || held < args.top_k); ++i) {
      const unsigned most = __reduce_max_sync(kAllLanes, is_left ? counted + 1u : 0u);
      const bool is_candidate = is_left && counted + 1u == most;
      const unsigned highest = __reduce_max_sync(kAllLanes, is_candidate ? mine : 0u);
      const int best_group = __ffs(__ballot_sync(kAllLanes, is_candidate && mine == highest)) - 1;
      admitted |= 1u << best_group;
      held += __shfl_sync(kAllLanes, in_pool, best_group);
      is_left = is_left && lane_id() != best_group;
    }
    // lanes past the last expert too: a token finds K experts before them
    const unsigned in_groups = groups_in_place();
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const unsigned group = (c * 32 + lane_id()) * in_groups >> 20;
      const bool is_open = (admitted >> (group % kMaxGroups)) & 1u;
      if (!is_open) keys[c] = kExcluded;
    }
    return __popc(admitted);
  }

  // In how many groups the chosen experts lie; for every lane to call together.
  __device__ __forceinline__ int used(unsigned chosen) const {
    return __popc(__ballot_sync(kAllLanes, count(chosen) > 0));
  }
};

}  // namespace emo::cuda
