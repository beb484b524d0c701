// Prints a hash of everything the CPU kernels compute for fixed input: equal on every processor and
// register width.
#include <cstdio>
#include <vector>

#include "dispatch_ops.h"
#include "document_ops.h"

static uint64_t state = 1;
static float random_normal() {
  float total = 0.0f;  // of twelve uniforms, exact in float
  for (int i = 0; i < 12; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    total += (float)(state >> 52) * 0x1p-12f;
  }
  return (total - 6.0f) * 2.0f;
}

template <class T>
static void hash(const char* name, const std::vector<T>& values) {
  uint64_t h = 1469598103934665603u;
  const unsigned char* bytes = reinterpret_cast<const unsigned char*>(values.data());
  for (size_t i = 0; i < values.size() * sizeof(T); ++i) h = (h ^ bytes[i]) * 1099511628211u;
  std::printf("%s %016llx\n", name, (unsigned long long)h);
}

int main() {
  using namespace emo;
  for (int num_experts : {5, 127, 128, 200}) {
    const int64_t num_tokens = 300, num_documents = 7;
    const int64_t size = num_tokens * num_experts;
    std::vector<float> logits(size), grad_probs(size), grad_scores(num_experts), grad_z(num_tokens),
        bias(num_experts);
    for (auto* values : {&logits, &grad_probs, &grad_scores, &grad_z, &bias})
      for (float& x : *values) x = random_normal();
    std::vector<int64_t> ids(num_tokens), sizes(num_documents), scores(num_documents * num_experts);
    for (int64_t t = 0; t < num_tokens; ++t)
      ids[t] = t % 11 == 0 ? -1 : t * num_documents / num_tokens;
    for (int64_t d = 0; d < num_documents; ++d) sizes[d] = 3 + d * num_experts / num_documents;
    std::vector<uint8_t> pool(num_documents * num_experts);
    cpu::document_scores({logits.data(), DType::kFloat32, ids.data(), scores.data(), num_tokens,
                          num_documents, num_experts},
                         0, num_tokens);
    cpu::select_pool({scores.data(), sizes.data(), pool.data(), num_documents, num_experts, 0}, 0,
                     num_documents);
    hash("scores", scores);
    hash("pool", pool);
    for (Scoring scoring : {Scoring::kSigmoid, Scoring::kSqrtSoftplus}) {
      std::vector<int64_t> gates(num_documents * num_experts);
      cpu::document_scores({logits.data(), DType::kFloat32, ids.data(), gates.data(), num_tokens,
                            num_documents, num_experts, scoring},
                           0, num_tokens);
      hash("gates", gates);
    }
    for (Scoring scoring : {Scoring::kSoftmaxThenTopK, Scoring::kTopKThenSoftmax, Scoring::kSigmoid,
                            Scoring::kSqrtSoftplus}) {
      const RoutingArgs args{logits.data(),
                             DType::kFloat32,
                             ids.data(),
                             pool.data(),
                             num_documents,
                             has_gates(scoring) ? bias.data() : nullptr,
                             num_tokens,
                             num_experts,
                             3,
                             scoring,
                             true,
                             1.5f};
      std::vector<float> probs(size), score_sums(num_experts), z(num_tokens), grad(size);
      std::vector<uint8_t> map(size);
      std::vector<int64_t> counts(num_experts + kNumFacts), units(num_experts),
          statistics(kNumStatistics);
      std::vector<int32_t> used(num_documents * num_words(num_experts));
      const RoutingOutputs out{probs.data(), map.data(),        counts.data(),
                               units.data(), score_sums.data(), z.data()};
      cpu::pool_topk(args, out, 0, num_tokens);
      cpu::pool_topk_finish(args, out);
      cpu::pool_topk_backward(
          args, {grad_probs.data(), grad_scores.data(), grad_z.data(), map.data(), grad.data()}, 0,
          num_tokens);
      hash("probs", probs);
      hash("map", map);
      hash("counts", counts);
      hash("score sums", score_sums);
      hash("z", z);
      hash("gradient", grad);
      cpu::experts_used(
          {map.data(), ids.data(), used.data(), num_tokens, num_documents, num_experts}, 0,
          num_tokens);
      cpu::document_statistics({scores.data(), pool.data(), used.data(), statistics.data(),
                                num_documents, num_experts, num_words(num_experts)},
                               0, num_documents);
      hash("used", used);
      hash("statistics", statistics);
      if (num_experts % 4 != 0) continue;
      RoutingArgs in_groups = args;
      in_groups.num_groups = 4;
      in_groups.group_topk = 1;
      counts.assign(counts.size(), 0);
      cpu::pool_topk(in_groups, out, 0, num_tokens);
      hash("probs in groups", probs);
      hash("counts in groups", counts);
    }
  }
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64}) {
    const int64_t num_rows = 50, num_copies = 90, width = 133;
    std::vector<uint8_t> copies(num_copies * width * 8), rows(num_rows * width * 8);
    // numbers of any size, some subnormal; no infinities or NaN, whose bits are the machine's
    const int bytes = dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
    for (size_t i = 0; i < copies.size(); ++i) {
      random_normal();
      copies[i] = (uint8_t)(state >> 40) & ((int)(i % bytes) == bytes - 1 ? 0xbf : 0xff);
    }
    std::vector<int64_t> order(num_copies), bounds(num_rows + 1);
    for (int64_t i = 0; i < num_copies; ++i) order[i] = i * 37 % num_copies;
    for (int64_t n = 0; n <= num_rows; ++n) bounds[n] = n * num_copies / num_rows;
    cpu::sum_rows({copies.data(), dtype, order.data(), bounds.data(), rows.data(), num_rows,
                   num_copies, width},
                  0, num_rows);
    hash("sums", rows);
  }
}
