// The dispatch ops between the binding and the kernels, as pool_ops.h is for routing.
//
// T tokens here, E experts, R ranks of E / R experts each, H hidden size. A row is a token on its
// way to one rank, N of them in the order of (rank, token); a pair is a row and one of its experts
// there, P of them in the order of (rank, token, expert). Semantics are those of
// emo_megatron/ops/reference_dispatch.py.
//
// Nothing is sorted. Tokens (or pairs) are cut into chunks; a table has a line a chunk and a column
// a bin. The chunks count, each column is summed up over the chunks, columns are summed up within
// their group, and the chunks go through their tokens again: what a bin holds begins at the
// column's offset plus what earlier chunks put there. The last line of the table holds the offsets.
#pragma once
#include "pool_ops.h"

namespace emo {

constexpr int kTokensPerChunk = 32;
constexpr int kPairsPerChunk = 512;

struct Table {
  int64_t* cells;  // [num_chunks + 1, num_columns]
  int64_t num_chunks;
  int num_columns;
  int group;  // columns in a group; the last group may be shorter

  EMO_HOST_DEVICE int64_t* line(int64_t chunk) const { return cells + chunk * num_columns; }
  EMO_HOST_DEVICE int64_t* offsets() const { return line(num_chunks); }
};

struct CountArgs {
  const uint8_t* routing_map;  // [T, E]
  int64_t* counts;             // [R + E] zeroed by the caller: rows a rank, then pairs an expert
  int64_t num_tokens;
  int num_experts;
  int num_ranks;
};

struct SendArgs {
  const uint8_t* routing_map;  // [T, E]
  int64_t num_tokens;
  int num_experts;
  int num_ranks;
  int64_t num_rows;
  int64_t num_pairs;
  Table table;  // columns: rows of each rank, pairs of each rank, rows of all; groups of R
  // If there are fewer rows or pairs than the caller said, -1 in sources and copies and 0 in places
  // and codes beyond them. Tokens to rows, a Fanout:
  int64_t* sources;  // [N] the token of each row
  int64_t* copies;   // [N] the rows of token 0, then those of token 1, ...
  int64_t* bounds;   // [T + 1] where those of each token begin
  int64_t* places;   // [P] the place of each pair in the flattened routing map
  int32_t* codes;    // [P] its expert on that rank, times two, plus one where a row begins
};

struct ReceiveArgs {
  const int32_t* codes;  // [P]
  int64_t num_rows;
  int64_t num_pairs;
  int num_experts;  // here
  Table table;      // columns: pairs of each expert, rows of all; one group of experts
  // rows to pairs in the order of (expert, row), a Fanout:
  int64_t* sources;  // [P] the row of each
  int64_t* copies;   // [P] where each pair, as received, is in that order
  int64_t* bounds;   // [N + 1] where the pairs of each row begin, as received
  int64_t* order;    // [P] for each place in that order the pair as received
};

struct CopyArgs {
  const void* rows;        // [N, H]
  const int64_t* sources;  // [P], each in [0, N): the parts of a Fanout
  const int64_t* order;    // [P] the copies of row 0, then those of row 1, ...
  const int64_t* bounds;   // [N + 1]
  void* copies;            // [P, H]
  int64_t num_rows;
  int64_t num_copies;
  int64_t row_bytes;
};

struct SumArgs {
  const void* copies;  // [P, H] of dtype
  DType dtype;
  const int64_t* order;   // [P] copies_P of a Fanout: the copies of row 0, then those of row 1, ...
  const int64_t* bounds;  // [N + 1]
  void* rows;             // [N, H]
  int64_t num_rows;
  int64_t num_copies;
  int64_t width;  // H
};

namespace cpu {
// Ranges are of chunks (count, send, receive), copies or rows, and may run beside each other.
void count_sends(const CountArgs& args, int64_t begin, int64_t end);
void count_chunks(const SendArgs& args, int64_t begin, int64_t end);
void plan_send(const SendArgs& args, int64_t begin, int64_t end);
// false: a code names an expert that is not there
bool count_chunks(const ReceiveArgs& args, int64_t begin, int64_t end);
void plan_receive(const ReceiveArgs& args, int64_t begin, int64_t end);
// Between counting and planning; false: there are not as many rows or pairs as the caller said.
bool scan(const SendArgs& args);
bool scan(const ReceiveArgs& args);
void copy_rows(const CopyArgs& args, int64_t begin, int64_t end);
void sum_rows(const SumArgs& args, int64_t begin, int64_t end);
}  // namespace cpu

namespace cuda {
int count_sends(const CountArgs& args, void* stream);
int plan_send(const SendArgs& args, void* stream);
int plan_receive(const ReceiveArgs& args, void* stream);
int copy_rows(const CopyArgs& args, void* stream);
int sum_rows(const SumArgs& args, void* stream);
}  // namespace cuda

}  // namespace emo
