#pragma once

#include "phasor_filter.h"

namespace torch_spe::cuda {

// Sums over positions, of the segments that they are cut into.
struct PhasorGradientParts {
  double* freqs;         // [segment, H, D, R/2, ndim]
  double* coefficients;  // [segment, H, D, R/2, 2]
  double* constant;      // [segment, H, D, R]
};

}  // namespace torch_spe::cuda
