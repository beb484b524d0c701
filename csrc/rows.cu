// Copies of rows and sums of copies on a GPU: a warp takes a row, sixteen bytes a lane.
//
// Sums are made in the order given, so results are the same bits whatever the schedule. Indices
// beyond the tensors copy zeros and add nothing.
#include "dispatch_ops.h"
#include "warp.cuh"

namespace emo::cuda {
namespace {

template <class Unit>
__global__ void __launch_bounds__(kThreads) copy_rows_kernel(CopyArgs args, long long units) {
  const long long p = global_warp();
  if (p >= args.num_copies) return;
  const long long source = args.sources[p];
  const bool is_row = source >= 0 && source < args.num_rows;
  const Unit* from = static_cast<const Unit*>(args.rows) + source * units;
  Unit* to = static_cast<Unit*>(args.copies) + p * units;
  EMO_CHECK_ALIGNED(to, Unit);
  EMO_CHECK_ALIGNED(from, Unit);
  for (long long i = lane_id(); i < units; i += 32) to[i] = is_row ? from[i] : Unit{};
}

template <class T, int kCount>
struct alignas(kCount * sizeof(T)) Pack {
  T x[kCount];
};

// A lane adds up kCount neighbouring columns of all copies, in their order, and rounds once.
template <class T, class Sum, int kCount>
__global__ void __launch_bounds__(kThreads) sum_rows_kernel(SumArgs args) {
  using Packed = Pack<T, kCount>;
  const long long n = global_warp();
  if (n >= args.num_rows) return;
  const long long packs = args.width / kCount;
  const Packed* copies = static_cast<const Packed*>(args.copies);
  Packed* row = static_cast<Packed*>(args.rows) + n * packs;
  EMO_CHECK_ALIGNED(row, Packed);
  EMO_CHECK_ALIGNED(copies, Packed);
  const long long begin = args.bounds[n] < 0 ? 0 : args.bounds[n];
  const long long end = args.bounds[n + 1] > args.num_copies ? args.num_copies : args.bounds[n + 1];
  for (long long i = lane_id(); i < packs; i += 32) {
    Sum sums[kCount] = {};
#pragma unroll 2
    for (long long j = begin; j < end; ++j) {
      const unsigned long long copy = args.order[j];
      if (copy >= (unsigned long long)args.num_copies) continue;  // negative ones too
      const Packed pack = copies[copy * packs + i];
#pragma unroll
      for (int c = 0; c < kCount; ++c) sums[c] += to_float(pack.x[c]);
    }
    Packed out;
#pragma unroll
    for (int c = 0; c < kCount; ++c) from_float(sums[c], &out.x[c]);
    row[i] = out;
  }
}

bool is_aligned(const void* a, const void* b) {
  return (reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b)) % 16 == 0;
}

template <class T, class Sum>
void launch_sum(const SumArgs& args, cudaStream_t stream) {
  constexpr int kCount = 16 / sizeof(T);
  const unsigned blocks = blocks_for(args.num_rows, 1);
  if (args.width % kCount == 0 && is_aligned(args.copies, args.rows))
    EMO_LAUNCH((sum_rows_kernel<T, Sum, kCount>), blocks, kThreads, stream, args);
  else
    EMO_LAUNCH((sum_rows_kernel<T, Sum, 1>), blocks, kThreads, stream, args);
}

}  // namespace

int copy_rows(const CopyArgs& args, void* opaque) {
  if (args.num_copies == 0 || args.row_bytes == 0) return 0;
  const cudaStream_t stream = static_cast<cudaStream_t>(opaque);
  const unsigned blocks = blocks_for(args.num_copies, 1);
  if (args.row_bytes % 16 == 0 && is_aligned(args.rows, args.copies))
    EMO_LAUNCH(copy_rows_kernel<uint4>, blocks, kThreads, stream, args, args.row_bytes / 16);
  else
    EMO_LAUNCH(copy_rows_kernel<uint16_t>, blocks, kThreads, stream, args, args.row_bytes / 2);
  return (int)cudaGetLastError();
}

int sum_rows(const SumArgs& args, void* opaque) {
  if (args.num_rows == 0 || args.width == 0) return 0;
  const cudaStream_t stream = static_cast<cudaStream_t>(opaque);
  switch (args.dtype) {
    case DType::kFloat32:
      launch_sum<float, float>(args, stream);
      break;
    case DType::kBFloat16:
      launch_sum<__nv_bfloat16, float>(args, stream);
      break;
    case DType::kFloat16:
      launch_sum<__half, float>(args, stream);
      break;
    case DType::kFloat64:
      launch_sum<double, double>(args, stream);
      break;
  }
  return (int)cudaGetLastError();
}

}  // namespace emo::cuda
