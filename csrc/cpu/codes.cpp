#include "codes.h"

#include "simd.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {
namespace {

// Calls function(T{}), T the type of the elements.
template <class Params, class Function>
void with_type(const Params& p, const Function& function) {
  if (p.dtype == core::DType::kFloat64) return function(double{});
  function(float{});
}

// Calls function(T{}, feature) for each feature of [H D].
template <class Params, class Function>
void for_each_feature(const Params& p, std::int64_t features, const Function& function) {
  with_type(p, [&](auto element) {
#pragma omp parallel for schedule(static) num_threads(p.num_threads)
    for (std::int64_t feature = 0; feature < features; ++feature) function(element, feature);
  });
}

constexpr auto same = [](auto value) { return value; };

// Calls function(T{}, index) for each sine of [H, D, K].
template <class Params, class Function>
void for_each_sine(const Params& p, const Function& function) {
  for_each_feature(p, p.num_heads * p.in_features, [&](auto element, std::int64_t feature) {
    for (std::int64_t k = 0; k < p.num_sines; ++k) function(element, feature * p.num_sines + k);
  });
}

// The sines of a feature, and the phases of its pairs, in tables.
template <class T>
class PhaseTables {
 public:
  explicit PhaseTables(const PhaseCodeParams& p)
      : p_(p), sines_(p.num_sines), phases_(p.num_pairs), first_pair_(0) {}

  void set(std::int64_t feature) {
    first_pair_ = feature * p_.num_pairs;
    for (std::int64_t k = 0; k < p_.num_sines; ++k)
      sines_[k] = core::PhaseSine<T>(p_, feature * p_.num_sines + k);
    for (std::int64_t i = 0; i < p_.num_pairs; ++i)
      phases_[i] = core::phase_of_pair<T>(p_, first_pair_ + i);
  }
  const core::PhaseSine<T>& sine(std::int64_t k) const { return sines_[k]; }
  const core::Point<T>& phase(std::int64_t pair) const { return phases_[pair - first_pair_]; }

 private:
  const PhaseCodeParams& p_;
  Workspace<core::PhaseSine<T>> sines_;
  Workspace<core::Point<T>> phases_;
  std::int64_t first_pair_;
};

template <class T>
void make_phase_codes(const PhaseCodeParams& p) {
#pragma omp parallel num_threads(p.num_threads)
  {
    PhaseTables<T> tables(p);
    const Workspace<double> cycles(p.num_sines * p.ndim);
#pragma omp for schedule(static)
    for (std::int64_t feature = 0; feature < p.num_heads * p.in_features; ++feature) {
      tables.set(feature);
      const T* const freqs = static_cast<const T*>(p.freqs) + feature * p.num_sines * p.ndim;
      for (std::int64_t k = 0; k < p.num_sines; ++k) {
        for (std::int64_t axis = 0; axis < p.ndim; ++axis)
          cycles[k * p.ndim + axis] = core::cycles_of(axis, freqs[k * p.ndim + axis]);
      }
      for (std::int64_t i = feature * p.num_pairs; i < (feature + 1) * p.num_pairs; ++i) {
        const std::int64_t k = p.sine[i];
        core::make_phase_code(
            p, tables.sine(k), tables.phase(i),
            [&](std::int64_t axis) { return cycles[k * p.ndim + axis]; }, i);
      }
    }
  }
}

template <class T>
void make_phase_codes_backward(const PhaseCodeBackwardParams& p) {
#pragma omp parallel num_threads(p.num_threads)
  {
    const std::int64_t freqs = p.num_sines * p.ndim;
    PhaseTables<T> tables(p);
    const Workspace<core::PhaseSums<T>> sums(p.num_sines);
    const Workspace<double> sums_of_freqs(freqs);
#pragma omp for schedule(static)
    for (std::int64_t feature = 0; feature < p.num_heads * p.in_features; ++feature) {
      const std::int64_t first = feature * p.num_sines;
      tables.set(feature);
      for (std::int64_t k = 0; k < p.num_sines; ++k) sums[k] = {};
      for (std::int64_t i = 0; i < freqs; ++i) sums_of_freqs[i] = 0;
      for (std::int64_t i = feature * p.num_pairs; i < (feature + 1) * p.num_pairs; ++i) {
        const std::int64_t k = p.sine[i];
        sums[k].add(p, tables.sine(k), tables.phase(i), i);
        for (std::int64_t axis = 0; axis < p.ndim; ++axis)
          sums_of_freqs[k * p.ndim + axis] += p.grad_cycles[i * p.ndim + axis];
      }
      for (std::int64_t k = 0; k < p.num_sines; ++k)
        core::store_gradients(p, tables.sine(k), sums[k], first + k);
      for (std::int64_t i = 0; i < freqs && p.grad_freqs != nullptr; ++i)
        core::store_grad_freq<T>(p, i % p.ndim, sums_of_freqs[i], first * p.ndim + i);
    }
  }
}

// The noise of one feature.
template <class T>
void make_phase_noise(const PhaseNoiseParams& p, std::int64_t feature, std::uint32_t* keys,
                      core::Words<core::ScalarNumbers>* words) {
  const std::int64_t sines = p.num_sines, pairs = p.num_pairs;
  for (std::int64_t k = 0; k < sines; ++k) keys[k] = core::order_key(p, feature, k);
  for (std::int64_t k = 0; k < sines; ++k) {
    const int place =
        core::rank_of(static_cast<int>(k), static_cast<int>(sines), [&](int i) { return keys[i]; });
    for (std::int64_t i = place; i < pairs; i += sines) p.sine[feature * pairs + i] = k;
  }
  for (std::int64_t axis = 0; axis < max_of(p.ndim, 1); ++axis) {
    for (std::int64_t i = 0; i < pairs; ++i)
      words[i] = core::phase_words(p, core::PhaseNoiseUse::kPair, axis, feature, i);
    if (axis == 0) {
      T* const phases = static_cast<T*>(p.phases) + feature * pairs;
      for (std::int64_t i = 0; i < pairs; ++i)
        phases[i] = static_cast<T>(core::uniform_of(words[i].word[0]));
    }
    for (std::int64_t first = 0; first < min_of(sines, pairs) && p.ndim > 0; ++first) {
      const int count = core::pairs_of_sine(p, first);
      for (int j = 0; j < count; ++j) keys[j] = core::stratum_key(words[first + j * sines]);
      for (int j = 0; j < count; ++j) {
        const int rank = core::rank_of(j, count, [&](int i) { return keys[i]; });
        const std::int64_t pair = first + j * sines;
        static_cast<T*>(p.deviates)[(feature * pairs + pair) * p.ndim + axis] =
            static_cast<T>(core::stratified_normal(rank, count, words[pair]));
      }
    }
  }
}

}  // namespace

void sine_code(const SineCodeParams& p) {
  for_each_sine(p, [&](auto element, std::int64_t i) {
    core::make_sine_code<decltype(element), 1>(p, i, 0);
  });
}

void sine_code_backward(const SineCodeBackwardParams& p) {
  for_each_sine(p, [&](auto element, std::int64_t i) {
    core::make_sine_code_backward<decltype(element), 1>(p, i, 0, same);
  });
}

void exact_code(const ExactCodeParams& p) {
  for_each_sine(
      p, [&](auto element, std::int64_t i) { core::make_exact_code<decltype(element)>(p, i); });
}

void exact_code_backward(const ExactCodeBackwardParams& p) {
  for_each_sine(p, [&](auto element, std::int64_t i) {
    core::make_exact_code_backward<decltype(element)>(p, i);
  });
}

void phase_code(const PhaseCodeParams& p) {
  with_type(p, [&](auto element) { make_phase_codes<decltype(element)>(p); });
}

void phase_code_backward(const PhaseCodeBackwardParams& p) {
  with_type(p, [&](auto element) { make_phase_codes_backward<decltype(element)>(p); });
}

void gate_code(const GateCodeParams& p) {
  for_each_feature(p, p.features, [&](auto element, std::int64_t i) {
    core::gate_code<decltype(element), 1>(p, i, 0);
  });
}

void gate_code_backward(const GateCodeBackwardParams& p) {
  for_each_feature(p, p.features, [&](auto element, std::int64_t i) {
    core::gate_code_backward<decltype(element), 1>(p, i, 0, same);
  });
}

void gate_exact_code(const GateExactCodeParams& p) {
  for_each_feature(p, p.features, [&](auto element, std::int64_t i) {
    core::gate_exact_code<decltype(element)>(p, i);
  });
}

void gate_exact_code_backward(const GateExactCodeBackwardParams& p) {
  for_each_feature(p, p.features, [&](auto element, std::int64_t i) {
    core::gate_exact_code_backward<decltype(element)>(p, i);
  });
}

void phase_noise(const PhaseNoiseParams& p) {
  with_type(p, [&](auto element) {
#pragma omp parallel num_threads(p.num_threads)
    {
      const Workspace<std::uint32_t> keys(max_of(p.num_sines, p.num_pairs));
      const Workspace<core::Words<core::ScalarNumbers>> words(p.num_pairs);
#pragma omp for schedule(static)
      for (std::int64_t feature = 0; feature < p.num_heads * p.in_features; ++feature)
        make_phase_noise<decltype(element)>(p, feature, keys, words);
    }
  });
}

void circle_noise(const CircleNoiseParams& p) {
  for_each_feature(p, p.num_heads * p.in_features, [&](auto element, std::int64_t feature) {
    for (std::int64_t block = 0; 4 * block < p.num_pairs; ++block)
      core::make_circle_noise<decltype(element)>(p, feature, block);
  });
}

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
