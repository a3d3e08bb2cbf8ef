// Queries or keys that exact sines encode on their way into a tile: encoded rows, several times as
// long, are in memory for a chunk at a time, and so are their gradients.
#pragma once

#include "cpu/encode/sine_features_tile.h"
#include "cpu/prefetch.h"
#include "segments.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {

using core::SineFeaturesBackwardParams;
using core::SineFeaturesParams;

static_assert(kChunkOfSines == kPhasorChunk, "a chunk is a tile of the encoder");

// An object that may be there. Where it is not, the arguments it would be made of, which may be
// null, are not touched.
template <class U>
class Maybe {
 public:
  template <class... Arguments>
  explicit Maybe(bool is_there, const Arguments&... arguments)
      : data_(is_there ? new U(arguments...) : nullptr) {}
  ~Maybe() { delete data_; }
  Maybe(const Maybe&) = delete;
  Maybe& operator=(const Maybe&) = delete;
  U* get() const { return data_; }

 private:
  U* const data_;
};

// The parameters of one head.
template <class T>
SineFeaturesParams one_head(const SineFeaturesParams& all, std::int64_t head) {
  const std::int64_t features = head * all.in_features, sines = features * all.num_sines;
  SineFeaturesParams one = all;
  one.num_heads = 1;
  one.freqs += sines;
  one.offsets += sines;
  one.amplitudes = static_cast<const T*>(all.amplitudes) + sines;
  if (all.constant != nullptr) one.constant = static_cast<const T*>(all.constant) + features;
  return one;
}

// What encodes q or k in one thread, at consecutive positions.
template <class Storage>
class EncodedRows {
 public:
  using T = core::accumulate_t<Storage>;

  explicit EncodedRows(const SineFeaturesParams* all)
      : all_(*all), of_head_(one_head<T>(*all, 0)), phasors_(of_head_) {}

  void go_to_head(std::int64_t head) {
    if (head == head_) return;
    head_ = head;
    of_head_ = one_head<T>(all_, head);
    phasors_.load();
  }
  SineFeaturesPhasors<T>& phasors() { return phasors_; }

  TileView<const Storage> rows_of(const Chunk& chunk) const {
    return strided_tile<Storage>(all_.x, all_.x_strides, chunk.batch, chunk.begin, chunk.head);
  }
  static SineFeaturesTile tile_of(const Chunk& chunk) { return {chunk.begin, chunk.size, 1, 0, 1}; }

  // The encoded rows of a chunk, `ld` apart.
  void encode(const Chunk& chunk, T* out, std::int64_t ld) {
    const TileView<const Storage> x = rows_of(chunk);
    for (std::int64_t t = 0; t < chunk.size; ++t)
      prefetch_near(x.row(0, t, 0), x.column_stride, all_.in_features);
    go_to_head(chunk.head);
    encode_sine_features_tile(phasors_, tile_of(chunk), x, TileView<T>{out, 0, ld, 0, 1});
  }

 private:
  const SineFeaturesParams& all_;
  SineFeaturesParams of_head_;
  std::int64_t head_ = 0;
  SineFeaturesPhasors<T> phasors_;  // of the head
};

// The gradients of an encoder's parameters: the sums of each segment, added up in their order, so
// that results do not depend on the number of threads.
class EncoderSums {
 public:
  EncoderSums(const SineFeaturesBackwardParams* p, std::int64_t segment_size, std::int64_t width)
      : p_(*p),
        of_head_(*p),
        segment_size_(segment_size),
        segments_((p->length + segment_size - 1) / segment_size),
        width_(width),
        size_(SineFeaturesSums::size(*p, width) / p->num_heads),
        sums_(p->batch * p->num_heads * segments_ * size_) {
    of_head_.num_heads = 1;
    for (std::int64_t i = 0; i < p->batch * p->num_heads * segments_ * size_; ++i) sums_[i] = 0;
  }

  SineFeaturesSums of(const Chunk& chunk) const {
    return {of_head_, width_,
            of_row(chunk.batch, chunk.head) + chunk.begin / segment_size_ * size_};
  }

  void store() const {
    Workspace<double> total(size_);
    for (std::int64_t head = 0; head < p_.num_heads; ++head) {
      for (std::int64_t i = 0; i < size_; ++i) total[i] = 0;
      for (std::int64_t b = 0; b < p_.batch; ++b) {
        const double* of_segment = of_row(b, head);
        for (std::int64_t s = 0; s < segments_; ++s, of_segment += size_) {
          for (std::int64_t i = 0; i < size_; ++i) total[i] += of_segment[i];
        }
      }
      store_gradients(p_, head, 1, width_, SineFeaturesSums(of_head_, width_, total));
    }
  }

 private:
  double* of_row(std::int64_t b, std::int64_t head) const {
    return sums_ + (b * p_.num_heads + head) * segments_ * size_;
  }

  const SineFeaturesBackwardParams& p_;
  SineFeaturesParams of_head_;
  const std::int64_t segment_size_, segments_;  // tokens of a segment, and segments of a row
  const std::int64_t width_, size_;             // D, filled up, and the sums of a segment
  Workspace<double> sums_;                      // [B, H, segments, size]
};

// The way back, in one thread: of rows' gradients those of x and of the parameters.
template <class Storage>
class EncodedGradients {
 public:
  using T = core::accumulate_t<Storage>;

  EncodedGradients(EncodedRows<Storage>* rows, const SineFeaturesBackwardParams* p,
                   const EncoderSums* sums)
      : p_(*p), rows_(*rows), sums_(*sums), gradient_(rows->phasors()) {}

  // Of the gradients of a chunk of encoded rows, `ld` apart.
  void add(const Chunk& chunk, const T* grad, std::int64_t ld) {
    rows_.go_to_head(chunk.head);
    gradient_.add_tile(rows_.tile_of(chunk), rows_.rows_of(chunk),
                       TileView<const T>{grad, 0, ld, 0, 1},
                       contiguous_tile<Storage>(p_.grad_x, p_.length, p_.num_heads, p_.in_features,
                                                chunk.batch, chunk.begin, chunk.head),
                       sums_.of(chunk), nullptr);
  }

 private:
  const SineFeaturesBackwardParams& p_;
  EncodedRows<Storage>& rows_;
  const EncoderSums& sums_;
  SineFeaturesGradient<T> gradient_;
};

// What the threads of a backward pass share.
template <class T>
class SumsOfEncoders {
 public:
  explicit SumsOfEncoders(const core::LinearAttentionBackwardParams& p)
      : queries_(p.grad_q_sines != nullptr, p.grad_q_sines, segment_size(p), width(p)),
        keys_(p.grad_k_sines != nullptr, p.grad_k_sines, segment_size(p), width(p)) {}

  const EncoderSums* queries() const { return queries_.get(); }
  const EncoderSums* keys() const { return keys_.get(); }
  void store() const {
    if (queries() != nullptr) queries()->store();
    if (keys() != nullptr) keys()->store();
  }

 private:
  static std::int64_t width(const LinearAttentionParams& p) {
    return p.q_sines == nullptr ? 0 : round_up(p.q_sines->in_features, kLanes<T>);
  }

  const Maybe<EncoderSums> queries_, keys_;
};

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
