// The routing ops between the binding and the kernels: plain structs of pointers and sizes, no
// torch, no CUDA types.
//
// T tokens, E experts, K experts a token, D documents; all tensors contiguous, rows of E. Semantics
// are those of emo_megatron/ops/reference.py, which the tests compare every kernel with.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define EMO_HOST_DEVICE __host__ __device__
#else
#define EMO_HOST_DEVICE
#endif

namespace emo {

constexpr int kMaxExperts = 1024;
constexpr int kMaxTopK = 32;
constexpr int kMaxGroups = 32;
// Document scores, column sums and entropies are in units of 2^-27: integer sums do not depend on
// the order of the tokens.
constexpr int kFractionBits = 27;
constexpr float kOne = 1 << kFractionBits;
constexpr int kMaxGateUnits = (1 << 30) - 1;  // of one gate in document scores
constexpr float kTiny = 1e-20f;               // Megatron's guard against a sum of zero gates

// Routing takes the first three.
enum class DType : int { kFloat32, kBFloat16, kFloat16, kFloat64 };

enum class Scoring : int {
  kSoftmaxThenTopK,  // weights are the softmax over the pool at the chosen experts (the paper)
  kTopKThenSoftmax,  // weights are the softmax over the chosen logits
  kSigmoid,          // weights are gates, here sigmoids, normalised over the chosen
  kSqrtSoftplus,     // gates are square roots of softplus
};
EMO_HOST_DEVICE inline bool has_gates(Scoring scoring) { return scoring >= Scoring::kSigmoid; }

struct ScoreArgs {
  const void* logits;  // [T, E] of dtype
  DType dtype;
  const int64_t* document_ids;  // [T], -1 is padding
  int64_t* sums;                // [D, E] in 2^-27, zeroed by the caller
  int64_t num_tokens;
  int64_t num_documents;
  int num_experts;
  Scoring scoring;  // softmax, or gates
};

struct SelectArgs {
  const int64_t* scores;      // [D, E]
  const int64_t* pool_sizes;  // [D]
  uint8_t* pool;              // [D, E], 1 = in the pool
  int64_t num_documents;
  int num_experts;
  int num_forced;
};

struct RoutingArgs {
  const void* logits;  // [T, E] of dtype
  DType dtype;
  const int64_t* document_ids;  // [T], -1 is padding; null: no padding
  const uint8_t* pool;          // [num_pools, E]; null: every expert
  int64_t num_pools;            // a single row serves every token, padding too
  const float* expert_bias;     // [E], gates only; null: none
  int64_t num_tokens;
  int num_experts;
  int top_k;
  Scoring scoring;
  bool mask_logits;  // experts outside the pool carry neither weight nor loss; false: the pool
                     // limits the choice only
  float scaling;     // of the weights
  int num_groups;    // of neighbouring experts, of which a token uses group_topk; 0: no limit
  int group_topk;
  bool by_document;       // each document's scores and choices are summed apart
  int64_t num_documents;  // of those sums
};
inline int64_t num_sums(const RoutingArgs& args) {
  return args.by_document ? args.num_documents : 1;
}

// Whether a token may find experts of its pool closed to it.
EMO_HOST_DEVICE inline bool limits_groups(const RoutingArgs& args) {
  return args.group_topk < args.num_groups;
}

// The row of the pool that a token of `document` reads; -1: it may choose every expert.
EMO_HOST_DEVICE inline int64_t pool_row(const RoutingArgs& args, int64_t document) {
  if (args.pool == nullptr || args.num_pools == 0) return -1;
  if (args.num_pools == 1) return 0;
  return document < 0 ? -1 : document;
}

// What is counted beside the choices of each expert, in this order behind them.
// valid tokens, non-finite tokens, valid ones that use more than group_topk groups, the entropies
// of the valid ones in 2^-27 nats
constexpr int kNumFacts = 4;

// A token counts if it is not padding and finite: no logit is NaN or +inf, and one at least of
// those that carry weight is above -inf. A non-finite token gets the first K experts that it may
// choose, with weights that are NaN; in all that is summed up it is missing.
struct RoutingOutputs {
  void* probs;           // [T, E] of dtype
  uint8_t* routing_map;  // [T, E], exactly K a token
  int64_t* counts;       // [E + kNumFacts] zeroed by the caller: choices, then the facts
  int64_t* score_units;  // [R, E] workspace zeroed by the caller: scores in 2^-27; R is 1, or D
  float* score_sums;     // [R, E]
  float* z;              // [T], 0 for tokens that do not count
  int64_t* document_choices;  // [D, E] zeroed by the caller: choices of each document; null: none
};

struct RoutingGradients {
  const void* grad_probs;        // [T, E] of dtype, read at chosen experts only; null: none
  const float* grad_score_sums;  // [R, E]; null: none
  const float* grad_z;           // [T]; null: none
  const uint8_t* routing_map;    // [T, E] as forward wrote it
  void* grad_logits;             // [T, E] of dtype, every entry written
};

namespace cpu {
// Each works on a range of tokens or documents and may run beside itself on other ranges.
void document_scores(const ScoreArgs& args, int64_t begin, int64_t end);
void select_pool(const SelectArgs& args, int64_t begin, int64_t end);
void pool_topk(const RoutingArgs& args, const RoutingOutputs& out, int64_t begin, int64_t end);
void pool_topk_finish(const RoutingArgs& args, const RoutingOutputs& out);
void pool_topk_backward(const RoutingArgs& args, const RoutingGradients& grads, int64_t begin,
                        int64_t end);
}  // namespace cpu

namespace cuda {
// The library carries a CUDA runtime of its own, which does not know the device that torch has set.
int use_device(int device);
const char* error_text(int status);
// Whether the error says that the kernels were not built for this GPU or driver.
bool is_unsupported(int status);
// Each launches on `stream` (a cudaStream_t) and returns a cudaError_t as an int, 0 for success.
int document_scores(const ScoreArgs& args, void* stream);
int select_pool(const SelectArgs& args, void* stream);
int pool_topk(const RoutingArgs& args, const RoutingOutputs& out, void* stream);
int pool_topk_backward(const RoutingArgs& args, const RoutingGradients& grads, void* stream);
}  // namespace cuda

}  // namespace emo
