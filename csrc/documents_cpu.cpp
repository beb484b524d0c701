// What documents drew and used, on a CPU: ranges of tokens, documents or draws side by side.
//
// What they share is joined with integer atomics, so results do not depend on the threads.
#include "document_ops.h"
#include "vectors.h"

namespace emo::cpu {

void experts_used(const UsedArgs& args, int64_t begin, int64_t end) {
  const int words = num_words(args.num_experts);
  uint32_t used[kMaxExperts / 32];
  int64_t document = -1;
  const auto flush = [&] {
    // another thread may hold a part of this document too
    for (int w = 0; document >= 0 && w < words; ++w)
      __atomic_fetch_or(args.used + document * words + w, (int32_t)used[w], __ATOMIC_RELAXED);
  };
  for (int64_t t = begin; t < end; ++t) {
    if (t == begin || args.document_ids[t] != document) {
      flush();
      document = args.document_ids[t];
      std::memset(used, 0, sizeof used);
    }
    const uint8_t* flags = args.routing_map + t * args.num_experts;
    for (int e = 0; document >= 0 && e < args.num_experts; ++e)
      used[e / 32] |= (uint32_t)flags[e] << (e % 32);
  }
  flush();
}

void document_statistics(const StatisticsArgs& args, int64_t begin, int64_t end) {
  int64_t sums[kNumStatistics] = {};
  for (int64_t d = begin; d < end; ++d) {
    const int64_t* scores = args.scores + d * args.num_experts;
    int64_t total = 0, pool_size = 0, num_used = 0;
    for (int e = 0; args.scores != nullptr && e < args.num_experts; ++e) total += scores[e];
    for (int e = 0; args.pool != nullptr && e < args.num_experts; ++e)
      pool_size += args.pool[d * args.num_experts + e];
    if (total > 0) {
      const double inverse = 1.0 / (double)total;
      double entropy = 0.0;
      for (int e = 0; e < args.num_experts; ++e) {
        const float share = (float)((double)scores[e] * inverse);
        if (share > 0.0f) entropy -= (double)(share * log_of_sum(share));
      }
      sums[0] += 1;
      sums[1] += pool_size;
      sums[2] += entropy > 0.0 ? (int64_t)std::nearbyint(entropy * kOne) : 0;
    }
    for (int w = 0; args.used != nullptr && w < args.num_words; ++w)
      num_used += __builtin_popcount((uint32_t)args.used[d * args.num_words + w]);
    sums[3] += num_used > 0;
    sums[4] += num_used;
  }
  for (int i = 0; i < kNumStatistics; ++i) add_shared(args.sums + i, sums[i]);
}

void draw_bits(const DrawArgs& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) args.bits[i] = bits_of(args, i);
}

}  // namespace emo::cpu
