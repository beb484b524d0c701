// Group-limited routing on a CPU: see groups_cpu.h.
#include "groups_cpu.h"

namespace emo::cpu {
namespace {

using Best = GroupRows<kMaxTopK * kGroupBlocks>;

// The best keys of each group, row after row. kWanted is K / group_topk where that is small, so
// that they stay in registers; 0: any.
template <int kWanted>
EMO_INLINE void find_best(const Groups& groups, const Row& keys, Best& rows) {
  const int count = kWanted > 0 ? kWanted : groups.wanted, blocks = groups.blocks;
  for (int b = 0; b < blocks; ++b) {
    GroupInts best[kWanted > 0 ? kWanted : kMaxTopK];
    for (int k = 0; k < count; ++k) best[k] = GroupInts{} + kBeyond;
    const int32_t* first[kGroupLanes];  // lanes beyond the last group hold the last one's keys
    for (int i = 0; i < kGroupLanes; ++i) {
      const int g = b * kGroupLanes + i;
      first[i] = keys.i + (g < groups.num_groups ? g : groups.num_groups - 1) * groups.size;
    }
    for (int m = 0; m < groups.size; ++m) {
      GroupInts key = {first[0][m], first[1][m], first[2][m], first[3][m],
                       first[4][m], first[5][m], first[6][m], first[7][m]};
      for (int k = 0; k < count; ++k) {
        const GroupInts lower = best[k] < key ? best[k] : key;
        best[k] = best[k] > key ? best[k] : key;
        key = lower;
      }
    }
    for (int k = 0; k < count; ++k) rows.blocks[k * blocks + b] = best[k];
  }
}

// Order keys of the sums of each group's best n experts, from the best one down.
EMO_INLINE void rank_sums(const Groups& groups, const Row& keys, const float* softmax_max,
                          GroupRow& sums) {
  Best rows;
  if (groups.wanted == 1)
    find_best<1>(groups, keys, rows);
  else if (groups.wanted == 2)
    find_best<2>(groups, keys, rows);
  else
    find_best<0>(groups, keys, rows);
  const int size = groups.wanted * groups.blocks;
  if (size % 2 == 1) rows.blocks[size] = GroupInts{};
  for (int i = 0; i < (size + 1) / 2; ++i) {
    const Floats x = keys_to_floats(rows.ints[i]);
    rows.floats[i] = softmax_max != nullptr ? exp_nonpositive(x - *softmax_max) : x;
  }
  for (int b = 0; b < groups.blocks; ++b) {
    GroupFloats total = {};
    for (int k = 0; k < groups.wanted; ++k)
      total += groups.counted.blocks[b] > k ? rows.values[k * groups.blocks + b] : GroupFloats{};
    sums.values[b] = total;
  }
  for (int i = 0; i < (groups.blocks + 1) / 2; ++i) sums.ints[i] = order_keys(sums.floats[i]);
}

}  // namespace

Groups::Groups(const RoutingArgs& args)
    : num_groups(args.num_groups), group_topk(args.group_topk), top_k(args.top_k) {
  if (!limits_groups(args)) return;
  size = args.num_experts / num_groups;
  wanted = top_k / group_topk;
  blocks = (num_groups + kGroupLanes - 1) / kGroupLanes;
  in_pool = counted = {};
}

EMO_CLONES void set_pool(Groups& groups, const Row& allowed) {
  for (int g = 0; g < groups.num_groups; ++g) {
    int count = 0;
    for (int m = 0; m < groups.size; ++m) count -= allowed.i[g * groups.size + m];
    groups.in_pool.i[g] = count;
    groups.counted.i[g] = count < groups.wanted ? count : groups.wanted;
  }
}

EMO_CLONES int limit_to_groups(const Groups& groups, Row& keys, const float* softmax_max) {
  const int num_groups = groups.num_groups, size = groups.size, blocks = groups.blocks;
  GroupRow sums = {}, admitted;
  rank_sums(groups, keys, softmax_max, sums);
  for (int b = 0; b < blocks; ++b) {
    const GroupInts sum = sums.blocks[b], n = groups.counted.blocks[b];
    const GroupInts index = GroupInts{0, 1, 2, 3, 4, 5, 6, 7} + b * kGroupLanes;
    GroupInts rank = {}, held = {};  // of the groups before: how many, and their experts
    for (int g = 0; g < num_groups; ++g) {
      const GroupInts is_better = (sum < sums.i[g]) | ((sum == sums.i[g]) & (index > g));
      const int32_t other = groups.counted.i[g];
      const GroupInts is_before = (n < other) | ((n == other) & is_better);
      rank -= is_before;
      held += is_before & groups.in_pool.i[g];
    }
    admitted.blocks[b] = (rank < groups.group_topk) | (held < groups.top_k);
  }
  int num_admitted = 0;
  for (int g = 0; g < num_groups; ++g) {
    num_admitted -= admitted.i[g];
    if (admitted.i[g]) continue;
    for (int e = g * size; e < (g + 1) * size; ++e) keys.i[e] = kExcluded;
  }
  return num_admitted;
}

EMO_CLONES int groups_used(const Groups& groups, const Row& chosen) {
  int count = 0;
  for (int g = 0; g < groups.num_groups; ++g) {
    int32_t any = 0;
    for (int m = 0; m < groups.size; ++m) any |= chosen.i[g * groups.size + m];
    count -= any;
  }
  return count;
}

}  // namespace emo::cpu
