// What calls the recurrences of a decay per feature, and their scratch memory.
#include "feature_decay.h"
#include "feature_recurrence.h"
#include "token_sets.h"

namespace torch_spe::cuda::attention {
namespace {

template <class Storage>
class FeatureDecayPass {
 public:
  using T = core::accumulate_t<Storage>;
  std::size_t workspace_size = 0;

  FeatureDecayPass(const LinearAttentionParams& p, bool backward, bool wants_decay, void* workspace,
                   Stream stream)
      : p_(p), causal_(p.causal || p.query_length == 0), sets_(p), stream_(stream) {
    MemoryLayout layout(static_cast<unsigned char*>(workspace));
    const std::int64_t features = p.num_realizations, width = p.value_features + 1;
    // First: they are aligned to more than a layout does.
    if (backward && sets_.divides()) row_factors_ = layout.take<RowFactors<T>>(sets_.rows());
    zero_ = layout.take<std::uint64_t>(1);
    if (backward && p.query_length == 0) sets_.replace_queries(zero_);
    factors_ = layout.take<double>(tokens() * features);
    state_ = layout.take<double>(p.num_sequences * p.num_heads * features * width);
    sums_ = layout.take<T>(tokens() * max_of(features, width));
    if (backward) {
      sums_of_queries_ = layout.take<T>(tokens() * features);
    } else if (sets_.divides()) {
      if (sets_.has_own_denominator()) denominators_ = layout.take<T>(sets_.rows());
      if (p.row_divisor == nullptr) divisors_ = layout.take<T>(sets_.rows());
    }
    if (wants_decay) {
      products_ = layout.take<double>(tokens() * features);
      step_gradients_ = layout.take<double>(tokens() * features);
      ends_ = layout.take<double>(chunks().slots() * p.num_heads * features * width);
    }
    workspace_size = layout.size();
  }

  void forward() {
    make_step_factors();
    const bool own = sets_.has_own_denominator(), has_rows = p_.query_length > 0;
    Recurrence<Storage> sums = recurrence(sets_.queries(), sets_.keys(), p_.value_features, !own);
    set_initial(sums, p_.initial_s, own ? nullptr : p_.initial_z);
    set_total(sums, p_.final_s, own ? nullptr : p_.final_z);
    values(sums, has_rows ? sums_ : nullptr);
    if (own) {
      Recurrence<Storage> denominators =
          recurrence(sets_.denominator_queries(), sets_.denominator_keys(), 0, true);
      set_initial(denominators, nullptr, p_.initial_z);
      set_total(denominators, nullptr, p_.final_z);
      values(denominators, has_rows ? denominators_ : nullptr);
    }
    if (!has_rows) return;
    T* divisors = nullptr;
    const std::int64_t width = sums.width();
    if (sets_.divides()) {
      divisors = p_.row_divisor == nullptr ? divisors_ : static_cast<T*>(p_.row_divisor);
      const T* const denominators = p_.rms_norm ? nullptr
                                    : own       ? denominators_
                                                : sums_ + p_.value_features;
      for_each_index(sets_.rows(),
                     Divisors<T>{sums_, denominators, width, own ? 1 : width, p_.value_features,
                                 static_cast<T>(p_.eps), divisors},
                     stream_);
    }
    write_rows(sums_, divisors, width, p_.query_length, p_.out);
  }

  void backward(const LinearAttentionBackwardParams& p) {
    make_step_factors();
    const bool own = sets_.has_own_denominator();
    if (sets_.divides()) sets_.make_factors(p, row_factors_, stream_);
    Recurrence<Storage> forwards =
        recurrence(sets_.queries(p, row_factors_), sets_.keys(), p.value_features, !own);
    Recurrence<Storage> backwards = reversed(forwards);
    set_initial(forwards, p.initial_s, own ? nullptr : p.initial_z);
    set_initial(backwards, p.grad_final_s, own ? nullptr : p.grad_final_z);
    set_total(backwards, p.grad_initial_s, own ? nullptr : p.grad_initial_z);
    features(forwards, backwards, p.grad_q, p.grad_k, false);
    if (p.grad_v != nullptr) {
      set_total(backwards, nullptr, nullptr);
      values(backwards, sums_);
      write_rows(sums_, nullptr, backwards.width(), p.key_length, p.grad_v);
    }
    if (own) {
      forwards =
          recurrence(sets_.denominator_queries(row_factors_), sets_.denominator_keys(), 0, true);
      backwards = reversed(forwards);
      set_initial(forwards, nullptr, p.initial_z);
      set_initial(backwards, nullptr, p.grad_final_z);
      set_total(backwards, nullptr, p.grad_initial_z);
      features(forwards, backwards, p.grad_denominator_q, p.grad_denominator_k, true);
    }
    if (p.grad_log_decay != nullptr) {
      write_decay_gradient(step_gradients_, sets_.batch() * p.key_length,
                           p.num_heads * p.num_realizations, p.constant_decay, p.log_decay_dtype,
                           p.grad_log_decay, stream_);
    }
  }

 private:
  std::int64_t tokens() const { return sets_.batch() * p_.key_length * p_.num_heads; }
  Cut chunks() const { return sets_.cut(p_.key_length, kAnchor); }

  void make_step_factors() const {
    DecaySteps steps;
    steps.data = p_.log_decay;
    steps.is_double = p_.log_decay_dtype == core::DType::kFloat64;
    for (int i = 0; i < 4; ++i) steps.strides[i] = p_.log_decay_strides[i];
    for_each_index(
        tokens() * p_.num_realizations,
        StepFactors{steps, p_.key_length, p_.num_heads, p_.num_realizations, zero_, factors_},
        stream_);
  }

  // Rows that read states of columns which move forwards.
  Recurrence<Storage> recurrence(const Tokens<Storage>& rows, const Tokens<Storage>& columns,
                                 std::int64_t values, bool has_z) const {
    Recurrence<Storage> result;
    result.rows = rows;
    result.columns = columns;
    result.chunks = chunks();
    result.heads = p_.num_heads;
    result.features = p_.num_realizations;
    result.values = values;
    result.has_z = has_z;
    result.factors = factors_;
    result.state = state_;
    return result;
  }
  // The same tokens with rows and columns exchanged, moving backwards.
  static Recurrence<Storage> reversed(Recurrence<Storage> result) {
    const Tokens<Storage> rows = result.rows;
    result.rows = result.columns;
    result.columns = rows;
    result.backwards = !result.backwards;
    return result;
  }
  static void set_initial(Recurrence<Storage>& to, const void* s, const void* z) {
    to.initial_s = static_cast<const T*>(s);
    to.initial_z = static_cast<const T*>(z);
  }
  static void set_total(Recurrence<Storage>& to, void* s, void* z) {
    to.total_s = static_cast<T*>(s);
    to.total_z = static_cast<T*>(z);
  }
  // Of the tokens on the other side of each row, where all tokens are seen.
  static Recurrence<Storage> other_direction(Recurrence<Storage> result) {
    result.backwards = !result.backwards;
    result.strict = result.adds = true;
    set_initial(result, nullptr, nullptr);
    set_total(result, nullptr, nullptr);
    return result;
  }

  void values(Recurrence<Storage> recurrence, T* out) const {
    recurrence.out = out;
    const auto run = [&](const Recurrence<Storage>& one) {
      for_each_index(p_.num_sequences * p_.num_heads * one.width(), ValuesRecurrence<Storage>{one},
                     stream_);
    };
    run(recurrence);
    if (!causal_ && out != nullptr) run(other_direction(recurrence));
  }

  void features(Recurrence<Storage> forwards, Recurrence<Storage> backwards, void* grad_q,
                void* grad_k, bool adds_step_gradients) const {
    forwards.out = sums_of_queries_;
    backwards.out = sums_;
    // Rows that read what moves forwards, then rows that read what moves backwards.
    const auto run = [&](const Recurrence<Storage>& first, const Recurrence<Storage>& second,
                         bool adds) {
      const std::int64_t count = p_.num_sequences * p_.num_heads * p_.num_realizations;
      for_each_index(count, FeaturesRecurrence<Storage>{first, products_, ends_, nullptr, false},
                     stream_);
      for_each_index(count,
                     FeaturesRecurrence<Storage>{second, products_, ends_, step_gradients_, adds},
                     stream_);
    };
    run(forwards, backwards, adds_step_gradients);
    if (!causal_) run(other_direction(backwards), other_direction(forwards), true);
    const auto write = [&](const Tokens<Storage>& rows, const T* sums, void* grad) {
      if (grad == nullptr) return;
      for_each_index(
          sets_.batch() * rows.length * rows.heads * p_.num_realizations,
          InputGradients<Storage>{rows, p_.num_realizations, sums, static_cast<Storage*>(grad)},
          stream_);
    };
    write(forwards.rows, sums_of_queries_, grad_q);
    write(backwards.rows, sums_, grad_k);
  }

  void write_rows(const T* sums, const T* divisors, std::int64_t width, std::int64_t length,
                  void* out) const {
    const std::int64_t values = p_.value_features;
    for_each_index(sets_.batch() * length * p_.num_heads * values,
                   DividedRows<Storage>{sums, divisors, width, values, static_cast<Storage*>(out)},
                   stream_);
  }

  const LinearAttentionParams& p_;
  bool causal_;  // or of keys alone
  TokenSets<Storage> sets_;
  Stream stream_;
  std::uint64_t* zero_ = nullptr;
  double* factors_ = nullptr;             // [B, M, H, R]
  double* state_ = nullptr;               // [S, H, E + 1, R]
  T* sums_ = nullptr;                     // [B, M, H, R or E + 1]
  T* sums_of_queries_ = nullptr;          // [B, M, H, R]
  RowFactors<T>* row_factors_ = nullptr;  // [B, N, H]
  T* denominators_ = nullptr;             // [B, N, H]
  T* divisors_ = nullptr;                 // [B, N, H]
  double* products_ = nullptr;            // [B, M, H, R]
  double* step_gradients_ = nullptr;      // [B, M, H, R]
  double* ends_ = nullptr;                // [slot, H, E + 1, R]
};

template <class Function>
void visit_pass(const LinearAttentionParams& p, bool backward, bool wants_decay, void* workspace,
                Stream stream, const Function& function) {
  visit_storage(p.dtype, [&](auto storage) {
    FeatureDecayPass<decltype(storage)> pass(p, backward, wants_decay, workspace, stream);
    function(pass);
  });
}

}  // namespace

std::size_t feature_decay_forward_workspace(const LinearAttentionParams& p) {
  std::size_t size = 0;
  visit_pass(p, false, false, nullptr, Stream{},
             [&](const auto& pass) { size = pass.workspace_size; });
  return size;
}

std::size_t feature_decay_backward_workspace(const LinearAttentionBackwardParams& p) {
  std::size_t size = 0;
  visit_pass(p, true, p.grad_log_decay != nullptr, nullptr, Stream{},
             [&](const auto& pass) { size = pass.workspace_size; });
  return size;
}

void feature_decay_forward(const LinearAttentionParams& p, void* workspace, Stream stream) {
  visit_pass(p, false, false, workspace, stream, [](auto& pass) { pass.forward(); });
}

void feature_decay_backward(const LinearAttentionBackwardParams& p, void* workspace,
                            Stream stream) {
  visit_pass(p, true, p.grad_log_decay != nullptr, workspace, stream,
             [&](auto& pass) { pass.backward(p); });
}

}  // namespace torch_spe::cuda::attention
