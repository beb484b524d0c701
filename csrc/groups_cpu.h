// Which groups of neighbouring experts a token may use, on a CPU: a lane of a vector is a group.
//
// The definition is emo_megatron/ops/groups.py.
#pragma once
#include <type_traits>

#include "vectors.h"

namespace emo::cpu {

constexpr int kGroupBlocks = kMaxGroups / kLanes;

union GroupRow {
  Ints ints[kGroupBlocks];
  int32_t i[kMaxGroups];
};

class Groups {
  // a limit means two groups or more, and more than sixteen are of few experts
  union {
    Ints ints[kMaxExperts / 2];
    int32_t i[kMaxExperts / 2 * kLanes];
  } members;  // keys: of every group the first expert, then of every group the second, ...
  GroupRow in_pool;
  int num_groups, size, wanted, group_topk, top_k, blocks;

  // The best keys of each group in a block, from the best one down.
  template <class Count>
  EMO_INLINE void find_best(int block, Count count, Ints (&best)[kMaxTopK]) const {
    for (int k = 0; k < count; ++k) best[k] = splat(kBeyond);
    for (int m = 0; m < size; ++m) {
      Ints key = members.ints[m * blocks + block];
      for (int k = 0; k < count; ++k) {
        const Ints lower = min(best[k], key);
        best[k] = max(best[k], key);
        key = lower;
      }
    }
  }
  // Order keys of the sums of the best n experts; `value` makes of a key what is added up.
  template <class Value>
  EMO_INLINE Ints rank_sums(int block, Value value) const {
    Ints best[kMaxTopK];
    if (wanted == 1)
      find_best(block, std::integral_constant<int, 1>{}, best);
    else if (wanted == 2)
      find_best(block, std::integral_constant<int, 2>{}, best);
    else
      find_best(block, wanted, best);
    Floats total = splat(0.0f);
    for (int k = 0; k < wanted; ++k)
      total += where(in_pool.ints[block] > k, value(keys_to_floats(best[k])), splat(0.0f));
    return order_keys(total);
  }

 public:
  EMO_INLINE explicit Groups(const RoutingArgs& args)
      : num_groups(args.num_groups), group_topk(args.group_topk), top_k(args.top_k) {
    if (!limits_groups(args)) return;
    size = args.num_experts / num_groups;
    wanted = top_k / group_topk;
    blocks = num_blocks(num_groups);
    for (int i = 0; i < size * blocks; ++i) members.ints[i] = splat(kBeyond);
    for (Ints& lanes : in_pool.ints) lanes = splat(0);
  }

  // For another pool: its experts are counted.
  EMO_INLINE void set(const Row& allowed) {
    for (int g = 0; g < num_groups; ++g) {
      int count = 0;
      for (int m = 0; m < size; ++m) count -= allowed.i[g * size + m];
      in_pool.i[g] = count;
    }
  }

  // Exclude the experts of the groups that are not admitted; returns how many are.
  template <class Value>
  EMO_INLINE int limit(Row& keys, Value value) {
    const int stride = blocks * kLanes;
    for (int g = 0; g < num_groups; ++g)
      for (int m = 0; m < size; ++m) members.i[m * stride + g] = keys.i[g * size + m];
    GroupRow sums, counted, admitted;
    for (int b = 0; b < blocks; ++b) {
      sums.ints[b] = rank_sums(b, value);
      counted.ints[b] = min(in_pool.ints[b], splat(wanted));
    }
    for (int b = 0; b < blocks; ++b) {
      const Ints mine = sums.ints[b], n = counted.ints[b];
      const Ints index = Ints{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + b * kLanes;
      Ints rank = splat(0), held = splat(0);  // of the groups before: how many, and their experts
      for (int g = 0; g < num_groups; ++g) {
        const Ints ties = (mine == sums.i[g]) & (index > g);
        const Ints is_before = (n < counted.i[g]) | ((n == counted.i[g]) & ((mine < sums.i[g]) | ties));
        rank -= is_before;
        held += is_before & in_pool.i[g];
      }
      admitted.ints[b] = (rank < group_topk) | (held < top_k);
    }
    int num_admitted = 0;
    for (int g = 0; g < num_groups; ++g) {
      num_admitted -= admitted.i[g];
      if (admitted.i[g]) continue;
      for (int e = g * size; e < (g + 1) * size; ++e)
        keys.i[e] = keys.i[e] < kExcluded ? keys.i[e] : kExcluded;
    }
    return num_admitted;
  }

  // In how many groups the chosen experts lie.
  EMO_INLINE int used(const Row& chosen) const {
    int count = 0;
    for (int g = 0; g < num_groups; ++g) {
      int32_t any = 0;
      for (int m = 0; m < size; ++m) any |= chosen.i[g * size + m];
      count -= any;
    }
    return count;
  }
};

}  // namespace emo::cpu
