#include "linear_attention.h"

#include "blas.h"
#include "simd.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {
namespace {

using core::FeatureMap;

constexpr std::int64_t kChunk = 64;      // positions whose weights are formed at once
constexpr std::int64_t kSegment = 1024;  // positions of a unit of work; whole chunks
constexpr std::int64_t kAhead = 16;      // rows between prefetching and loading

// Sizes rounded up to whole cache lines.
template <class T>
TORCH_SPE_INLINE std::int64_t padded(std::int64_t size) {
  return round_up(size, 64 / static_cast<std::int64_t>(sizeof(T)));
}

template <class T>
TORCH_SPE_INLINE void set_zero(T* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = 0;
}

// out = a + b, or a copy of b where there is no a.
template <class T>
TORCH_SPE_INLINE void add(const T* a, const T* b, std::int64_t n, T* out) {
  if (a == nullptr) {
    for (std::int64_t i = 0; i < n; ++i) out[i] = b[i];
  } else {
    for (std::int64_t i = 0; i < n; ++i) out[i] = a[i] + b[i];
  }
}

// n is a multiple of the lanes.
template <class T>
TORCH_SPE_INLINE T dot(const T* a, const T* b, std::int64_t n) {
  Vec<T> sum = {};
  for (std::int64_t i = 0; i < n; i += kLanes<T>) sum += load_vec(a + i) * load_vec(b + i);
  return sum_lanes<T>(sum);
}

// The sequences of the batch (or those packed in one row), each cut into segments: the units in
// which states are added up, whatever the number of threads, so that results do not depend on it.
// An empty sequence has one empty segment.
struct Segment {
  std::int64_t row;    // sequence * H + head
  std::int64_t slot;   // number among all segments
  std::int64_t batch;  // row of the batch
  std::int64_t head;
  std::int64_t begin;  // position in the row of the batch
  std::int64_t size;
  bool last;  // of its sequence
};

class Segments {
 public:
  Segments(const LinearAttentionParams& p, std::int64_t length)
      : p_(p), length_(length), first_(p.num_sequences + 1) {
    first_[0] = 0;
    for (std::int64_t s = 0; s < p.num_sequences; ++s) {
      const std::int64_t count = max_of(1, (size_of(s) + kSegment - 1) / kSegment);
      first_[s + 1] = first_[s] + count;
      longest_ = max_of(longest_, count);
    }
  }

  std::int64_t total() const { return first_[p_.num_sequences] * p_.num_heads; }
  std::int64_t count(std::int64_t row) const {
    return first_[row / p_.num_heads + 1] - first_[row / p_.num_heads];
  }
  // Slots of a row follow each other.
  std::int64_t first_slot(std::int64_t row) const {
    return first_[row / p_.num_heads] * p_.num_heads + row % p_.num_heads * count(row);
  }

  Segment of_row(std::int64_t row, std::int64_t index) const {
    const std::int64_t sequence = row / p_.num_heads;
    const std::int64_t offset = index * kSegment;
    Segment segment;
    segment.row = row;
    segment.slot = first_slot(row) + index;
    segment.batch = p_.cu_seqlens == nullptr ? sequence : 0;
    segment.head = row % p_.num_heads;
    segment.begin = (p_.cu_seqlens == nullptr ? 0 : p_.cu_seqlens[sequence]) + offset;
    segment.size = min_of(kSegment, size_of(sequence) - offset);
    segment.last = index + 1 == count(row);
    return segment;
  }

  Segment of_slot(std::int64_t slot) const {
    std::int64_t low = 0, high = p_.num_sequences;  // sequence in [low, high)
    while (high - low > 1) {
      const std::int64_t middle = (low + high) / 2;
      (first_[middle] * p_.num_heads <= slot ? low : high) = middle;
    }
    const std::int64_t in_sequence = slot - first_[low] * p_.num_heads;
    const std::int64_t segments = first_[low + 1] - first_[low];
    return of_row(low * p_.num_heads + in_sequence / segments, in_sequence % segments);
  }

  // Whether threads that take whole rows would wait for each other longer than the second pass over
  // keys and values costs that lets them share a row.
  bool worth_sharing_rows() const {
    const std::int64_t rows = p_.num_sequences * p_.num_heads, threads = p_.num_threads;
    const std::int64_t share = (total() + threads - 1) / threads;
    const std::int64_t by_rows =
        min_of((rows + threads - 1) / threads * longest_, share + longest_);
    return longest_ > 1 && 4 * by_rows > 5 * share;
  }

 private:
  std::int64_t size_of(std::int64_t sequence) const {
    return p_.cu_seqlens == nullptr ? length_
                                    : p_.cu_seqlens[sequence + 1] - p_.cu_seqlens[sequence];
  }

  const LinearAttentionParams& p_;
  std::int64_t length_;
  std::int64_t longest_ = 1;
  Workspace<std::int64_t> first_;  // [S + 1], segments before a sequence, per head
};

template <FeatureMap kMap, class Storage, class T>
TORCH_SPE_INLINE void load_mapped_row(const Storage* in, std::int64_t stride, std::int64_t n,
                                      T* out) {
  if (stride == 1) {
    for (std::int64_t i = 0; i < n; ++i) out[i] = core::apply_feature_map<kMap>(core::load(in[i]));
  } else {
    for (std::int64_t i = 0; i < n; ++i)
      out[i] = core::apply_feature_map<kMap>(core::load(in[i * stride]));
  }
}

// Rows of a head lie apart, which the hardware's prefetching does not follow.
template <class Storage>
TORCH_SPE_INLINE void prefetch_row(const Storage* row, std::int64_t n) {
  constexpr std::int64_t kLine = 64 / static_cast<std::int64_t>(sizeof(Storage));
  for (std::int64_t i = 0; i < n; i += kLine) __builtin_prefetch(row + i, 0, 2);
}

// Calls `function` with the feature map as a type.
template <FeatureMap kMap>
struct MapTag {
  static constexpr FeatureMap value = kMap;
};
template <class Function>
TORCH_SPE_INLINE void visit_feature_map(FeatureMap map, const Function& function) {
  switch (map) {
    case FeatureMap::kIdentity:
      return function(MapTag<FeatureMap::kIdentity>{});
    case FeatureMap::kElu:
      return function(MapTag<FeatureMap::kElu>{});
    case FeatureMap::kRelu:
      return function(MapTag<FeatureMap::kRelu>{});
  }
}

// What the passes share: loading tiles of q, k and v, and the states of segments.
//
// A state is S [R, E] followed by z [R], rows and z padded to cache lines; what is beyond R in z
// and in tiles of features is zero, so that whole vectors may be multiplied.
template <class Storage>
class Tiles {
 public:
  using T = core::accumulate_t<Storage>;

  explicit Tiles(const LinearAttentionParams& p)
      : p_(p),
        real_(p.num_realizations),
        values_(p.value_features),
        real_width_(padded<T>(p.num_realizations)),
        value_width_(padded<T>(p.value_features)),
        state_size_(state_size(p)),
        sum_(real_width_) {}

  static std::int64_t state_size(const LinearAttentionParams& p) {
    return padded<T>(p.num_realizations) * (padded<T>(p.value_features) + 1);
  }

  // The state that row starts with, and whether there is one.
  bool import_state(const void* s, const void* z, std::int64_t row, T* state) const {
    if (s == nullptr) return false;
    set_zero(state, state_size_);
    const T* s_rows = static_cast<const T*>(s) + row * real_ * values_;
    const T* z_row = static_cast<const T*>(z) + row * real_;
    for (std::int64_t r = 0; r < real_; ++r) {
      for (std::int64_t e = 0; e < values_; ++e)
        state[r * value_width_ + e] = s_rows[r * values_ + e];
      state[z_offset() + r] = z_row[r];
    }
    return true;
  }
  void export_state(const T* state, std::int64_t row, void* s, void* z) const {
    T* s_rows = static_cast<T*>(s) + row * real_ * values_;
    T* z_row = static_cast<T*>(z) + row * real_;
    for (std::int64_t r = 0; r < real_; ++r) {
      if (s != nullptr) {
        for (std::int64_t e = 0; e < values_; ++e)
          s_rows[r * values_ + e] = state[r * value_width_ + e];
      }
      if (z != nullptr) z_row[r] = state[z_offset() + r];
    }
  }

  // The sum of phi(k) v^T and phi(k) over a segment.
  void key_sums(const Segment& segment, T* keys, T* values, T* state) {
    set_zero(state, state_size_);
    for (std::int64_t n = 0; n < segment.size; n += kChunk) {
      const std::int64_t size = min_of(kChunk, segment.size - n);
      load_keys(segment, n, size, keys);
      load_values(segment, n, size, values);
      add_keys(size, keys, values, state);
    }
  }

 protected:
  std::int64_t z_offset() const { return real_width_ * value_width_; }

  static const Storage* at(const void* data, const std::int64_t (&strides)[4],
                           const Segment& segment, std::int64_t n) {
    return static_cast<const Storage*>(data) + segment.batch * strides[0] +
           (segment.begin + n) * strides[1] + segment.head * strides[2];
  }
  // Of a contiguous tensor [B, length, H, columns].
  Storage* at(void* data, std::int64_t length, std::int64_t columns, const Segment& segment,
              std::int64_t n) const {
    return static_cast<Storage*>(data) +
           ((segment.batch * length + segment.begin + n) * p_.num_heads + segment.head) * columns;
  }

  // Of the row to prefetch when row n + t of the segment is loaded, the distance from row n.
  static std::int64_t ahead(const Segment& segment, std::int64_t n, std::int64_t t) {
    return min_of(t + kAhead, segment.size - n - 1);
  }

  bool is_padding(const Segment& segment, std::int64_t n) const {
    return p_.key_padding_mask != nullptr &&
           p_.key_padding_mask[segment.batch * p_.key_length + segment.begin + n];
  }

  void load_queries(const Segment& segment, std::int64_t n, std::int64_t size, T* out,
                    std::int64_t ld) const {
    const Storage* q = at(p_.q, p_.q_strides, segment, n);
    visit_feature_map(p_.feature_map, [&](auto map) {
      for (std::int64_t t = 0; t < size; ++t) {
        prefetch_row(q + ahead(segment, n, t) * p_.q_strides[1], real_);
        load_mapped_row<map.value>(q + t * p_.q_strides[1], p_.q_strides[3], real_, out + t * ld);
        set_zero(out + t * ld + real_, real_width_ - real_);
      }
    });
  }
  void load_keys(const Segment& segment, std::int64_t n, std::int64_t size, T* out) const {
    const Storage* k = at(p_.k, p_.k_strides, segment, n);
    visit_feature_map(p_.feature_map, [&](auto map) {
      for (std::int64_t t = 0; t < size; ++t) {
        T* row = out + t * real_width_;
        if (is_padding(segment, n + t)) {
          set_zero(row, real_width_);
          continue;
        }
        prefetch_row(k + ahead(segment, n, t) * p_.k_strides[1], real_);
        load_mapped_row<map.value>(k + t * p_.k_strides[1], p_.k_strides[3], real_, row);
        set_zero(row + real_, real_width_ - real_);
      }
    });
  }
  void load_values(const Segment& segment, std::int64_t n, std::int64_t size, T* out) const {
    const Storage* v = at(p_.v, p_.v_strides, segment, n);
    for (std::int64_t t = 0; t < size; ++t) {
      T* row = out + t * value_width_;
      if (is_padding(segment, n + t)) {
        set_zero(row, value_width_);
        continue;
      }
      prefetch_row(v + ahead(segment, n, t) * p_.v_strides[1], values_);
      load_row(v + t * p_.v_strides[1], p_.v_strides[3], values_, row);
      set_zero(row + values_, value_width_ - values_);
    }
  }

  // state += (keys^T values, sum of keys).
  void add_keys(std::int64_t size, const T* keys, const T* values, T* state) {
    gemm(Op::kTransposed, Op::kPlain, real_, values_, size, keys, real_width_, values, value_width_,
         T(1), state, value_width_);
    set_zero(sum_.get(), real_width_);
    for (std::int64_t t = 0; t < size; ++t)
      add(sum_.get(), keys + t * real_width_, real_width_, sum_.get());
    add(state + z_offset(), sum_.get(), real_width_, state + z_offset());
  }

  // scale[t] = 1 / (phi(q_t) . z_t + eps), z_t being z plus, when causal, the keys up to t; 0 where
  // that is 1 / 0.
  void normalizers(std::int64_t size, const T* queries, std::int64_t ld, const T* keys, const T* z,
                   T* scale) {
    if (!p_.normalize) {
      for (std::int64_t t = 0; t < size; ++t) scale[t] = 1;
      return;
    }
    set_zero(sum_.get(), real_width_);
    for (std::int64_t t = 0; t < size; ++t) {
      const T* q = queries + t * ld;
      Vec<T> products = {};
      for (std::int64_t r = 0; r < real_width_; r += kLanes<T>) {
        Vec<T> weight = load_vec(sum_ + r);
        if (p_.causal) {
          weight += load_vec(keys + t * real_width_ + r);
          store_vec(sum_ + r, weight);
        }
        if (z != nullptr) weight += load_vec(z + r);
        products += load_vec(q + r) * weight;
      }
      scale[t] = sum_lanes<T>(products);
    }
    for (std::int64_t t = 0; t < size; ++t) {
      const T sum = scale[t] + static_cast<T>(p_.eps);
      scale[t] = sum == 0 ? 0 : 1 / sum;
    }
  }

  static void keep_lower_triangle(std::int64_t size, T* weights, std::int64_t ld) {
    for (std::int64_t t = 0; t < size; ++t) set_zero(weights + t * ld + t + 1, size - t - 1);
  }

  const LinearAttentionParams& p_;
  const std::int64_t real_, values_;             // R, E
  const std::int64_t real_width_, value_width_;  // R, E padded
  const std::int64_t state_size_;

 private:
  Workspace<T> sum_;  // [R]
};

template <class Storage>
class Forward : public Tiles<Storage> {
  using Base = Tiles<Storage>;
  using typename Base::T;

 public:
  explicit Forward(const LinearAttentionParams& p)
      : Base(p),
        left_width_(this->real_width_ + (p.causal ? kChunk : 0)),
        left_(kChunk * left_width_),
        right_((this->real_width_ + kChunk) * this->value_width_),
        keys_(kChunk * this->real_width_),
        out_(kChunk * this->value_width_),
        scale_(kChunk),
        z_(this->real_width_),
        local_(this->state_size_) {}

  void key_sums(const Segment& segment, T* state) { Base::key_sums(segment, keys_, right_, state); }

  // The outputs of a segment that starts with the state `start`, or none; the state after it goes
  // to `end`, unless null, which may be `start`.
  //
  // [queries, weights] and [S; values] stand side by side, so that past and present take one
  // product.
  void causal_segment(const Segment& segment, const T* start, T* end) {
    const std::int64_t past = this->real_width_ * this->value_width_;
    T* values = right_ + past;
    set_zero(local_.get(), this->state_size_);
    for (std::int64_t n = 0; n < segment.size; n += kChunk) {
      const std::int64_t size = min_of(kChunk, segment.size - n);
      const bool has_past = start != nullptr || n > 0;
      if (has_past) {
        add(start, local_.get(), past, right_.get());
        add(start == nullptr ? nullptr : start + past, local_ + past, this->real_width_, z_.get());
      }
      this->load_queries(segment, n, size, left_, left_width_);
      this->load_keys(segment, n, size, keys_);
      this->load_values(segment, n, size, values);
      T* weights = left_ + this->real_width_;
      gemm(Op::kPlain, Op::kTransposed, size, size, this->real_, left_, left_width_, keys_,
           this->real_width_, T(0), weights, left_width_);
      this->keep_lower_triangle(size, weights, left_width_);
      this->normalizers(size, left_, left_width_, keys_, has_past ? z_.get() : nullptr, scale_);
      const std::int64_t skip = has_past ? 0 : this->real_width_;
      gemm(Op::kPlain, Op::kPlain, size, this->values_, this->real_width_ + size - skip,
           left_ + skip, left_width_, right_ + skip * this->value_width_, this->value_width_, T(0),
           out_, this->value_width_);
      store(segment, n, size);
      if (end != nullptr || n + size < segment.size) this->add_keys(size, keys_, values, local_);
    }
    if (end != nullptr) add(start, local_.get(), this->state_size_, end);
  }

  // The outputs of a segment of queries when all keys are in `state`.
  void query_segment(const Segment& segment, const T* state) {
    for (std::int64_t n = 0; n < segment.size; n += kChunk) {
      const std::int64_t size = min_of(kChunk, segment.size - n);
      this->load_queries(segment, n, size, left_, left_width_);
      this->normalizers(size, left_, left_width_, nullptr, state + this->z_offset(), scale_);
      gemm(Op::kPlain, Op::kPlain, size, this->values_, this->real_, left_, left_width_, state,
           this->value_width_, T(0), out_, this->value_width_);
      store(segment, n, size);
    }
  }

 private:
  void store(const Segment& segment, std::int64_t n, std::int64_t size) {
    Storage* out = this->at(this->p_.out, this->p_.query_length, this->values_, segment, n);
    for (std::int64_t t = 0; t < size; ++t) {
      const T* in = out_ + t * this->value_width_;
      Storage* row = out + t * this->p_.num_heads * this->values_;
      for (std::int64_t e = 0; e < this->values_; ++e) core::store(in[e] * scale_[t], row + e);
    }
  }

  const std::int64_t left_width_;
  Workspace<T> left_;   // [chunk, R + chunk]: queries, weights
  Workspace<T> right_;  // [R + chunk, E]: S, values
  Workspace<T> keys_;   // [chunk, R]
  Workspace<T> out_;    // [chunk, E]
  Workspace<T> scale_;  // [chunk]
  Workspace<T> z_;      // [R]
  Workspace<T> local_;  // state of the segment's own keys
};

template <class Storage>
class Backward : public Tiles<Storage> {
  using Base = Tiles<Storage>;
  using typename Base::T;

 public:
  explicit Backward(const LinearAttentionBackwardParams& p)
      : Base(p),
        b_(p),
        chunks_(p.causal ? min_of(kSegment, round_up(p.query_length, kChunk)) / kChunk : 1),
        queries_(kChunk * this->real_width_),
        keys_(chunks_ * kChunk * this->real_width_),
        values_of_(chunks_ * kChunk * this->value_width_),
        grads_(kChunk * this->value_width_),
        weights_(p.causal ? kChunk * kChunk : 0),
        out_(kChunk * max_of(this->real_width_, this->value_width_)),
        scale_(kChunk),
        grad_scale_(kChunk),
        result_row_(this->value_width_),
        states_(p.causal ? chunks_ * this->state_size_ : 0),
        local_(this->state_size_),
        grad_state_(this->state_size_) {}

  void key_sums(const Segment& segment, T* state) {
    Base::key_sums(segment, keys_, values_of_, state);
  }

  // The gradients of a segment that starts with the state `start`, or none, and whose last state
  // has the gradient `grad_end`, or none. The gradient of its first state goes to `grad_start`,
  // unless null, which may be `grad_end`; without grad_end, and with `only_state`, that is all.
  void causal_segment(const Segment& segment, const T* start, const T* grad_end, T* grad_start,
                      bool only_state) {
    const bool wants_q = b_.grad_q != nullptr && !only_state;
    const bool wants_k = b_.grad_k != nullptr && !only_state;
    const bool wants_v = b_.grad_v != nullptr && !only_state;
    const std::int64_t state_size = this->state_size_, z = this->z_offset();
    const std::int64_t rw = this->real_width_, vw = this->value_width_;
    const std::int64_t real = this->real_, values = this->values_;

    // States before each chunk.
    set_zero(local_.get(), state_size);
    for (std::int64_t n = 0, c = 0; n < segment.size; n += kChunk, ++c) {
      const std::int64_t size = min_of(kChunk, segment.size - n);
      add(start, local_.get(), state_size, states_ + c * state_size);
      this->load_keys(segment, n, size, keys_ + n * rw);
      this->load_values(segment, n, size, values_of_ + n * vw);
      if (n + size < segment.size)
        this->add_keys(size, keys_ + n * rw, values_of_ + n * vw, local_);
    }

    set_zero(local_.get(), state_size);
    const std::int64_t chunks = (segment.size + kChunk - 1) / kChunk;
    for (std::int64_t c = chunks - 1; c >= 0; --c) {
      const std::int64_t n = c * kChunk, size = min_of(kChunk, segment.size - n);
      const T* keys = keys_ + n * rw;
      const T* chunk_values = values_of_ + n * vw;
      const T* past = start != nullptr || c > 0 ? states_ + c * state_size : nullptr;
      const T* future = nullptr;
      if (grad_end != nullptr || c + 1 < chunks) {
        add(grad_end, local_.get(), state_size, grad_state_.get());
        future = grad_state_;
      }
      this->load_queries(segment, n, size, queries_, rw);
      load_gradients(segment, n, size, keys, past == nullptr ? nullptr : past + z);
      if (wants_q || wants_k) {
        gemm(Op::kPlain, Op::kTransposed, size, size, values, grads_, vw, chunk_values, vw, T(0),
             weights_, kChunk);
        for (std::int64_t t = 0; t < size; ++t) {
          for (std::int64_t m = 0; m < size; ++m) weights_[t * kChunk + m] += grad_scale_[t];
        }
        this->keep_lower_triangle(size, weights_, kChunk);
      }
      if (wants_q) {
        gemm(Op::kPlain, Op::kPlain, size, real, size, weights_, kChunk, keys, rw, T(0), out_, rw);
        if (past != nullptr) add_query_gradient(size, past, T(1));
        store_features(segment, n, size, queries_, b_.grad_q, b_.query_length, false);
      }
      if (wants_k) {
        gemm(Op::kTransposed, Op::kPlain, size, real, size, weights_, kChunk, queries_, rw, T(0),
             out_, rw);
        if (future != nullptr) add_key_gradient(size, chunk_values, future, T(1));
        store_features(segment, n, size, keys, b_.grad_k, b_.key_length, true);
      }
      if (wants_v) {
        gemm(Op::kPlain, Op::kTransposed, size, size, real, queries_, rw, keys, rw, T(0), weights_,
             kChunk);
        this->keep_lower_triangle(size, weights_, kChunk);
        gemm(Op::kTransposed, Op::kPlain, size, values, size, weights_, kChunk, grads_, vw, T(0),
             out_, vw);
        if (future != nullptr) {
          gemm(Op::kPlain, Op::kPlain, size, values, real, keys, rw, future, vw, T(1), out_, vw);
        }
        store_values(segment, n, size);
      }
      if (grad_start != nullptr || c > 0) add_state_gradient(size, local_);
    }
    if (grad_start != nullptr) add(grad_end, local_.get(), state_size, grad_start);
  }

  // Without an order: the gradient of q and, in grad_state, that of the state that all keys are in.
  void query_segment(const Segment& segment, const T* state, T* grad_state) {
    set_zero(grad_state, this->state_size_);
    for (std::int64_t n = 0; n < segment.size; n += kChunk) {
      const std::int64_t size = min_of(kChunk, segment.size - n);
      this->load_queries(segment, n, size, queries_, this->real_width_);
      load_gradients(segment, n, size, nullptr, state + this->z_offset());
      if (b_.grad_q != nullptr) {
        add_query_gradient(size, state, T(0));
        store_features(segment, n, size, queries_, b_.grad_q, b_.query_length, false);
      }
      add_state_gradient(size, grad_state);
    }
  }

  // The gradients of k and v.
  void key_segment(const Segment& segment, const T* grad_state) {
    for (std::int64_t n = 0; n < segment.size; n += kChunk) {
      const std::int64_t size = min_of(kChunk, segment.size - n);
      this->load_keys(segment, n, size, keys_);
      this->load_values(segment, n, size, values_of_);
      if (b_.grad_k != nullptr) {
        add_key_gradient(size, values_of_, grad_state, T(0));
        store_features(segment, n, size, keys_, b_.grad_k, b_.key_length, true);
      }
      if (b_.grad_v != nullptr) {
        gemm(Op::kPlain, Op::kPlain, size, this->values_, this->real_, keys_, this->real_width_,
             grad_state, this->value_width_, T(0), out_, this->value_width_);
        store_values(segment, n, size);
      }
    }
  }

 private:
  // The gradients of the numerators, grad_out / denominator, and of the denominators,
  // -grad_out . out / denominator.
  void load_gradients(const Segment& segment, std::int64_t n, std::int64_t size, const T* keys,
                      const T* z) {
    const std::int64_t vw = this->value_width_;
    this->normalizers(size, queries_, this->real_width_, keys, z, scale_);
    const Storage* g = this->at(b_.grad_out, b_.grad_out_strides, segment, n);
    for (std::int64_t t = 0; t < size; ++t) {
      T* row = grads_ + t * vw;
      prefetch_row(g + this->ahead(segment, n, t) * b_.grad_out_strides[1], this->values_);
      load_row(g + t * b_.grad_out_strides[1], b_.grad_out_strides[3], this->values_, row);
      for (std::int64_t e = 0; e < this->values_; ++e) row[e] *= scale_[t];
      set_zero(row + this->values_, vw - this->values_);
    }
    if (!b_.normalize) {
      set_zero(grad_scale_.get(), size);
      return;
    }
    const Storage* result = this->at(b_.result, b_.result_strides, segment, n);
    set_zero(result_row_.get(), vw);
    for (std::int64_t t = 0; t < size; ++t) {
      prefetch_row(result + this->ahead(segment, n, t) * b_.result_strides[1], this->values_);
      load_row(result + t * b_.result_strides[1], b_.result_strides[3], this->values_,
               result_row_.get());
      grad_scale_[t] = -dot<T>(grads_ + t * vw, result_row_, vw);
    }
  }

  // out = beta out + grads S^T + grad_scale z.
  void add_query_gradient(std::int64_t size, const T* state, T beta) {
    gemm(Op::kPlain, Op::kTransposed, size, this->real_, this->values_, grads_, this->value_width_,
         state, this->value_width_, beta, out_, this->real_width_);
    if (!b_.normalize) return;
    const T* z = state + this->z_offset();
    for (std::int64_t t = 0; t < size; ++t) {
      T* row = out_ + t * this->real_width_;
      for (std::int64_t r = 0; r < this->real_; ++r) row[r] += grad_scale_[t] * z[r];
    }
  }
  // out = beta out + values grad_S^T + grad_z.
  void add_key_gradient(std::int64_t size, const T* values, const T* grad_state, T beta) {
    gemm(Op::kPlain, Op::kTransposed, size, this->real_, this->values_, values, this->value_width_,
         grad_state, this->value_width_, beta, out_, this->real_width_);
    const T* grad_z = grad_state + this->z_offset();
    for (std::int64_t t = 0; t < size; ++t) {
      T* row = out_ + t * this->real_width_;
      for (std::int64_t r = 0; r < this->real_; ++r) row[r] += grad_z[r];
    }
  }
  // grad_state += (queries^T grads, grad_scale queries).
  void add_state_gradient(std::int64_t size, T* grad_state) {
    gemm(Op::kTransposed, Op::kPlain, this->real_, this->values_, size, queries_, this->real_width_,
         grads_, this->value_width_, T(1), grad_state, this->value_width_);
    T* grad_z = grad_state + this->z_offset();
    for (std::int64_t t = 0; t < size; ++t) {
      const T* row = queries_ + t * this->real_width_;
      for (std::int64_t r = 0; r < this->real_width_; ++r) grad_z[r] += grad_scale_[t] * row[r];
    }
  }

  void store_features(const Segment& segment, std::int64_t n, std::int64_t size, const T* features,
                      void* grad, std::int64_t length, bool is_key) {
    const std::int64_t real = this->real_;
    Storage* rows = this->at(grad, length, real, segment, n);
    visit_feature_map(b_.feature_map, [&](auto map) {
      for (std::int64_t t = 0; t < size; ++t) {
        T* row = out_ + t * this->real_width_;
        if (is_key && this->is_padding(segment, n + t)) set_zero(row, real);
        const T* phi = features + t * this->real_width_;
        Storage* to = rows + t * b_.num_heads * real;
        for (std::int64_t r = 0; r < real; ++r)
          core::store(row[r] * core::feature_map_derivative<map.value>(phi[r]), to + r);
      }
    });
  }
  void store_values(const Segment& segment, std::int64_t n, std::int64_t size) {
    Storage* rows = this->at(b_.grad_v, b_.key_length, this->values_, segment, n);
    for (std::int64_t t = 0; t < size; ++t) {
      T* row = out_ + t * this->value_width_;
      if (this->is_padding(segment, n + t)) set_zero(row, this->values_);
      store_row(row, 1, this->values_, rows + t * b_.num_heads * this->values_);
    }
  }

  const LinearAttentionBackwardParams& b_;
  const std::int64_t chunks_;
  Workspace<T> queries_;     // [chunk, R]
  Workspace<T> keys_;        // [chunks, chunk, R]
  Workspace<T> values_of_;   // [chunks, chunk, E]
  Workspace<T> grads_;       // [chunk, E]
  Workspace<T> weights_;     // [chunk, chunk]
  Workspace<T> out_;         // [chunk, R] or [chunk, E]
  Workspace<T> scale_;       // [chunk]
  Workspace<T> grad_scale_;  // [chunk]
  Workspace<T> result_row_;  // [E]
  Workspace<T> states_;      // [chunks], states
  Workspace<T> local_;       // state, or its gradient, of the segment alone
  Workspace<T> grad_state_;
};

template <class Storage>
void forward_causal(const LinearAttentionParams& p) {
  using T = core::accumulate_t<Storage>;
  const Segments segments(p, p.query_length);
  const std::int64_t rows = p.num_sequences * p.num_heads;
  const std::int64_t size = Tiles<Storage>::state_size(p);
  const bool wants_final = p.final_s != nullptr;
  if (!segments.worth_sharing_rows()) {
#pragma omp parallel num_threads(p.num_threads)
    {
      Forward<Storage> worker(p);
      Workspace<T> state(size);
#pragma omp for schedule(dynamic)
      for (std::int64_t row = 0; row < rows; ++row) {
        bool has_state = worker.import_state(p.initial_s, p.initial_z, row, state);
        for (std::int64_t i = 0; i < segments.count(row); ++i) {
          const Segment segment = segments.of_row(row, i);
          worker.causal_segment(segment, has_state ? state.get() : nullptr,
                                wants_final || !segment.last ? state.get() : nullptr);
          has_state = true;
        }
        if (wants_final) worker.export_state(state, row, p.final_s, p.final_z);
      }
    }
    return;
  }

  Workspace<T> states(segments.total() * size);  // before each segment
#pragma omp parallel num_threads(p.num_threads)
  {
    Forward<Storage> worker(p);
#pragma omp for schedule(dynamic)
    for (std::int64_t slot = 0; slot < segments.total(); ++slot) {
      const Segment segment = segments.of_slot(slot);
      if (!segment.last) worker.key_sums(segment, states + (slot + 1) * size);
    }
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < rows; ++row) {
      T* state = states + segments.first_slot(row) * size;
      const bool has_state = worker.import_state(p.initial_s, p.initial_z, row, state);
      for (std::int64_t i = has_state ? 1 : 2; i < segments.count(row); ++i)
        add(state + (i - 1) * size, state + i * size, size, state + i * size);
    }
#pragma omp for schedule(dynamic)
    for (std::int64_t slot = 0; slot < segments.total(); ++slot) {
      const Segment segment = segments.of_slot(slot);
      const bool first = slot == segments.first_slot(segment.row);
      T* state = states + slot * size;
      const bool has_state = !first || p.initial_s != nullptr;
      const bool ends = wants_final && segment.last;
      worker.causal_segment(segment, has_state ? state : nullptr, ends ? state : nullptr);
      if (ends) worker.export_state(state, segment.row, p.final_s, p.final_z);
    }
  }
}

// total = the initial state plus the sums over the row's segments, in their order.
template <class Storage, class T>
void add_segments(const Tiles<Storage>& worker, const Segments& segments, std::int64_t row,
                  const void* initial_s, const void* initial_z, std::int64_t size, const T* sums,
                  T* total) {
  const T* sum = sums + segments.first_slot(row) * size;
  if (!worker.import_state(initial_s, initial_z, row, total)) set_zero(total, size);
  for (std::int64_t i = 0; i < segments.count(row); ++i) add(total, sum + i * size, size, total);
}

template <class Storage>
void forward_full(const LinearAttentionParams& p) {
  using T = core::accumulate_t<Storage>;
  const Segments queries(p, p.query_length), keys(p, p.key_length);
  const std::int64_t rows = p.num_sequences * p.num_heads;
  const std::int64_t size = Tiles<Storage>::state_size(p);
  Workspace<T> sums(keys.total() * size), states(rows * size);
#pragma omp parallel num_threads(p.num_threads)
  {
    Forward<Storage> worker(p);
#pragma omp for schedule(dynamic)
    for (std::int64_t slot = 0; slot < keys.total(); ++slot)
      worker.key_sums(keys.of_slot(slot), sums + slot * size);
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < rows; ++row) {
      T* state = states + row * size;
      add_segments(worker, keys, row, p.initial_s, p.initial_z, size, sums.get(), state);
      if (p.final_s != nullptr) worker.export_state(state, row, p.final_s, p.final_z);
    }
#pragma omp for schedule(dynamic)
    for (std::int64_t slot = 0; slot < queries.total(); ++slot) {
      const Segment segment = queries.of_slot(slot);
      worker.query_segment(segment, states + segment.row * size);
    }
  }
}

template <class Storage>
void backward_causal(const LinearAttentionBackwardParams& p) {
  using T = core::accumulate_t<Storage>;
  const Segments segments(p, p.query_length);
  const std::int64_t rows = p.num_sequences * p.num_heads;
  const std::int64_t size = Tiles<Storage>::state_size(p);
  const bool wants_initial = p.grad_initial_s != nullptr || p.grad_initial_z != nullptr;
  const bool has_initial = p.initial_s != nullptr, has_final = p.grad_final_s != nullptr;
  const bool shares = segments.worth_sharing_rows();
  Workspace<T> states(segments.total() * size);  // before each segment
  Workspace<T> grads(segments.total() * size);   // of the states after each segment

  const auto prefix = [&](Backward<Storage>& worker, std::int64_t row) {
    T* state = states + segments.first_slot(row) * size;
    worker.import_state(p.initial_s, p.initial_z, row, state);
    for (std::int64_t i = has_initial ? 1 : 2; i < segments.count(row); ++i)
      add(state + (i - 1) * size, state + i * size, size, state + i * size);
  };
  // The gradients of a segment; `hands_on` that of the state before it to the segment before it.
  const auto run = [&](Backward<Storage>& worker, std::int64_t slot, bool hands_on) {
    const Segment segment = segments.of_slot(slot);
    const bool first = slot == segments.first_slot(segment.row);
    T* grad = grads + slot * size;
    T* grad_start = nullptr;
    if (first && wants_initial) grad_start = grad;
    if (!first && hands_on) grad_start = grad - size;
    worker.causal_segment(segment, first && !has_initial ? nullptr : states + slot * size,
                          segment.last && !has_final ? nullptr : grad, grad_start, false);
    if (first && wants_initial)
      worker.export_state(grad, segment.row, p.grad_initial_s, p.grad_initial_z);
  };

#pragma omp parallel num_threads(p.num_threads)
  {
    Backward<Storage> worker(p);
    if (!shares) {
#pragma omp for schedule(dynamic)
      for (std::int64_t row = 0; row < rows; ++row) {
        const std::int64_t begin = segments.first_slot(row), end = begin + segments.count(row);
        for (std::int64_t slot = begin; slot + 1 < end; ++slot)
          worker.key_sums(segments.of_slot(slot), states + (slot + 1) * size);
        prefix(worker, row);
        worker.import_state(p.grad_final_s, p.grad_final_z, row, grads + (end - 1) * size);
        for (std::int64_t slot = end - 1; slot >= begin; --slot) run(worker, slot, true);
      }
    } else {
#pragma omp for schedule(dynamic)
      for (std::int64_t slot = 0; slot < segments.total(); ++slot) {
        const Segment segment = segments.of_slot(slot);
        if (!segment.last) worker.key_sums(segment, states + (slot + 1) * size);
      }
#pragma omp for schedule(static)
      for (std::int64_t row = 0; row < rows; ++row) prefix(worker, row);
#pragma omp for schedule(dynamic)
      for (std::int64_t slot = 0; slot < segments.total(); ++slot) {
        const Segment segment = segments.of_slot(slot);
        const bool first = slot == segments.first_slot(segment.row);
        if (first) continue;
        worker.causal_segment(segment, states + slot * size, nullptr, grads + (slot - 1) * size,
                              true);
      }
#pragma omp for schedule(static)
      for (std::int64_t row = 0; row < rows; ++row) {
        const std::int64_t begin = segments.first_slot(row);
        const std::int64_t last = begin + segments.count(row) - 1;
        worker.import_state(p.grad_final_s, p.grad_final_z, row, grads + last * size);
        for (std::int64_t slot = last - (has_final ? 1 : 2); slot >= begin; --slot)
          add(grads + (slot + 1) * size, grads + slot * size, size, grads + slot * size);
      }
#pragma omp for schedule(dynamic)
      for (std::int64_t slot = 0; slot < segments.total(); ++slot) run(worker, slot, false);
    }
  }
}

template <class Storage>
void backward_full(const LinearAttentionBackwardParams& p) {
  using T = core::accumulate_t<Storage>;
  const Segments queries(p, p.query_length), keys(p, p.key_length);
  const std::int64_t rows = p.num_sequences * p.num_heads;
  const std::int64_t size = Tiles<Storage>::state_size(p);
  Workspace<T> sums(max_of(queries.total(), keys.total()) * size);
  Workspace<T> states(rows * size), grads(rows * size);
#pragma omp parallel num_threads(p.num_threads)
  {
    Backward<Storage> worker(p);
#pragma omp for schedule(dynamic)
    for (std::int64_t slot = 0; slot < keys.total(); ++slot)
      worker.key_sums(keys.of_slot(slot), sums + slot * size);
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < rows; ++row) {
      add_segments(worker, keys, row, p.initial_s, p.initial_z, size, sums.get(),
                   states + row * size);
    }
#pragma omp for schedule(dynamic)
    for (std::int64_t slot = 0; slot < queries.total(); ++slot) {
      const Segment segment = queries.of_slot(slot);
      worker.query_segment(segment, states + segment.row * size, sums + slot * size);
    }
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < rows; ++row) {
      T* grad = grads + row * size;
      add_segments(worker, queries, row, p.grad_final_s, p.grad_final_z, size, sums.get(), grad);
      worker.export_state(grad, row, p.grad_initial_s, p.grad_initial_z);
    }
    if (p.grad_k != nullptr || p.grad_v != nullptr) {
#pragma omp for schedule(dynamic)
      for (std::int64_t slot = 0; slot < keys.total(); ++slot) {
        const Segment segment = keys.of_slot(slot);
        worker.key_segment(segment, grads + segment.row * size);
      }
    }
  }
}

}  // namespace

void linear_attention_forward(const LinearAttentionParams& p) {
  visit_storage(p.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    p.causal ? forward_causal<Storage>(p) : forward_full<Storage>(p);
  });
}

void linear_attention_backward(const LinearAttentionBackwardParams& p) {
  visit_storage(p.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    p.causal ? backward_causal<Storage>(p) : backward_full<Storage>(p);
  });
}

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
