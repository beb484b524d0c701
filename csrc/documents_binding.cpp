// What documents drew and used, as torch operators. Shapes and meaning: experts_used and
// document_statistics in emo_megatron/ops/reference.py, draw_bits in emo_megatron/ops/sizes.py.
#include "binding.h"
#include "document_ops.h"

using emo::data_of;
using emo::run;

namespace {

constexpr int64_t kTokensPerTask = 1024;
constexpr int64_t kDocumentsPerTask = 32;
constexpr int64_t kDrawsPerTask = 4096;

Tensor experts_used(const Tensor& routing_map, const Tensor& document_ids, int64_t num_documents) {
  STD_TORCH_CHECK(routing_map.dim() == 2, "routing_map must be [T, E]; got ", routing_map.dim(),
                  " dimensions");
  const int64_t num_tokens = routing_map.size(0), num_experts = routing_map.size(1);
  STD_TORCH_CHECK(num_experts >= 1 && num_experts <= emo::kMaxExperts,
                  "routing_map must have 1 to ", emo::kMaxExperts, " experts; got ", num_experts);
  STD_TORCH_CHECK(num_documents >= 0, "num_documents must not be negative; got ", num_documents);
  const int64_t* ids =
      data_of<int64_t>("document_ids", document_ids, ScalarType::Long, num_tokens, -1, routing_map);
  emo::check_ids(routing_map, ids, num_documents);
  Tensor used = torch::stable::new_zeros(
      routing_map, {num_documents, emo::num_words((int)num_experts)}, ScalarType::Int);
  const emo::UsedArgs args{data_of<uint8_t>("routing_map", routing_map, ScalarType::Bool,
                                            num_tokens, num_experts, routing_map),
                           ids,
                           used.mutable_data_ptr<int32_t>(),
                           num_tokens,
                           num_documents,
                           (int)num_experts};
  run(
      routing_map, num_tokens, kTokensPerTask,
      [&](int64_t begin, int64_t end) { emo::cpu::experts_used(args, begin, end); },
      [&](void* stream) { return emo::cuda::experts_used(args, stream); });
  return used;
}

Tensor document_statistics(const std::optional<Tensor>& scores, const std::optional<Tensor>& pool,
                           const std::optional<Tensor>& used) {
  STD_TORCH_CHECK(
      (scores.has_value() || used.has_value()) && (scores.has_value() || !pool.has_value()),
      "document_statistics needs scores or used; pool needs scores");
  const Tensor& like = scores.has_value() ? *scores : *used;
  STD_TORCH_CHECK(like.dim() == 2, "scores and used must be [D, ...]; got ", like.dim(),
                  " dimensions");
  const int64_t num_documents = like.size(0);
  const int64_t num_experts = scores.has_value() ? scores->size(1) : 0;
  const int64_t num_words = used.has_value() && used->dim() == 2 ? used->size(1) : 0;
  Tensor sums = torch::stable::new_zeros(like, {emo::kNumStatistics}, ScalarType::Long);
  const emo::StatisticsArgs args{
      data_of<int64_t>("scores", scores, ScalarType::Long, num_documents, num_experts, like),
      data_of<uint8_t>("pool", pool, ScalarType::Bool, num_documents, num_experts, like),
      data_of<int32_t>("used", used, ScalarType::Int, num_documents, num_words, like),
      sums.mutable_data_ptr<int64_t>(),
      num_documents,
      (int)num_experts,
      (int)num_words};
  run(
      like, num_documents, kDocumentsPerTask,
      [&](int64_t begin, int64_t end) { emo::cpu::document_statistics(args, begin, end); },
      [&](void* stream) { return emo::cuda::document_statistics(args, stream); });
  return sums;
}

Tensor draw_bits(const Tensor& positions, const Tensor& offsets,
                 const std::optional<Tensor>& layers, int64_t first_layer, int64_t num_layers,
                 int64_t start) {
  STD_TORCH_CHECK(positions.dim() == 1, "positions must be [D]; got ", positions.dim(),
                  " dimensions");
  STD_TORCH_CHECK(num_layers >= 0, "num_layers must not be negative; got ", num_layers);
  const int64_t num_documents = positions.size(0);
  const int64_t count = layers.has_value() ? layers->size(0) : num_layers;
  Tensor bits = torch::stable::new_empty(positions, {count, num_documents});
  const emo::DrawArgs args{
      data_of<int64_t>("positions", positions, ScalarType::Long, num_documents, -1, positions),
      data_of<int64_t>("offsets", offsets, ScalarType::Long, num_documents, -1, positions),
      data_of<int64_t>("layers", layers, ScalarType::Long, count, -1, positions),
      bits.mutable_data_ptr<int64_t>(),
      first_layer,
      count,
      num_documents,
      start};
  run(
      positions, count * num_documents, kDrawsPerTask,
      [&](int64_t begin, int64_t end) { emo::cpu::draw_bits(args, begin, end); },
      [&](void* stream) { return emo::cuda::draw_bits(args, stream); });
  return bits;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EMO_NAMESPACE, m) {
  m.def("experts_used(Tensor routing_map, Tensor document_ids, int num_documents) -> Tensor");
  m.def("document_statistics(Tensor? scores, Tensor? pool, Tensor? used) -> Tensor");
  m.def(
      "draw_bits(Tensor positions, Tensor offsets, Tensor? layers, int first_layer, int "
      "num_layers, int start) -> Tensor");
}

#define EMO_IMPLEMENT(key)                                          \
  STABLE_TORCH_LIBRARY_IMPL(EMO_NAMESPACE, key, m) {                \
    m.impl("experts_used", TORCH_BOX(&experts_used));               \
    m.impl("document_statistics", TORCH_BOX(&document_statistics)); \
    m.impl("draw_bits", TORCH_BOX(&draw_bits));                     \
  }
EMO_IMPLEMENT(CPU)
#if defined(EMO_WITH_CUDA)
EMO_IMPLEMENT(CUDA)
#endif
