// A block makes codes, sum_p kernel[p] z[n+p, r], for a tile of positions n along the last
// dimension and of realizations r, of one head and feature. The taps of the other dimensions come
// one after the other; each needs a line of noise along the last dimension, which comes in windows
// of some values for each realization. Dense noise is multiplied with a Toeplitz tile of the
// kernel. Of polyphase noise a window holds one number for a period, and a code adds up its few
// taps.
#pragma once

#include "encode/conv/noise_line.h"

namespace torch_spe::cuda {

// The Toeplitz tile kernel[t][i] = kernel[first + i - t] of a line of taps: what dense noise is
// multiplied with, or, mirrored, kernel[t - (first + i)].
template <class Tile, bool kMirrored, class T, class Operand>
TORCH_SPE_DEVICE void fill_toeplitz(const T* taps, std::int64_t count, std::int64_t first,
                                    Operand* out) {
  constexpr int kSize = toeplitz_copy_size<Operand>(Tile::kTokens, Tile::kWindow);
  TORCH_SPE_KEEP_LOOP
  for (int i = static_cast<int>(threadIdx.x); i < Tile::kTokens + Tile::kWindow - 1;
       i += kThreads) {
    const std::int64_t lag = first + i - (Tile::kTokens - 1);
    const std::int64_t tap = kMirrored ? -lag : lag;
    Operand number;
    write(tap >= 0 && tap < count ? taps[tap] : T(0), &number);
    out[i] = number;
    if (kToeplitzCopies<Operand> == 2 && i > 0) out[kSize + i - 1] = number;
  }
}

TORCH_SPE_DEVICE std::uint64_t noise_seed_of(const ConvFilterParams& p) {
  const std::int64_t* const seed = p.generated.device_seed;
  return seed == nullptr ? 0 : static_cast<std::uint64_t>(*seed);
}

template <class T>
TORCH_SPE_DEVICE const T* taps_of(const ConvFilterParams& p, const LineTile& place,
                                  std::int64_t tap0, std::int64_t tap1) {
  return static_cast<const T*>(p.kernel) +
         (((place.head * p.in_features + place.d) * p.kernel_size[0] + tap0) * p.kernel_size[1] +
          tap1) *
             p.kernel_size[2];
}

// Shared memory of windows of noise, one or two in turn.
template <class Storage, class Operand, class Tile>
struct ConvCodeWindows {
  using T = core::accumulate_t<Storage>;
  using Number = std::conditional_t<Tile::kDense, Operand, T>;  // of noise
  static constexpr int kNoise = Tile::kWindow * row_of<Number>(Tile::kRealizations);
  static constexpr int kToeplitz =
      Tile::kDense ? toeplitz_size<Operand>(Tile::kTokens, Tile::kWindow) : 0;
  Number* noise;      // [window, period, r]
  Operand* toeplitz;  // [window, token, period], of dense noise

  TORCH_SPE_INLINE ConvCodeWindows(MemoryLayout& layout, int windows)
      : noise(layout.take<Number>(windows * kNoise)),
        toeplitz(layout.take<Operand>(windows * kToeplitz)) {}
};

template <class Storage, class Operand, class Tile>
class ConvCodeTile {
 public:
  using T = core::accumulate_t<Storage>;
  using Shared = ConvCodeWindows<Storage, Operand, Tile>;
  static constexpr bool kDense = Tile::kDense;
  static constexpr int kRealizations = Tile::kRealizations, kWindow = Tile::kWindow;

  TORCH_SPE_DEVICE explicit ConvCodeTile(const ConvFilterParams& p)
      : p_(p),
        factor_(kDense ? T(1) : sqrt_of(noise_periods(p.generated))),
        seed_(noise_seed_of(p)) {}

  // Makes the codes of a tile and calls function(token, realization, code) for those that this
  // thread holds, constant included. Begins with a barrier.
  template <class Function>
  TORCH_SPE_DEVICE void make(const Shared& shared, const LineTile& place, std::int64_t r0,
                             const Function& function) {
    const NoiseTile<Tile> tile(p_, place, seed_);
    product_.clear();
    __syncthreads();  // whatever shared memory held has been used
    int window = 0;
    for (std::int64_t tap0 = 0; tap0 < p_.kernel_size[0]; ++tap0) {
      for (std::int64_t tap1 = 0; tap1 < p_.kernel_size[1]; ++tap1) {
        const NoiseLine<Tile> line(tile, tap0, tap1);
        if (!kDense && !line.has_any(r0)) continue;
        const T* const taps = taps_of<T>(p_, place, tap0, tap1);
        for (int first = 0; first < line.count; first += kWindow) {
          auto* const noise = shared.noise + window * Shared::kNoise;
          Operand* const toeplitz = shared.toeplitz + window * Shared::kToeplitz;
          line.fill(first, r0, noise);
          if constexpr (kDense)
            fill_toeplitz<Tile, false>(taps, p_.kernel_size[2], first, toeplitz);
          // One barrier is enough: a window is filled again only after the next one, which no warp
          // passes before all have used this window.
          __syncthreads();
          if constexpr (kDense) {
            product_.template multiply<kWindow, Major::kToeplitz, Major::kOuter>(toeplitz, noise);
          } else {
            add_taps(line, taps, first, r0, noise);
          }
          window = 1 - window;
        }
      }
    }
    const T* const constant =
        p_.constant == nullptr
            ? nullptr
            : static_cast<const T*>(p_.constant) +
                  (place.head * p_.in_features + place.d) * p_.num_realizations + r0;
    product_.for_each([&](int token, int r, T value) {
      const bool adds = constant != nullptr && r0 + r < p_.num_realizations;
      function(token, r, value * factor_ + (adds ? constant[r] : T(0)));
    });
  }

  // Calls function(token, realization) in the order of make.
  template <class Function>
  TORCH_SPE_DEVICE void for_each_place(const Function& function) {
    product_.for_each([&](int token, int r, T) { function(token, r); });
  }

 private:
  // Tap p of token t meets period q of realization r where q s + class(r) - origin = t + p.
  TORCH_SPE_DEVICE void add_taps(const NoiseLine<Tile>& line, const T* taps, std::int64_t first,
                                 std::int64_t r0, const T* noise) {
    const int stride = static_cast<int>(line.stride), size = static_cast<int>(p_.kernel_size[2]);
    product_.for_each([&](int token, int r, T& code) {
      const int lag =
          static_cast<int>(line.origin) + token -
          static_cast<int>(static_cast<std::uint32_t>(r0 + r) % static_cast<std::uint32_t>(stride));
      const int least = lag <= 0 ? 0 : (lag + stride - 1) / stride;
      int q = least > first ? least - static_cast<int>(first) : 0;
      for (std::int64_t tap = (first + q) * stride - lag; q < kWindow && tap < size;
           ++q, tap += stride)
        code += taps[tap] * noise[q * row_of<T>(kRealizations) + r];
    });
  }

  TORCH_SPE_DEVICE static T sqrt_of(std::int64_t value) {
    return static_cast<T>(__builtin_sqrt(static_cast<double>(value)));
  }

  const ConvFilterParams& p_;
  const T factor_;
  const std::uint64_t seed_;
  TileProduct<Operand, Tile::kTokens, kRealizations> product_;
};

}  // namespace torch_spe::cuda
