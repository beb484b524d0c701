// Runs the CUDA kernels of csrc/ on a CPU: the same sources, compiled for the host with
// -DEMO_EMULATE.
//
// Every CUDA thread is a fiber; blocks run one after the other. A fiber that waits at a warp
// collective or a barrier is parked until the last one arrives, so a collective inside a divergent
// branch leaves nobody to run and is reported instead of hanging. Which fiber runs next is random
// (EMO_EMULATOR_SEED), so results that depend on the schedule differ between seeds. It does not see
// data races within one instruction, and it has no timing.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
using cudaStream_t = void*;

namespace emulator {

constexpr int kStackBytes = 1 << 16;
enum Kind { kNone, kShuffle, kBallot, kReduce, kMatch, kSync };

struct Warp {
  uint64_t arriving[32], results[32];
  int num_arrived;
  Kind kind;
};

struct Machine {
  ucontext_t host;
  std::vector<ucontext_t> fibers;
  std::vector<std::vector<char>> stacks;
  std::vector<int> ready;  // fibers that can go on
  std::vector<Warp> warps;
  std::vector<int> at_barrier;
  bool barrier_and, barrier_result;
  int current, num_done, error = 0;
  unsigned block, num_threads;
  std::function<void()> kernel;
  std::mt19937 random;
};
inline Machine& machine() {
  static Machine m;
  return m;
}

inline void fail(const char* why) {
  Machine& m = machine();
  std::fprintf(stderr, "CUDA emulator: %s, block %u, thread %d\n", why, m.block, m.current);
  m.error = 1;
  setcontext(&m.host);
}

// Leave the current fiber for a random one that can go on; back to the host when all are done.
inline void switch_fiber(bool is_done) {
  Machine& m = machine();
  if (m.ready.empty()) {
    if (is_done && m.num_done == (int)m.num_threads) setcontext(&m.host);
    fail("deadlock: a warp collective or a barrier that not all threads reach");
  }
  const size_t pick = m.random() % m.ready.size();
  std::swap(m.ready[pick], m.ready.back());
  const int from = m.current;
  m.current = m.ready.back();
  m.ready.pop_back();
  if (is_done) {
    setcontext(&m.fibers[m.current]);
  } else if (from != m.current) {
    swapcontext(&m.fibers[from], &m.fibers[m.current]);
  }
}

inline void run_fiber() {
  machine().kernel();
  ++machine().num_done;
  switch_fiber(true);
}

// All 32 lanes put in a value; each gets all 32.
inline const uint64_t* exchange(Kind kind, uint64_t value) {
  Machine& m = machine();
  Warp& warp = m.warps[m.current / 32];
  if (warp.num_arrived == 0) warp.kind = kind;
  if (warp.kind != kind) fail("lanes of one warp at different collectives");
  warp.arriving[m.current % 32] = value;
  if (++warp.num_arrived == 32) {
    std::memcpy(warp.results, warp.arriving, sizeof warp.results);
    warp.num_arrived = 0;
    const int first = m.current / 32 * 32;
    for (int lane = 0; lane < 32; ++lane) m.ready.push_back(first + lane);
  }
  switch_fiber(false);
  return warp.results;
}

inline bool barrier(bool value) {
  Machine& m = machine();
  m.barrier_and = m.at_barrier.empty() ? value : m.barrier_and && value;
  m.at_barrier.push_back(m.current);
  if (m.at_barrier.size() == m.num_threads) {
    m.barrier_result = m.barrier_and;
    m.ready.insert(m.ready.end(), m.at_barrier.begin(), m.at_barrier.end());
    m.at_barrier.clear();
  }
  switch_fiber(false);
  return m.barrier_result;
}

inline void launch(unsigned num_blocks, unsigned num_threads, std::function<void()> kernel) {
  Machine& m = machine();
  const char* seed = std::getenv("EMO_EMULATOR_SEED");
  m.random.seed((unsigned)std::atoi(seed != nullptr ? seed : "0"));
  m.num_threads = num_threads;
  m.kernel = kernel;
  m.fibers.resize(num_threads);
  m.stacks.resize(std::max<size_t>(m.stacks.size(), num_threads));
  for (auto& stack : m.stacks) stack.resize(kStackBytes);
  for (m.block = 0; m.block < num_blocks && m.error == 0; ++m.block) {
    m.num_done = 0;
    m.ready.clear();
    m.at_barrier.clear();
    m.warps.assign(num_threads / 32, Warp{});
    for (unsigned i = 0; i < num_threads; ++i) {
      getcontext(&m.fibers[i]);
      m.fibers[i].uc_stack.ss_sp = m.stacks[i].data();
      m.fibers[i].uc_stack.ss_size = kStackBytes;
      m.fibers[i].uc_link = nullptr;
      makecontext(&m.fibers[i], run_fiber, 0);
      m.ready.push_back((int)i);
    }
    volatile bool is_started = false;
    getcontext(&m.host);
    if (!is_started) {
      is_started = true;
      const int first = m.ready[m.random() % num_threads];
      m.ready.erase(std::find(m.ready.begin(), m.ready.end(), first));
      m.current = first;
      setcontext(&m.fibers[first]);
    }
  }
}

struct ThreadIndex {
  struct X {
    operator unsigned() const { return machine().current; }
  } x;
};
struct BlockIndex {
  struct X {
    operator unsigned() const { return machine().block; }
  } x;
};

template <class T>
uint64_t to_bits(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline unsigned lane() { return machine().current % 32; }

}  // namespace emulator

static emulator::ThreadIndex threadIdx;
static emulator::BlockIndex blockIdx;
#define EMO_LAUNCH(kernel, blocks, threads, stream, ...) \
  ((void)(stream), emulator::launch(blocks, threads, [=] { kernel(__VA_ARGS__); }))
#define EMO_CHECK_ALIGNED(pointer, type) \
  if ((uintptr_t)(pointer) % alignof(type) != 0) emulator::fail("a vector that is not aligned")
using cudaError_t = int;
constexpr int cudaErrorInvalidDeviceFunction = 98, cudaErrorUnsupportedPtxVersion = 222;
constexpr int cudaErrorInsufficientDriver = 35, cudaErrorNoDevice = 100,
              cudaErrorNoKernelImageForDevice = 209;
// EMO_EMULATOR_ERROR: the error that CUDA reports
inline int cudaSetDevice(int) {
  const char* error = std::getenv("EMO_EMULATOR_ERROR");
  return error != nullptr ? std::atoi(error) : 0;
}
inline const char* cudaGetErrorString(int error) {
  return error == 1 ? "emulated launch failed" : "emulated error";
}
inline int cudaGetLastError() { return std::exchange(emulator::machine().error, 0); }

inline void __syncthreads() { emulator::barrier(true); }
inline int __syncthreads_and(int predicate) { return emulator::barrier(predicate != 0); }
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulator::from_bits<T>(
      emulator::exchange(emulator::kShuffle, emulator::to_bits(value))[lane & 31]);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::from_bits<T>(
      emulator::exchange(emulator::kShuffle, emulator::to_bits(value))[emulator::lane() ^ mask]);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  const uint64_t* all = emulator::exchange(emulator::kBallot, predicate != 0);
  unsigned set = 0;
  for (int lane = 0; lane < 32; ++lane) set |= (unsigned)all[lane] << lane;
  return set;
}
template <class T>
unsigned __match_any_sync(unsigned, T value) {
  const uint64_t mine = emulator::to_bits(value);
  const uint64_t* all = emulator::exchange(emulator::kMatch, mine);
  unsigned set = 0;
  for (int lane = 0; lane < 32; ++lane) set |= (unsigned)(all[lane] == mine) << lane;
  return set;
}
inline void __syncwarp() { emulator::exchange(emulator::kSync, 0); }
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  const uint64_t* all = emulator::exchange(emulator::kReduce, value);
  return (unsigned)*std::max_element(all, all + 32);
}
inline unsigned __reduce_or_sync(unsigned, unsigned value) {
  const uint64_t* all = emulator::exchange(emulator::kReduce, value);
  return (unsigned)std::accumulate(all, all + 32, uint64_t{0}, std::bit_or<uint64_t>());
}
template <class T>
T atomicOr(T* to, T value) {
  const T before = *to;
  *to = before | value;
  return before;
}
template <class T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to = before + value;
  return before;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz((unsigned)x); }
inline unsigned __float_as_uint(float x) { return (unsigned)emulator::to_bits(x); }
inline float __uint_as_float(unsigned x) { return emulator::from_bits<float>(x); }
inline long long __double2ll_rn(double x) { return llrint(x); }
inline unsigned __float2uint_rn(float x) {
  return x >= 0x1p32f ? 0xffffffffu : x > 0.0f ? (unsigned)llrintf(x) : 0u;
}

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float((unsigned)x.bits << 16); }
inline __nv_bfloat16 __float2bfloat16(float x) {
  const unsigned u = __float_as_uint(x);
  return {(uint16_t)(std::isnan(x) ? 0x7fc0 : (u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
#ifdef __FLT16_MAX__
using __half = _Float16;
inline float __half2float(__half x) { return (float)x; }
inline __half __float2half(float x) { return (__half)x; }
#endif
