// What the bindings share: checks of tensors, and the choice between CPU and CUDA kernels.
//
// torch operators on the stable ABI of torch 2.11: one library for later ones too, with or without
// CUDA. No CUDA header is included: launchers take the stream as a pointer.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>

#include "pool_ops.h"

#ifndef EMO_NAMESPACE
#define EMO_NAMESPACE emo_megatron
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#if defined(EMO_WITH_CUDA)
// Weak, so that the same library also loads where they are not: only a torch with CUDA has the
// first, only torch from 2.13 on the second, which serves where the first is gone.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);
extern "C" __attribute__((weak)) AOTITorchError torch_stream_native_handle(StreamHandle stream,
                                                                           void** handle);
#endif

namespace emo {

// The data of a tensor of this shape and type that lies beside `like`; null where the tensor is not
// given.
template <class T>
const T* data_of(const char* name, const std::optional<Tensor>& tensor, ScalarType type,
                 int64_t rows, int64_t columns, const Tensor& like) {
  if (!tensor.has_value()) return nullptr;
  const int64_t dims = columns < 0 ? 1 : 2;
  STD_TORCH_CHECK(tensor->scalar_type() == type, name, " has the wrong dtype");
  STD_TORCH_CHECK(
      tensor->dim() == dims && tensor->size(0) == rows && (dims == 1 || tensor->size(1) == columns),
      name, " must have shape [", rows, columns < 0 ? "" : ", ...", "]");
  STD_TORCH_CHECK(tensor->is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(tensor->device() == like.device(), name,
                  " must be on the device of the other tensors");
  return static_cast<const T*>(tensor->const_data_ptr());
}

// The kernels' name of a floating-point type; none where they do not know it.
inline std::optional<DType> float_type(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      return std::nullopt;
  }
}

// Whether the CPU kernels run for such a tensor.
inline bool is_on_host([[maybe_unused]] const Tensor& where) {
#if defined(EMO_EMULATE)
  return false;
#else
  return where.is_cpu();
#endif
}

// Run `on_cpu` over [0, count) in parallel, pieces of at least `grain`.
template <class OnCpu>
void in_parallel(int64_t count, int64_t grain, OnCpu on_cpu) {
  if (count > 0) torch::stable::parallel_for(0, count, grain, on_cpu);
}

#if defined(EMO_WITH_CUDA)
// The current stream of a GPU, as CUDA knows it.
inline void* current_stream(int32_t device) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream != nullptr) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    return stream;
  }
  STD_TORCH_CHECK(torch_stream_native_handle != nullptr, "this build of torch has no CUDA");
  StreamHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_stream(device, &handle));
  const torch::stable::accelerator::Stream owner(handle);
  TORCH_ERROR_CODE_CHECK(torch_stream_native_handle(handle, &stream));
  return stream;
}
#endif

#if defined(EMO_WITH_CUDA) || defined(EMO_EMULATE)
// CUDA reports what went wrong in earlier kernels of others too.
inline void check_status(int status) {
  STD_TORCH_CHECK(status == 0,
                  cuda::is_unsupported(status) ? "the kernels cannot run on this GPU: "
                                               : "a CUDA error came up before this op or in it: ",
                  cuda::error_text(status));
}
#endif

// Launch kernels on the current stream of the tensor's device.
template <class OnCuda>
void launch([[maybe_unused]] const Tensor& where, [[maybe_unused]] OnCuda on_cuda) {
#if defined(EMO_EMULATE)
  const int status = cuda::use_device(0);
  check_status(status != 0 ? status : on_cuda(nullptr));
#elif defined(EMO_WITH_CUDA)
  const torch::stable::accelerator::DeviceGuard guard(where.get_device_index());
  void* stream = current_stream(where.get_device_index());
  const int status = cuda::use_device(where.get_device_index());
  check_status(status != 0 ? status : on_cuda(stream));
#endif
}

// Over [0, count) on a CPU, else by kernels.
template <class OnCpu, class OnCuda>
void run(const Tensor& where, int64_t count, int64_t grain, OnCpu on_cpu, OnCuda on_cuda) {
  if (is_on_host(where)) {
    in_parallel(count, grain, on_cpu);
  } else {
    launch(where, on_cuda);
  }
}

// Ids on the host can be looked at; on a GPU that would mean waiting, so kernels take those beyond
// for padding. `like` has a row a token.
inline void check_ids(const Tensor& like, const int64_t* ids, int64_t num_documents) {
  if (!is_on_host(like) || ids == nullptr) return;
  int64_t largest = -1;
  for (int64_t t = 0; t < like.size(0); ++t) largest = ids[t] > largest ? ids[t] : largest;
  STD_TORCH_CHECK(largest < num_documents, "document_ids must be below the number of documents, ",
                  num_documents, "; got ", largest);
}

}  // namespace emo
