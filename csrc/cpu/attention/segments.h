// How the tokens of a batch are cut into units of work: sequences (rows of the batch, or packed in
// one), segments and chunks; and which keys are padding.
#pragma once

#include "core/linear_attention.h"
#include "simd.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {

using core::LinearAttentionParams;

constexpr std::int64_t kChunk = 64;            // tokens whose weights are formed at once, at most
constexpr std::int64_t kChunkOfFeatures = 16;  // where features fade apart from each other
constexpr std::int64_t kChunkOfSines = 48;     // where sines encode queries and keys
// A segment is a unit of work. The pages that all heads of its tokens lie in are as many as the
// machine keeps the addresses of.
constexpr std::int64_t kChunksOfSegment = 8;

TORCH_SPE_INLINE std::int64_t chunk_size(const LinearAttentionParams& p) {
  if (p.decay_features > 1) return kChunkOfFeatures;
  return p.q_sines == nullptr ? kChunk : kChunkOfSines;
}
TORCH_SPE_INLINE std::int64_t segment_size(const LinearAttentionParams& p) {
  return kChunksOfSegment * chunk_size(p);
}

struct Chunk {
  std::int64_t batch;  // row of the batch
  std::int64_t head;
  std::int64_t begin;  // position in the row of the batch
  std::int64_t size;
  std::int64_t rest;  // tokens from `begin` to the end of the segment
};

struct Segment {
  std::int64_t row;    // sequence * H + head
  std::int64_t slot;   // number among all segments
  std::int64_t batch;  // row of the batch
  std::int64_t head;
  std::int64_t begin;  // position in the row of the batch
  std::int64_t size;
  bool first, last;         // of its sequence
  std::int64_t chunk_size;  // tokens

  std::int64_t chunks() const { return (size + chunk_size - 1) / chunk_size; }
  Chunk chunk(std::int64_t index) const {
    const std::int64_t rest = size - index * chunk_size;
    return {batch, head, begin + index * chunk_size, min_of(chunk_size, rest), rest};
  }
  // The chunk after another one, of size 0 behind the last.
  Chunk next(const Chunk& chunk) const {
    const std::int64_t rest = chunk.rest - chunk.size;
    return {batch, head, chunk.begin + chunk.size, min_of(chunk_size, rest), rest};
  }
};

// The segments of all sequences and heads: the units in which states are joined, whatever the
// number of threads, so that results do not depend on it. An empty sequence has one empty segment.
class Segments {
 public:
  // Of queries or keys: `length` is N or M.
  Segments(const LinearAttentionParams& p, std::int64_t length)
      : p_(p), length_(length), size_(segment_size(p)), first_(p.num_sequences + 1) {
    first_[0] = 0;
    for (std::int64_t s = 0; s < p.num_sequences; ++s) {
      const std::int64_t count = max_of(1, (size_of(s) + size_ - 1) / size_);
      first_[s + 1] = first_[s] + count;
      longest_ = max_of(longest_, count);
    }
  }

  std::int64_t total() const { return first_[p_.num_sequences] * p_.num_heads; }
  std::int64_t rows() const { return p_.num_sequences * p_.num_heads; }
  std::int64_t count(std::int64_t row) const {
    return first_[row / p_.num_heads + 1] - first_[row / p_.num_heads];
  }
  // Slots of a row follow each other.
  std::int64_t first_slot(std::int64_t row) const {
    return first_[row / p_.num_heads] * p_.num_heads + row % p_.num_heads * count(row);
  }

  Segment of_row(std::int64_t row, std::int64_t index) const {
    const std::int64_t sequence = row / p_.num_heads;
    const std::int64_t offset = index * size_;
    Segment segment;
    segment.row = row;
    segment.slot = first_slot(row) + index;
    segment.batch = p_.cu_seqlens == nullptr ? sequence : 0;
    segment.head = row % p_.num_heads;
    segment.begin = (p_.cu_seqlens == nullptr ? 0 : p_.cu_seqlens[sequence]) + offset;
    segment.size = min_of(size_, size_of(sequence) - offset);
    segment.chunk_size = chunk_size(p_);
    segment.first = index == 0;
    segment.last = index + 1 == count(row);
    return segment;
  }

  // The segments in the order in which their tokens lie in memory, in which threads go through
  // them: the heads of a position share a page, whose address is then found once for all of them.
  Segment in_order(std::int64_t index) const {
    std::int64_t sequence = 0, end = p_.num_sequences;  // in [sequence, end)
    while (end - sequence > 1) {
      const std::int64_t middle = (sequence + end) / 2;
      (first_[middle] * p_.num_heads <= index ? sequence : end) = middle;
    }
    const std::int64_t in_sequence = index - first_[sequence] * p_.num_heads;
    return of_row(sequence * p_.num_heads + in_sequence % p_.num_heads, in_sequence / p_.num_heads);
  }

  // Adjacent heads that a thread that takes whole rows goes through together, segment by segment,
  // for the same reason: the most that leave every thread with as many rows as single ones would.
  std::int64_t rows_of_task() const {
    const std::int64_t threads = p_.num_threads, share = (rows() + threads - 1) / threads;
    // Sequences of different lengths are balanced by smaller tasks.
    const std::int64_t most = p_.cu_seqlens == nullptr ? share : max_of(1, share / 4);
    for (std::int64_t count = min_of(p_.num_heads, most); count > 1; --count) {
      const std::int64_t tasks = rows() / count;
      if (p_.num_heads % count == 0 && (tasks + threads - 1) / threads * count <= share)
        return count;
    }
    return 1;
  }

  // Whether threads that take whole rows would wait for each other longer than the second pass over
  // keys and values costs that lets them share a row.
  bool worth_sharing_rows() const {
    const std::int64_t threads = p_.num_threads;
    const std::int64_t share = (total() + threads - 1) / threads;
    const std::int64_t by_rows =
        min_of((rows() + threads - 1) / threads * longest_, share + longest_);
    return longest_ > 1 && 4 * by_rows > 5 * share;
  }

 private:
  // The bounds of packed sequences are those of the keys; queries are as many, or none.
  std::int64_t size_of(std::int64_t sequence) const {
    return p_.cu_seqlens == nullptr || length_ == 0
               ? length_
               : p_.cu_seqlens[sequence + 1] - p_.cu_seqlens[sequence];
  }

  const LinearAttentionParams& p_;
  std::int64_t length_;
  std::int64_t size_;              // tokens of a segment
  Workspace<std::int64_t> first_;  // [S + 1], segments of a head before each sequence
  std::int64_t longest_ = 1;       // segments of the longest sequence
};

// Whether token t of a chunk of keys is padding.
TORCH_SPE_INLINE bool is_padding(const LinearAttentionParams& p, const Chunk& chunk,
                                 std::int64_t t) {
  return p.key_padding_mask != nullptr &&
         p.key_padding_mask[chunk.batch * p.key_length + chunk.begin + t];
}

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
