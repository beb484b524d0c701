// What documents drew and used, between the binding and the kernels, as pool_ops.h is for routing.
//
// T tokens, E experts, D documents, L layers; semantics are those of experts_used and
// document_statistics in emo_megatron/ops/reference.py and of draw_bits in
// emo_megatron/ops/sizes.py.
#pragma once
#include "pool_ops.h"

namespace emo {

inline int num_words(int num_experts) { return (num_experts + 31) / 32; }

struct UsedArgs {
  const uint8_t* routing_map;   // [T, E]
  const int64_t* document_ids;  // [T], -1 is padding
  int32_t* used;                // [D, num_words(E)] zeroed by the caller
  int64_t num_tokens;
  int64_t num_documents;
  int num_experts;
};

// Scored documents, sizes of their pools, entropies in 2^-27 nats, documents with experts, those.
constexpr int kNumStatistics = 5;

struct StatisticsArgs {
  const int64_t* scores;  // [D, E]; null: none
  const uint8_t* pool;    // [D, E]; null: none
  const int32_t* used;    // [D, words]; null: none
  int64_t* sums;          // [kNumStatistics] zeroed by the caller
  int64_t num_documents;
  int num_experts;
  int num_words;
};

struct DrawArgs {
  const int64_t* positions;  // [D]
  const int64_t* offsets;    // [D]
  const int64_t* layers;     // [L]; null: first_layer and those after it
  int64_t* bits;             // [L, D]
  int64_t first_layer;
  int64_t num_layers;
  int64_t num_documents;
  int64_t start;  // of the hash
};

// splitmix64's step: the finaliser of the state and a counter.
EMO_HOST_DEVICE inline uint64_t mix(uint64_t state, int64_t counter) {
  uint64_t x = state + 0x9E3779B97F4A7C15ull + (uint64_t)counter;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}
EMO_HOST_DEVICE inline int64_t bits_of(const DrawArgs& args, int64_t i) {
  const int64_t row = i / args.num_documents, document = i % args.num_documents;
  const int64_t layer = args.layers != nullptr ? args.layers[row] : args.first_layer + row;
  const uint64_t state = mix((uint64_t)args.start, args.positions[document]);
  return (int64_t)mix(mix(state, args.offsets[document]), layer);
}

namespace cpu {
// Ranges are of tokens, documents and draws, and may run beside each other.
void experts_used(const UsedArgs& args, int64_t begin, int64_t end);
void document_statistics(const StatisticsArgs& args, int64_t begin, int64_t end);
void draw_bits(const DrawArgs& args, int64_t begin, int64_t end);
}  // namespace cpu

namespace cuda {
int experts_used(const UsedArgs& args, void* stream);
int document_statistics(const StatisticsArgs& args, void* stream);
int draw_bits(const DrawArgs& args, void* stream);
}  // namespace cuda

}  // namespace emo
