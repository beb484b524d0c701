// The dispatch ops as torch operators. Shapes and meaning: emo_megatron/ops/reference_dispatch.py.
#include <atomic>
#include <vector>

#include "binding.h"
#include "dispatch_ops.h"

using emo::data_of;
using emo::in_parallel;
using emo::is_on_host;
using emo::launch;

namespace {

emo::DType dtype_of(const Tensor& numbers) {
  const std::optional<emo::DType> dtype = emo::float_type(numbers);
  STD_TORCH_CHECK(dtype.has_value(), "rows must be float64, float32, bfloat16 or float16");
  return *dtype;
}

int64_t bytes_of(emo::DType dtype) {
  return dtype == emo::DType::kFloat64 ? 8 : dtype == emo::DType::kFloat32 ? 4 : 2;
}

constexpr int64_t kChunksPerTask = 8;
constexpr int64_t kBytesPerTask = 1 << 18;

int64_t rows_per_task(int64_t row_bytes) {
  return row_bytes < kBytesPerTask ? kBytesPerTask / (row_bytes < 1 ? 1 : row_bytes) : 1;
}

void check_map(const Tensor& routing_map, int64_t num_ranks) {
  STD_TORCH_CHECK(routing_map.dim() == 2, "routing_map must be [T, E]; got ", routing_map.dim(),
                  " dimensions");
  STD_TORCH_CHECK(num_ranks >= 1 && routing_map.size(1) % num_ranks == 0,
                  "experts must divide into ranks of equally many; got ", routing_map.size(1),
                  " experts, ", num_ranks, " ranks");
}

void check_sizes(int64_t num_rows, int64_t num_pairs) {
  STD_TORCH_CHECK(num_rows >= 0 && num_rows <= num_pairs && num_pairs < (int64_t{1} << 32),
                  "there must be at least as many pairs as rows, and less than 2^32; got ",
                  num_rows, " rows, ", num_pairs, " pairs");
}

const uint8_t* flags_of(const Tensor& routing_map) {
  return data_of<uint8_t>("routing_map", routing_map, ScalarType::Bool, routing_map.size(0),
                          routing_map.size(1), routing_map);
}

Tensor new_integers(const Tensor& like, int64_t size) {
  return torch::stable::new_empty(like, {size}, ScalarType::Long);
}

// What the chunks write; without chunks, where nobody does, zeros.
Tensor new_integers(const Tensor& like, int64_t size, bool is_empty,
                    ScalarType type = ScalarType::Long) {
  return is_empty ? torch::stable::new_zeros(like, {size}, type)
                  : torch::stable::new_empty(like, {size}, type);
}

struct NewTable {
  Tensor cells;
  emo::Table table;
};
NewTable new_table(const Tensor& like, int64_t size, int per_chunk, int columns, int group) {
  const int64_t num_chunks = (size + per_chunk - 1) / per_chunk;
  Tensor cells = torch::stable::new_empty(like, {num_chunks + 1, columns}, ScalarType::Long);
  return {cells, {cells.mutable_data_ptr<int64_t>(), num_chunks, columns, group}};
}

Tensor count_sends(const Tensor& routing_map, int64_t num_ranks) {
  check_map(routing_map, num_ranks);
  const int64_t num_tokens = routing_map.size(0), num_experts = routing_map.size(1);
  Tensor counts =
      torch::stable::new_zeros(routing_map, {num_ranks + num_experts}, ScalarType::Long);
  const emo::CountArgs args{flags_of(routing_map), counts.mutable_data_ptr<int64_t>(), num_tokens,
                            (int)num_experts, (int)num_ranks};
  if (is_on_host(routing_map)) {
    in_parallel((num_tokens + emo::kTokensPerChunk - 1) / emo::kTokensPerChunk, kChunksPerTask,
                [&](int64_t begin, int64_t end) { emo::cpu::count_sends(args, begin, end); });
  } else {
    launch(routing_map, [&](void* stream) { return emo::cuda::count_sends(args, stream); });
  }
  return counts;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> plan_send(const Tensor& routing_map,
                                                             int64_t num_ranks, int64_t num_rows,
                                                             int64_t num_pairs) {
  check_map(routing_map, num_ranks);
  check_sizes(num_rows, num_pairs);
  const int64_t num_tokens = routing_map.size(0);
  const bool is_empty = num_tokens == 0;
  Tensor sources = new_integers(routing_map, num_rows, is_empty);
  Tensor copies = new_integers(routing_map, num_rows, is_empty);
  Tensor bounds = new_integers(routing_map, num_tokens + 1, is_empty);
  Tensor places = new_integers(routing_map, num_pairs, is_empty);
  Tensor codes = new_integers(routing_map, num_pairs, is_empty, ScalarType::Int);
  const NewTable made = new_table(routing_map, num_tokens, emo::kTokensPerChunk,
                                  (int)(2 * num_ranks + 1), (int)num_ranks);
  const emo::SendArgs args{flags_of(routing_map),
                           num_tokens,
                           (int)routing_map.size(1),
                           (int)num_ranks,
                           num_rows,
                           num_pairs,
                           made.table,
                           sources.mutable_data_ptr<int64_t>(),
                           copies.mutable_data_ptr<int64_t>(),
                           bounds.mutable_data_ptr<int64_t>(),
                           places.mutable_data_ptr<int64_t>(),
                           codes.mutable_data_ptr<int32_t>()};
  if (is_on_host(routing_map)) {
    const int64_t num_chunks = made.table.num_chunks;
    in_parallel(num_chunks, kChunksPerTask,
                [&](int64_t begin, int64_t end) { emo::cpu::count_chunks(args, begin, end); });
    STD_TORCH_CHECK(emo::cpu::scan(args),
                    "num_rows and num_pairs must be those of count_sends; got ", num_rows, " and ",
                    num_pairs);
    in_parallel(num_chunks, kChunksPerTask,
                [&](int64_t begin, int64_t end) { emo::cpu::plan_send(args, begin, end); });
  } else {
    launch(routing_map, [&](void* stream) { return emo::cuda::plan_send(args, stream); });
  }
  return {sources, copies, bounds, places, codes};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> plan_receive(const Tensor& codes, int64_t num_rows,
                                                        int64_t num_experts) {
  STD_TORCH_CHECK(codes.dim() == 1, "codes must be [P]; got ", codes.dim(), " dimensions");
  STD_TORCH_CHECK(num_experts >= 1 && num_experts <= emo::kMaxExperts, "experts here must be 1 to ",
                  emo::kMaxExperts, "; got ", num_experts);
  const int64_t num_pairs = codes.size(0);
  check_sizes(num_rows, num_pairs);
  const bool is_empty = num_pairs == 0;
  Tensor sources = new_integers(codes, num_pairs, is_empty);
  Tensor copies = new_integers(codes, num_pairs, is_empty);
  Tensor bounds = new_integers(codes, num_rows + 1, is_empty);
  Tensor order = new_integers(codes, num_pairs, is_empty);
  const NewTable made =
      new_table(codes, num_pairs, emo::kPairsPerChunk, (int)num_experts + 1, (int)num_experts);
  const emo::ReceiveArgs args{
      data_of<int32_t>("codes", codes, ScalarType::Int, num_pairs, -1, codes),
      num_rows,
      num_pairs,
      (int)num_experts,
      made.table,
      sources.mutable_data_ptr<int64_t>(),
      copies.mutable_data_ptr<int64_t>(),
      bounds.mutable_data_ptr<int64_t>(),
      order.mutable_data_ptr<int64_t>()};
  if (is_on_host(codes)) {
    const int64_t num_chunks = made.table.num_chunks;
    std::atomic<bool> are_experts{true};
    in_parallel(num_chunks, kChunksPerTask, [&](int64_t begin, int64_t end) {
      if (!emo::cpu::count_chunks(args, begin, end)) are_experts = false;
    });
    STD_TORCH_CHECK(are_experts, "codes must name experts below ", num_experts);
    STD_TORCH_CHECK(emo::cpu::scan(args), "codes must begin ", num_rows,
                    " rows, the first one with the first pair");
    in_parallel(num_chunks, kChunksPerTask,
                [&](int64_t begin, int64_t end) { emo::cpu::plan_receive(args, begin, end); });
  } else {
    launch(codes, [&](void* stream) { return emo::cuda::plan_receive(args, stream); });
  }
  return {sources, copies, bounds, order};
}

// Indices on the host can be looked at; on a GPU that would mean waiting, so kernels leave out
// those beyond.
void check_below([[maybe_unused]] const char* name, const Tensor& where, const int64_t* indices,
                 int64_t size, int64_t limit) {
  if (!is_on_host(where)) return;
  for (int64_t i = 0; i < size; ++i)
    STD_TORCH_CHECK(indices[i] >= 0 && indices[i] < limit, name, " must lie in [0, ", limit,
                    "); got ", indices[i]);
}

// The parts of a Fanout say one thing: every copy is named once, by the row that is its source.
void check_relation(const emo::CopyArgs& args) {
  std::vector<bool> is_named(args.num_copies);
  int64_t num_named = 0;
  for (int64_t n = 0; n < args.num_rows; ++n) {
    for (int64_t j = args.bounds[n]; j < args.bounds[n + 1]; ++j) {
      const int64_t copy = args.order[j];
      STD_TORCH_CHECK(args.sources[copy] == n && !is_named[copy], "copy ", copy, " is of row ",
                      args.sources[copy], ", but order and bounds name it for row ", n);
      is_named[copy] = true;
      ++num_named;
    }
  }
  STD_TORCH_CHECK(num_named == args.num_copies, "order and bounds must name all ", args.num_copies,
                  " copies; they name ", num_named);
}

Tensor copy_rows(const Tensor& rows, const Tensor& sources, const Tensor& order,
                 const Tensor& bounds) {
  STD_TORCH_CHECK(rows.dim() == 2 && rows.is_contiguous(), "rows must be a contiguous [N, H]");
  STD_TORCH_CHECK(sources.dim() == 1, "sources must be [P]; got ", sources.dim(), " dimensions");
  const int64_t num_rows = rows.size(0), num_copies = sources.size(0), width = rows.size(1);
  Tensor copies = torch::stable::new_empty(rows, {num_copies, width});
  const emo::CopyArgs args{
      rows.const_data_ptr(),
      data_of<int64_t>("sources", sources, ScalarType::Long, num_copies, -1, rows),
      data_of<int64_t>("order", order, ScalarType::Long, num_copies, -1, rows),
      data_of<int64_t>("bounds", bounds, ScalarType::Long, num_rows + 1, -1, rows),
      copies.mutable_data_ptr(),
      num_rows,
      num_copies,
      width * bytes_of(dtype_of(rows))};
  check_below("sources", rows, args.sources, num_copies, num_rows);
  check_below("order", rows, args.order, num_copies, num_copies);
  check_below("bounds", rows, args.bounds, num_rows + 1, num_copies + 1);
  if (is_on_host(rows)) {
    check_relation(args);
    const int64_t mean = num_rows > 0 ? num_copies / num_rows + 1 : 1;
    in_parallel(num_rows, rows_per_task(args.row_bytes * mean),
                [&](int64_t begin, int64_t end) { emo::cpu::copy_rows(args, begin, end); });
  } else {
    launch(rows, [&](void* stream) { return emo::cuda::copy_rows(args, stream); });
  }
  return copies;
}

Tensor sum_rows(const Tensor& copies, const Tensor& order, const Tensor& bounds) {
  STD_TORCH_CHECK(copies.dim() == 2 && copies.is_contiguous(),
                  "copies must be a contiguous [P, H]");
  STD_TORCH_CHECK(bounds.dim() == 1 && bounds.size(0) >= 1, "bounds must be [N + 1]");
  const int64_t num_rows = bounds.size(0) - 1, num_copies = copies.size(0);
  Tensor rows = torch::stable::new_empty(copies, {num_rows, copies.size(1)});
  const emo::SumArgs args{
      copies.const_data_ptr(),
      dtype_of(copies),
      data_of<int64_t>("order", order, ScalarType::Long, num_copies, -1, copies),
      data_of<int64_t>("bounds", bounds, ScalarType::Long, num_rows + 1, -1, copies),
      rows.mutable_data_ptr(),
      num_rows,
      num_copies,
      copies.size(1)};
  check_below("order", copies, args.order, num_copies, num_copies);
  check_below("bounds", copies, args.bounds, num_rows + 1, num_copies + 1);
  if (is_on_host(copies)) {
    const int64_t mean = num_rows > 0 ? num_copies / num_rows + 1 : 1;
    in_parallel(num_rows, rows_per_task(args.width * bytes_of(args.dtype) * mean),
                [&](int64_t begin, int64_t end) { emo::cpu::sum_rows(args, begin, end); });
  } else {
    launch(copies, [&](void* stream) { return emo::cuda::sum_rows(args, stream); });
  }
  return rows;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EMO_NAMESPACE, m) {
  m.def("count_sends(Tensor routing_map, int num_ranks) -> Tensor");
  m.def(
      "plan_send(Tensor routing_map, int num_ranks, int num_rows, int num_pairs) -> (Tensor, "
      "Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "plan_receive(Tensor codes, int num_rows, int num_experts) -> (Tensor, Tensor, Tensor, "
      "Tensor)");
  m.def("copy_rows(Tensor rows, Tensor sources, Tensor order, Tensor bounds) -> Tensor");
  m.def("sum_rows(Tensor copies, Tensor order, Tensor bounds) -> Tensor");
}

#define EMO_IMPLEMENT(key)                            \
  STABLE_TORCH_LIBRARY_IMPL(EMO_NAMESPACE, key, m) {  \
    m.impl("count_sends", TORCH_BOX(&count_sends));   \
    m.impl("plan_send", TORCH_BOX(&plan_send));       \
    m.impl("plan_receive", TORCH_BOX(&plan_receive)); \
    m.impl("copy_rows", TORCH_BOX(&copy_rows));       \
    m.impl("sum_rows", TORCH_BOX(&sum_rows));         \
  }
EMO_IMPLEMENT(CPU)
#if defined(EMO_WITH_CUDA)
EMO_IMPLEMENT(CUDA)
#endif
