// Sixteen lanes at a time, on any CPU: GCC's and Clang's vector types, which become AVX-512, AVX2,
// SSE or NEON registers.
//
// Every operation is a single IEEE operation in a fixed order (no fused multiply-add, no
// reassociation), so results are the same bits whatever the width of the registers. Rows are padded
// to whole blocks of sixteen experts.
#pragma once
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "pool_ops.h"

#define EMO_INLINE inline __attribute__((always_inline))
// Compiled for three levels of x86-64, the best of which is picked when the library loads.
#if !defined(EMO_CLONES) && defined(__x86_64__) && defined(__linux__)
#define EMO_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif !defined(EMO_CLONES)
#define EMO_CLONES
#endif

namespace emo::cpu {

constexpr int kLanes = 16;
constexpr int kMaxBlocks = kMaxExperts / kLanes;

// Keys of experts that may be chosen lie above both.
constexpr int32_t kBeyond = INT_MIN;  // a lane past the last expert: never chosen
constexpr int32_t kExcluded =
    INT_MIN + 1;  // not to be chosen: only if there are fewer than K that may be

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));

union Row {
  Floats floats[kMaxBlocks];
  Ints ints[kMaxBlocks];
  float f[kMaxExperts];
  int32_t i[kMaxExperts];
};

static EMO_INLINE int num_blocks(int num_experts) { return (num_experts + kLanes - 1) / kLanes; }

static EMO_INLINE Floats splat(float value) { return Floats{} + value; }
static EMO_INLINE Ints splat(int32_t value) { return Ints{} + value; }
static EMO_INLINE Floats max(Floats a, Floats b) { return a > b ? a : b; }
static EMO_INLINE Ints max(Ints a, Ints b) { return a > b ? a : b; }
static EMO_INLINE Ints min(Ints a, Ints b) { return a < b ? a : b; }
static EMO_INLINE Floats where(Ints condition, Floats a, Floats b) { return condition ? a : b; }
static EMO_INLINE Ints where(Ints condition, Ints a, Ints b) { return condition ? a : b; }
static EMO_INLINE Ints bits(Floats a) { return (Ints)a; }

// Halve, halve, halve, halve: one order of the additions on every machine.
template <class Vector, class Combine>
static EMO_INLINE auto reduce(Vector v, Combine combine) {
  auto a = combine(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
                   __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
  auto b =
      combine(__builtin_shufflevector(a, a, 0, 1, 2, 3), __builtin_shufflevector(a, a, 4, 5, 6, 7));
  auto c = combine(__builtin_shufflevector(b, b, 0, 1), __builtin_shufflevector(b, b, 2, 3));
  return combine(c, __builtin_shufflevector(c, c, 1, 0))[0];
}
static EMO_INLINE float sum(Floats v) {
  return reduce(v, [](auto a, auto b) { return a + b; });
}
static EMO_INLINE int32_t sum(Ints v) {
  return reduce(v, [](auto a, auto b) { return a + b; });
}
static EMO_INLINE float largest(Floats v) {
  return reduce(v, [](auto a, auto b) { return a > b ? a : b; });
}
static EMO_INLINE int32_t largest(Ints v) {
  return reduce(v, [](auto a, auto b) { return a > b ? a : b; });
}

// e^x for x <= 0 to 2e-7 relative (the Cephes polynomial on [-ln 2 / 2, ln 2 / 2]); below 2^-126 it
// is 0, NaN stays NaN.
static EMO_INLINE Floats exp_nonpositive(Floats x) {
  const Ints is_tiny = x < -87.33f;
  x = where(is_tiny, splat(-87.33f), x);
  const Ints n = __builtin_convertvector(x * 1.44269504088896341f - 0.5f, Ints);
  const Floats n_f = __builtin_convertvector(n, Floats);
  const Floats r = (x - n_f * 0.693359375f) - n_f * -2.12194440e-4f;
  Floats poly = r * 1.9875691500e-4f + 1.3981999507e-3f;
  poly = poly * r + 8.3334519073e-3f;
  poly = poly * r + 4.1665795894e-2f;
  poly = poly * r + 1.6666665459e-1f;
  poly = poly * r + 5.0000001201e-1f;
  poly = poly * (r * r) + r + 1.0f;
  return where(is_tiny, splat(0.0f), poly * (Floats)((n << 23) + 0x3f800000));
}

// log(1 + t) for t in [0, 1] to 2e-7 absolute (the Cephes polynomial on [sqrt(1/2), sqrt(2)]).
static EMO_INLINE Floats log1p_unit(Floats t) {
  const Ints is_upper = t > 0.41421356f;
  // (1 + t) / 2 - 1, exact in either form
  const Floats z = where(is_upper, (t - 1.0f) * 0.5f, t);
  Floats poly = z * 7.0376836292e-2f - 1.1514610310e-1f;
  poly = poly * z + 1.1676998740e-1f;
  poly = poly * z - 1.2420140846e-1f;
  poly = poly * z + 1.4249322787e-1f;
  poly = poly * z - 1.6668057665e-1f;
  poly = poly * z + 2.0000714765e-1f;
  poly = poly * z - 2.4999993993e-1f;
  poly = poly * z + 3.3333331174e-1f;
  const Floats z2 = z * z;
  const Floats log = poly * z * z2 - z2 * 0.5f + z;
  return log + where(is_upper, splat(0.69314718056f), splat(0.0f));
}

// log x for positive x to 2e-7 absolute; no C library's own, so the same bits with each. Infinity
// and NaN stay.
static EMO_INLINE float log_of_sum(float x) {
  if (!(x < INFINITY)) return x;
  int exponent;
  const float mantissa = 2.0f * std::frexp(x, &exponent);  // in [1, 2)
  const float log = log1p_unit(splat(mantissa - 1.0f))[0];
  return (float)(exponent - 1) * 0.69314718056f + log;
}

// log x for positive normal x, to 2e-7 absolute and the last bit.
static EMO_INLINE Floats log_positive(Floats x) {
  const Ints i = bits(x);
  const Floats exponent = __builtin_convertvector((i >> 23) - 127, Floats);
  const Floats mantissa = (Floats)((i & 0x7fffff) | 0x3f800000);  // in [1, 2)
  return exponent * 0.69314718056f + log1p_unit(mantissa - 1.0f);
}

static EMO_INLINE Floats square_root(Floats x) {
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = std::sqrt(x[lane]);
  return x;
}

static EMO_INLINE Floats sigmoid(Floats x) {
  const Floats t = exp_nonpositive(where(x > 0.0f, -x, x));
  return where(x >= 0.0f, splat(1.0f), t) / (1.0f + t);
}

// Far below zero softplus is e^x, whose root is taken in the exponent: it is 0 later by half.
constexpr float kFarBelow = -20.0f;
static EMO_INLINE Floats sqrt_softplus(Floats x) {
  const Floats root = exp_nonpositive(where(x > 0.0f, -x, x) * 0.5f);  // of e^-|x|
  const Floats softplus = where(x > 0.0f, x, splat(0.0f)) + log1p_unit(root * root);
  return where(x < kFarBelow, root, square_root(softplus));
}

// NaN or +inf: -1, other numbers and -inf: 0.
static EMO_INLINE Ints is_nan_or_inf(Floats x) { return ~(Ints)(x < INFINITY); }

// Integers in the order of the floats, so that -inf and ties compare exactly and NaN is the
// largest; -0 equals 0.
static EMO_INLINE Ints order_keys(Floats x) {
  const Ints i = bits(x + 0.0f);
  return i ^ ((i >> 31) & INT_MAX);
}
static EMO_INLINE Floats keys_to_floats(Ints keys) {
  return (Floats)(keys ^ ((keys >> 31) & INT_MAX));
}
static EMO_INLINE float key_to_float(int32_t key) {
  const int32_t i = key ^ ((key >> 31) & INT_MAX);
  float x;
  std::memcpy(&x, &i, sizeof x);
  return x;
}

static EMO_INLINE float bf16_to_float(uint16_t h) {
  const uint32_t u = (uint32_t)h << 16;
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}
static EMO_INLINE uint16_t float_to_bf16(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return (uint16_t)((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}
static EMO_INLINE float fp16_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7fff;
  // shifted into place, the exponent is too small by 112; multiplying repairs subnormals too
  const uint32_t shifted = magnitude << 13;
  float x;
  std::memcpy(&x, &shifted, sizeof x);
  x *= 0x1p112f;
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  u = (magnitude >= 0x7c00 ? (u | 0x7f800000) : u) | sign;
  std::memcpy(&x, &u, sizeof x);
  return x;
}
static EMO_INLINE uint16_t float_to_fp16(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  const uint32_t sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  // a number this much larger than a subnormal rounds it to the right bit
  float subnormal;
  std::memcpy(&subnormal, &magnitude, sizeof subnormal);
  subnormal += 0.5f;
  uint32_t low;
  std::memcpy(&low, &subnormal, sizeof low);
  const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  uint32_t h = magnitude < 0x38800000 ? low - 0x3f000000 : normal;
  h = magnitude >= 0x477ff000 ? 0x7c00 : h;
  h = magnitude > 0x7f800000 ? 0x7e00 : h;
  return (uint16_t)(h | sign);
}

// For sums that threads share.
static EMO_INLINE void add_shared(int64_t* to, int64_t value) {
  __atomic_fetch_add(to, value, __ATOMIC_RELAXED);
}

// Read a row of E numbers; lanes past E become `fill`.
static EMO_INLINE void load_row(const void* data, DType dtype, int64_t row, int num_experts,
                                float fill, Row& out) {
  const int64_t start = row * num_experts;
  for (int e = num_experts; e < num_blocks(num_experts) * kLanes; ++e) out.f[e] = fill;
  if (dtype == DType::kFloat32) {
    std::memcpy(out.f, static_cast<const float*>(data) + start, num_experts * sizeof(float));
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(data) + start;
    if (dtype == DType::kBFloat16) {
      for (int e = 0; e < num_experts; ++e) out.f[e] = bf16_to_float(from[e]);
    } else {
      for (int e = 0; e < num_experts; ++e) out.f[e] = fp16_to_float(from[e]);
    }
  }
}

static EMO_INLINE void store_row(const Row& in, DType dtype, int64_t row, int num_experts,
                                 void* data) {
  const int64_t start = row * num_experts;
  if (dtype == DType::kFloat32) {
    std::memcpy(static_cast<float*>(data) + start, in.f, num_experts * sizeof(float));
  } else {
    uint16_t* to = static_cast<uint16_t*>(data) + start;
    if (dtype == DType::kBFloat16) {
      for (int e = 0; e < num_experts; ++e) to[e] = float_to_bf16(in.f[e]);
    } else {
      for (int e = 0; e < num_experts; ++e) to[e] = float_to_fp16(in.f[e]);
    }
  }
}

}  // namespace emo::cpu
