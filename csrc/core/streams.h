// The random streams of a seed: which consumer draws which part of it. Values of different streams
// are independent. This is the only list of them; Python sees it as torch_spe.noise.STREAMS.
//
// A stream of seeded normals (torch_spe.noise.seeded_normal) begins at position stream * 2^48 of
// the generated noise; phase_noise and circle_noise have the stream in their counter
// (core/codes.h). Within a stream, kinds of values are told apart by the purpose (core/noise.h).
#pragma once

#include <cstdint>

namespace torch_spe::core {

enum class Stream : std::int64_t {
  kCode = 0,               // noise of a positional code
  kGate = 1,               // noise of a gate's part without positions
  kFeatureRows = 2,        // rows of PositiveFeatures; of orthogonal ones the norms
  kFeatureDirections = 3,  // directions of the orthogonal rows of PositiveFeatures
};

struct NamedStream {
  const char* name;
  Stream stream;
};
inline constexpr NamedStream kStreams[] = {
    {"code", Stream::kCode},
    {"gate", Stream::kGate},
    {"feature_rows", Stream::kFeatureRows},
    {"feature_directions", Stream::kFeatureDirections},
};

}  // namespace torch_spe::core
