// Which groups of neighbouring experts a token may use, on a CPU; the definition is
// emo_megatron/ops/groups.py. Not inlined: routing without groups keeps its registers.
#pragma once
#include "vectors.h"

namespace emo::cpu {

// Lane g of a row is group g. Vectors are of a width that also AVX2 keeps in one register.
constexpr int kGroupLanes = 8;
typedef int32_t GroupInts __attribute__((vector_size(32)));
typedef float GroupFloats __attribute__((vector_size(32)));
constexpr int kGroupBlocks = kMaxGroups / kGroupLanes;

template <int kBlocks>
union GroupRows {
  GroupInts blocks[kBlocks];
  GroupFloats values[kBlocks];
  Ints ints[kBlocks / 2];
  Floats floats[kBlocks / 2];
  int32_t i[kBlocks * kGroupLanes];
};
using GroupRow = GroupRows<kGroupBlocks>;

struct Groups {
  GroupRow in_pool, counted;  // experts in the pool; how many of them the rank of a group counts
  int num_groups, size, wanted, group_topk, top_k, blocks;

  explicit Groups(const RoutingArgs& args);
};

// For another pool: counts its experts.
void set_pool(Groups& groups, const Row& allowed);

// Exclude the experts of groups that are not admitted; returns how many groups are. Groups are
// ranked by sums of what the keys are made of, or, with the maximum of a softmax, of e^(x - max).
int limit_to_groups(const Groups& groups, Row& keys, const float* softmax_max);

// In how many groups the chosen experts lie.
int groups_used(const Groups& groups, const Row& chosen);

}  // namespace emo::cpu
