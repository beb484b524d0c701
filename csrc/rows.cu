// Copies of rows and sums of copies on a GPU: a warp takes a row and all its copies, sixteen bytes
// a lane where they lie so.
//
// Sums are made in the order given, so results are the same bits whatever the schedule. Copies of
// rows beyond the tensor are zeros, copies beyond it add nothing.
#include "dispatch_ops.h"
#include "warp.cuh"

namespace emo::cuda {
namespace {

// A warp a row, and one at least.
EMO_HOST_DEVICE inline unsigned copy_blocks(const CopyArgs& args) {
  const int64_t num_warps = args.num_rows < 1 ? 1 : args.num_rows;
  return (unsigned)((num_warps + kWarps - 1) / kWarps);
}

// A row is read once and written as often as it has copies.
template <class Unit>
__global__ void __launch_bounds__(kThreads) copy_rows_kernel(CopyArgs args, long long units) {
  const long long n = global_warp();
  const Unit* rows = static_cast<const Unit*>(args.rows);
  Unit* copies = static_cast<Unit*>(args.copies);
  EMO_CHECK_ALIGNED(rows, Unit);
  EMO_CHECK_ALIGNED(copies, Unit);
  if (n < args.num_rows) {
    const long long begin = args.bounds[n] < 0 ? 0 : args.bounds[n];
    const long long end =
        args.bounds[n + 1] > args.num_copies ? args.num_copies : args.bounds[n + 1];
    for (long long i = lane_id(); begin < end && i < units; i += 32) {
      const Unit unit = rows[n * units + i];
      for (long long j = begin; j < end; ++j) {
        const unsigned long long copy = args.order[j];  // negative ones lie beyond too
        if (copy < (unsigned long long)args.num_copies) copies[copy * units + i] = unit;
      }
    }
  }
  // the warps share the copies that no row has
  const long long num_warps = (long long)copy_blocks(args) * kWarps;
  for (long long p = n * 32 + lane_id(); p < args.num_copies; p += num_warps * 32)
    if ((unsigned long long)args.sources[p] >= (unsigned long long)args.num_rows)
      for (long long i = 0; i < units; ++i) copies[p * units + i] = Unit{};
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

bool is_aligned(const void* a, const void* b, uintptr_t bytes) {
  return (reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b)) % bytes == 0;
}

// In units of this type if rows lie so.
template <class Unit>
bool launch_copy(const CopyArgs& args, cudaStream_t stream) {
  if (args.row_bytes % sizeof(Unit) != 0 || !is_aligned(args.rows, args.copies, sizeof(Unit)))
    return false;
  EMO_LAUNCH(copy_rows_kernel<Unit>, copy_blocks(args), kThreads, stream, args,
             args.row_bytes / (int64_t)sizeof(Unit));
  return true;
}

template <class T, class Sum>
void launch_sum(const SumArgs& args, cudaStream_t stream) {
  constexpr int kCount = 16 / sizeof(T);
  const unsigned blocks = blocks_for(args.num_rows, 1);
  if (args.width % kCount == 0 && is_aligned(args.copies, args.rows, 16))
    EMO_LAUNCH((sum_rows_kernel<T, Sum, kCount>), blocks, kThreads, stream, args);
  else
    EMO_LAUNCH((sum_rows_kernel<T, Sum, 1>), blocks, kThreads, stream, args);
}

}  // namespace

int copy_rows(const CopyArgs& args, void* opaque) {
  if (args.num_copies == 0 || args.row_bytes == 0) return 0;
  const cudaStream_t stream = static_cast<cudaStream_t>(opaque);
  if (!launch_copy<uint4>(args, stream) && !launch_copy<uint64_t>(args, stream) &&
      !launch_copy<uint32_t>(args, stream))
    launch_copy<uint16_t>(args, stream);
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
