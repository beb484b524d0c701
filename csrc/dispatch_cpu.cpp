// Dispatch on a CPU: chunks of tokens side by side, whole rows of numbers.
#include <algorithm>
#include <numeric>
#include <vector>

#include "dispatch_ops.h"
#include "vectors.h"

namespace emo::cpu {
namespace {

// Calls `visit` with every expert that is set, in order. Eight at a time: few are.
template <class Visit>
EMO_INLINE void each_expert(const uint8_t* flags, int num_experts, Visit visit) {
  int e = 0;
  for (; e + 8 <= num_experts; e += 8) {
    uint64_t word;
    std::memcpy(&word, flags + e, 8);
    while (word != 0) {
      const int byte = __builtin_ctzll(word) / 8;
      visit(e + byte);
      word &= ~(0xffull << (8 * byte));
    }
  }
  for (; e < num_experts; ++e)
    if (flags[e]) visit(e);
}

// Calls `visit` with every token of a range of chunks, and its chunk.
template <class Visit>
EMO_INLINE void each_token(int64_t num_tokens, int64_t begin, int64_t end, Visit visit) {
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t last = std::min((chunk + 1) * kTokensPerChunk, num_tokens);
    for (int64_t t = chunk * kTokensPerChunk; t < last; ++t) visit(chunk, t);
  }
}

// From counts to where each chunk's share of each column begins; returns the columns' totals.
std::vector<int64_t> scan(const Table& table) {
  std::vector<int64_t> totals(table.num_columns);
  for (int64_t chunk = 0; chunk < table.num_chunks; ++chunk) {
    int64_t* line = table.line(chunk);
    for (int c = 0; c < table.num_columns; ++c) {
      const int64_t count = line[c];
      line[c] = totals[c];
      totals[c] += count;
    }
  }
  int64_t before = 0;
  for (int c = 0; c < table.num_columns; ++c) {
    if (c % table.group == 0) before = 0;
    table.offsets()[c] = before;
    before += totals[c];
  }
  return totals;
}

}  // namespace

void count_sends(const CountArgs& args, int64_t begin, int64_t end) {
  const int num_ranks = args.num_ranks, per_rank = args.num_experts / num_ranks;
  std::vector<int64_t> counts(num_ranks + args.num_experts);
  each_token(args.num_tokens, begin, end, [&](int64_t, int64_t t) {
    int last = -1;
    each_expert(args.routing_map + t * args.num_experts, args.num_experts, [&](int e) {
      ++counts[num_ranks + e];
      const int rank = e / per_rank;
      counts[rank] += rank != last;
      last = rank;
    });
  });
  for (size_t i = 0; i < counts.size(); ++i) add_shared(args.counts + i, counts[i]);
}

void count_chunks(const SendArgs& args, int64_t begin, int64_t end) {
  const int num_ranks = args.num_ranks, per_rank = args.num_experts / num_ranks;
  std::fill(args.table.line(begin), args.table.line(end), 0);
  each_token(args.num_tokens, begin, end, [&](int64_t chunk, int64_t t) {
    int64_t* counts = args.table.line(chunk);
    int last = -1;
    each_expert(args.routing_map + t * args.num_experts, args.num_experts, [&](int e) {
      const int rank = e / per_rank;
      ++counts[num_ranks + rank];
      if (rank == last) return;
      last = rank;
      ++counts[rank];
      ++counts[2 * num_ranks];
    });
  });
}

bool scan(const SendArgs& args) {
  const std::vector<int64_t> totals = scan(args.table);
  const auto pairs = totals.begin() + args.num_ranks;
  args.bounds[args.num_tokens] = args.num_rows;
  return totals.back() == args.num_rows &&
         std::accumulate(pairs, pairs + args.num_ranks, int64_t{0}) == args.num_pairs;
}

void plan_send(const SendArgs& args, int64_t begin, int64_t end) {
  const int num_ranks = args.num_ranks, per_rank = args.num_experts / num_ranks;
  const int64_t* offsets = args.table.offsets();
  each_token(args.num_tokens, begin, end, [&](int64_t chunk, int64_t t) {
    // where the next of each bin goes; no other chunk looks at this line
    int64_t* next = args.table.line(chunk);
    args.bounds[t] = next[2 * num_ranks];
    int last = -1;
    each_expert(args.routing_map + t * args.num_experts, args.num_experts, [&](int e) {
      const int rank = e / per_rank;
      const bool is_first = rank != last;
      if (is_first) {
        const int64_t row = offsets[rank] + next[rank]++;
        args.sources[row] = t;
        args.copies[next[2 * num_ranks]++] = row;
        last = rank;
      }
      const int64_t pair = offsets[num_ranks + rank] + next[num_ranks + rank]++;
      args.places[pair] = t * args.num_experts + e;
      args.codes[pair] = (e - rank * per_rank) * 2 + is_first;
    });
  });
}

bool count_chunks(const ReceiveArgs& args, int64_t begin, int64_t end) {
  std::fill(args.table.line(begin), args.table.line(end), 0);
  const int64_t last = std::min(end * kPairsPerChunk, args.num_pairs);
  for (int64_t p = begin * kPairsPerChunk; p < last; ++p) {
    int64_t* counts = args.table.line(p / kPairsPerChunk);
    const int32_t code = args.codes[p];
    if (code < 0 || code >> 1 >= args.num_experts) return false;
    ++counts[code >> 1];
    counts[args.num_experts] += code & 1;
  }
  return true;
}

bool scan(const ReceiveArgs& args) {
  args.bounds[args.num_rows] = args.num_pairs;
  // the first pair begins a row, or it belongs to none
  return scan(args.table).back() == args.num_rows &&
         (args.num_pairs == 0 || (args.codes[0] & 1) != 0);
}

void plan_receive(const ReceiveArgs& args, int64_t begin, int64_t end) {
  const int64_t* offsets = args.table.offsets();
  const int64_t last = std::min(end * kPairsPerChunk, args.num_pairs);
  for (int64_t p = begin * kPairsPerChunk; p < last; ++p) {
    int64_t* next = args.table.line(p / kPairsPerChunk);
    const int32_t expert = args.codes[p] >> 1;
    if (args.codes[p] & 1) args.bounds[next[args.num_experts]++] = p;
    const int64_t place = offsets[expert] + next[expert]++;
    args.sources[place] = next[args.num_experts] - 1;
    args.order[place] = p;
    args.copies[p] = place;
  }
}

void copy_rows(const CopyArgs& args, int64_t begin, int64_t end) {
  const char* rows = static_cast<const char*>(args.rows);
  char* copies = static_cast<char*>(args.copies);
  for (int64_t n = begin; n < end; ++n)
    for (int64_t j = args.bounds[n]; j < args.bounds[n + 1]; ++j)
      std::memcpy(copies + args.order[j] * args.row_bytes, rows + n * args.row_bytes,
                  args.row_bytes);
}

namespace {

EMO_INLINE float widen(float x, DType) { return x; }
EMO_INLINE double widen(double x, DType) { return x; }
EMO_INLINE float widen(uint16_t x, DType dtype) {
  return dtype == DType::kBFloat16 ? bf16_to_float(x) : fp16_to_float(x);
}
EMO_INLINE void narrow(float x, DType, float* to) { *to = x; }
EMO_INLINE void narrow(double x, DType, double* to) { *to = x; }
EMO_INLINE void narrow(float x, DType dtype, uint16_t* to) {
  *to = dtype == DType::kBFloat16 ? float_to_bf16(x) : float_to_fp16(x);
}

// Added up in `Sum` in the order given, rounded once. A stretch of columns at a time, so that the
// sums stay in registers or the nearest cache while the copies go by.
template <class Element, class Sum, DType dtype>
EMO_INLINE void sum_range(const SumArgs& args, int64_t begin, int64_t end) {
  constexpr int kStretch = 128;
  const Element* copies = static_cast<const Element*>(args.copies);
  Element* rows = static_cast<Element*>(args.rows);
  for (int64_t n = begin; n < end; ++n) {
    for (int64_t from = 0; from < args.width; from += kStretch) {
      const int length = (int)std::min<int64_t>(kStretch, args.width - from);
      Sum sums[kStretch] = {};
      for (int64_t i = args.bounds[n]; i < args.bounds[n + 1]; ++i) {
        const Element* copy = copies + args.order[i] * args.width + from;
        if (length == kStretch) {
          for (int h = 0; h < kStretch; ++h) sums[h] += widen(copy[h], dtype);
        } else {
          for (int h = 0; h < length; ++h) sums[h] += widen(copy[h], dtype);
        }
      }
      Element* row = rows + n * args.width + from;
      for (int h = 0; h < length; ++h) narrow(sums[h], dtype, row + h);
    }
  }
}

}  // namespace

EMO_CLONES void sum_rows(const SumArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case DType::kFloat32:
      return sum_range<float, float, DType::kFloat32>(args, begin, end);
    case DType::kBFloat16:
      return sum_range<uint16_t, float, DType::kBFloat16>(args, begin, end);
    case DType::kFloat16:
      return sum_range<uint16_t, float, DType::kFloat16>(args, begin, end);
    case DType::kFloat64:
      return sum_range<double, double, DType::kFloat64>(args, begin, end);
  }
}

}  // namespace emo::cpu
