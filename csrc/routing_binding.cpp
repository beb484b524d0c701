// The routing ops as torch operators.
//
// Each function checks its input, allocates its outputs on the input's device and current stream,
// and calls the kernels. Shapes and meaning: emo_megatron/ops/reference.py.
#include "binding.h"

using emo::check_ids;
using emo::data_of;
using emo::is_on_host;
using emo::run;

namespace {

// A token's work is some microseconds; smaller pieces are not worth a thread.
constexpr int64_t kTokensPerTask = 128;
constexpr int64_t kDocumentsPerTask = 16;

emo::DType dtype_of(const Tensor& logits) {
  const std::optional<emo::DType> dtype = emo::float_type(logits);
  STD_TORCH_CHECK(dtype.has_value() && *dtype != emo::DType::kFloat64,
                  "logits must be float32, bfloat16 or float16");
  return *dtype;
}

void check_logits(const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits must be [T, E]; got ", logits.dim(), " dimensions");
  STD_TORCH_CHECK(logits.is_contiguous(), "logits must be contiguous");
  STD_TORCH_CHECK(logits.size(1) >= 1 && logits.size(1) <= emo::kMaxExperts,
                  "logits must have 1 to ", emo::kMaxExperts, " experts; got ", logits.size(1));
}

void check_scoring(int64_t scoring) {
  constexpr int64_t kLast = (int64_t)emo::Scoring::kSqrtSoftplus;
  STD_TORCH_CHECK(scoring >= 0 && scoring <= kLast, "scoring must lie in [0, ", kLast, "]; got ",
                  scoring);
}

Tensor document_scores(const Tensor& logits, const Tensor& document_ids, int64_t num_documents,
                       int64_t scoring) {
  check_logits(logits);
  check_scoring(scoring);
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1);
  STD_TORCH_CHECK(num_documents >= 0, "num_documents must not be negative; got ", num_documents);
  const int64_t* ids =
      data_of<int64_t>("document_ids", document_ids, ScalarType::Long, num_tokens, -1, logits);
  check_ids(logits, ids, num_documents);
  Tensor sums = torch::stable::new_zeros(logits, {num_documents, num_experts}, ScalarType::Long);
  const emo::ScoreArgs args{logits.const_data_ptr(),
                            dtype_of(logits),
                            ids,
                            sums.mutable_data_ptr<int64_t>(),
                            num_tokens,
                            num_documents,
                            (int)num_experts,
                            static_cast<emo::Scoring>(scoring)};
  run(
      logits, num_tokens, kTokensPerTask,
      [&](int64_t begin, int64_t end) { emo::cpu::document_scores(args, begin, end); },
      [&](void* stream) { return emo::cuda::document_scores(args, stream); });
  return sums;
}

Tensor select_pool(const Tensor& scores, const Tensor& pool_sizes, int64_t num_forced) {
  STD_TORCH_CHECK(scores.dim() == 2, "scores must be [D, E]; got ", scores.dim(), " dimensions");
  const int64_t num_documents = scores.size(0), num_experts = scores.size(1);
  STD_TORCH_CHECK(num_experts <= emo::kMaxExperts, "scores must have at most ", emo::kMaxExperts,
                  " experts");
  STD_TORCH_CHECK(num_forced >= 0 && num_forced <= num_experts,
                  "num_forced must lie in [0, E]; got ", num_forced);
  Tensor pool = torch::stable::new_empty(scores, {num_documents, num_experts}, ScalarType::Bool);
  const emo::SelectArgs args{
      data_of<int64_t>("scores", scores, ScalarType::Long, num_documents, num_experts, scores),
      data_of<int64_t>("pool_sizes", pool_sizes, ScalarType::Long, num_documents, -1, scores),
      static_cast<uint8_t*>(pool.mutable_data_ptr()),
      num_documents,
      (int)num_experts,
      (int)num_forced};
  run(
      scores, num_documents, kDocumentsPerTask,
      [&](int64_t begin, int64_t end) { emo::cpu::select_pool(args, begin, end); },
      [&](void* stream) { return emo::cuda::select_pool(args, stream); });
  return pool;
}

emo::RoutingArgs routing_args(const Tensor& logits, const std::optional<Tensor>& document_ids,
                              const std::optional<Tensor>& pool,
                              const std::optional<Tensor>& expert_bias, int64_t top_k,
                              int64_t scoring, bool mask_logits, double scaling, int64_t num_groups,
                              int64_t group_topk, int64_t num_documents, bool by_document) {
  check_logits(logits);
  check_scoring(scoring);
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1);
  const int64_t num_pools = pool.has_value() ? pool->size(0) : 0;
  STD_TORCH_CHECK(top_k >= 1 && top_k <= emo::kMaxTopK && top_k <= num_experts,
                  "top_k must lie in [1, ", emo::kMaxTopK, "] and be at most E = ", num_experts,
                  "; got ", top_k);
  STD_TORCH_CHECK(num_groups >= 0 && num_groups <= emo::kMaxGroups, "num_groups must lie in [0, ",
                  emo::kMaxGroups, "]; got ", num_groups);
  if (num_groups > 0) {
    STD_TORCH_CHECK(num_experts % num_groups == 0, "num_groups must divide E = ", num_experts,
                    "; got ", num_groups);
    STD_TORCH_CHECK(group_topk >= 1 && group_topk <= num_groups && group_topk <= top_k &&
                        num_experts / num_groups * group_topk >= top_k,
                    "group_topk groups must hold top_k experts; got ", group_topk);
  }
  STD_TORCH_CHECK(num_documents >= 0 && (by_document || num_documents == 0),
                  "num_documents must not be negative; got ", num_documents);
  STD_TORCH_CHECK(!by_document || document_ids.has_value(), "sums by document need document_ids");
  STD_TORCH_CHECK(num_pools <= 1 || document_ids.has_value(), "several pools need document_ids");
  const int64_t* ids =
      data_of<int64_t>("document_ids", document_ids, ScalarType::Long, num_tokens, -1, logits);
  if (num_pools > 1) check_ids(logits, ids, num_pools);
  if (by_document) check_ids(logits, ids, num_documents);
  return {logits.const_data_ptr(),
          dtype_of(logits),
          ids,
          data_of<uint8_t>("pool", pool, ScalarType::Bool, num_pools, num_experts, logits),
          num_pools,
          data_of<float>("expert_bias", expert_bias, ScalarType::Float, num_experts, -1, logits),
          num_tokens,
          (int)num_experts,
          (int)top_k,
          static_cast<emo::Scoring>(scoring),
          mask_logits,
          (float)scaling,
          (int)num_groups,
          (int)group_topk,
          by_document,
          num_documents};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> pool_topk(
    const Tensor& logits, const std::optional<Tensor>& document_ids,
    const std::optional<Tensor>& pool, const std::optional<Tensor>& expert_bias, int64_t top_k,
    int64_t scoring, bool mask_logits, double scaling, int64_t num_groups, int64_t group_topk,
    int64_t num_documents, bool by_document) {
  const emo::RoutingArgs args =
      routing_args(logits, document_ids, pool, expert_bias, top_k, scoring, mask_logits, scaling,
                   num_groups, group_topk, num_documents, by_document);
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1);
  Tensor probs = torch::stable::empty_like(logits);
  Tensor routing_map =
      torch::stable::new_empty(logits, {num_tokens, num_experts}, ScalarType::Bool);
  // one tensor to fill with zeros; what is returned of it is its beginning
  const int64_t num_counts = num_experts + emo::kNumFacts;
  const int64_t num_score_sums = emo::num_sums(args) * num_experts;
  Tensor sums = torch::stable::new_zeros(logits, {num_counts + num_score_sums}, ScalarType::Long);
  Tensor score_sums =
      torch::stable::new_empty(logits, {emo::num_sums(args), num_experts}, ScalarType::Float);
  Tensor choices = torch::stable::new_zeros(logits, {num_documents, num_experts}, ScalarType::Long);
  Tensor z = torch::stable::new_empty(logits, {num_tokens}, ScalarType::Float);
  const emo::RoutingOutputs out{probs.mutable_data_ptr(),
                                static_cast<uint8_t*>(routing_map.mutable_data_ptr()),
                                sums.mutable_data_ptr<int64_t>(),
                                sums.mutable_data_ptr<int64_t>() + num_counts,
                                score_sums.mutable_data_ptr<float>(),
                                z.mutable_data_ptr<float>(),
                                by_document ? choices.mutable_data_ptr<int64_t>() : nullptr};
  run(
      logits, num_tokens, kTokensPerTask,
      [&](int64_t begin, int64_t end) { emo::cpu::pool_topk(args, out, begin, end); },
      [&](void* stream) { return emo::cuda::pool_topk(args, out, stream); });
  if (is_on_host(logits)) emo::cpu::pool_topk_finish(args, out);
  return {probs,      routing_map, torch::stable::narrow(sums, 0, 0, num_counts),
          score_sums, z,           choices};
}

Tensor pool_topk_backward(const std::optional<Tensor>& grad_probs,
                          const std::optional<Tensor>& grad_score_sums,
                          const std::optional<Tensor>& grad_z, const Tensor& logits,
                          const Tensor& routing_map, const std::optional<Tensor>& document_ids,
                          const std::optional<Tensor>& pool, int64_t top_k, int64_t scoring,
                          bool mask_logits, double scaling, int64_t num_documents,
                          bool by_document) {
  const emo::RoutingArgs args =
      routing_args(logits, document_ids, pool, std::nullopt, top_k, scoring, mask_logits, scaling,
                   0, 0, num_documents, by_document);
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1);
  Tensor grad_logits = torch::stable::empty_like(logits);
  const emo::RoutingGradients grads{
      data_of<void>("grad_probs", grad_probs, logits.scalar_type(), num_tokens, num_experts,
                    logits),
      data_of<float>("grad_score_sums", grad_score_sums, ScalarType::Float, emo::num_sums(args),
                     num_experts, logits),
      data_of<float>("grad_z", grad_z, ScalarType::Float, num_tokens, -1, logits),
      data_of<uint8_t>("routing_map", routing_map, ScalarType::Bool, num_tokens, num_experts,
                       logits),
      grad_logits.mutable_data_ptr()};
  run(
      logits, num_tokens, kTokensPerTask,
      [&](int64_t begin, int64_t end) { emo::cpu::pool_topk_backward(args, grads, begin, end); },
      [&](void* stream) { return emo::cuda::pool_topk_backward(args, grads, stream); });
  return grad_logits;
}

}  // namespace

STABLE_TORCH_LIBRARY(EMO_NAMESPACE, m) {
  m.def(
      "document_scores(Tensor logits, Tensor document_ids, int num_documents, int scoring) -> "
      "Tensor");
  m.def("select_pool(Tensor scores, Tensor pool_sizes, int num_forced) -> Tensor");
  m.def(
      "pool_topk(Tensor logits, Tensor? document_ids, Tensor? pool, Tensor? expert_bias, int "
      "top_k, int scoring, "
      "bool mask_logits, float scaling, int num_groups, int group_topk, int num_documents, "
      "bool by_document) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "pool_topk_backward(Tensor? grad_probs, Tensor? grad_score_sums, Tensor? grad_z, Tensor "
      "logits, "
      "Tensor routing_map, Tensor? document_ids, Tensor? pool, int top_k, int scoring, bool "
      "mask_logits, "
      "float scaling, int num_documents, bool by_document) -> Tensor");
}

#define EMO_IMPLEMENT(key)                                        \
  STABLE_TORCH_LIBRARY_IMPL(EMO_NAMESPACE, key, m) {              \
    m.impl("document_scores", TORCH_BOX(&document_scores));       \
    m.impl("select_pool", TORCH_BOX(&select_pool));               \
    m.impl("pool_topk", TORCH_BOX(&pool_topk));                   \
    m.impl("pool_topk_backward", TORCH_BOX(&pool_topk_backward)); \
  }
EMO_IMPLEMENT(CPU)
#if defined(EMO_WITH_CUDA)
EMO_IMPLEMENT(CUDA)
#endif
