// The schemas of all operators, in one place.
#include <torch/library.h>

TORCH_LIBRARY(torch_spe, m) {
  m.def(
      "sine_filter(Tensor x, Tensor freqs, Tensor weight, Tensor? constant=None, Tensor? "
      "positions=None, "
      "float start=0.0) -> Tensor");
  m.def(
      "sine_filter_backward(Tensor grad_out, Tensor x, Tensor freqs, Tensor weight, Tensor? "
      "constant, "
      "Tensor? positions, float start, bool[5] output_mask) -> (Tensor, Tensor, Tensor, Tensor, "
      "Tensor)");
  m.def(
      "phasor_filter(Tensor x, Tensor freqs, Tensor coefficients, Tensor? constant=None, Tensor? "
      "positions=None, float start=0.0) -> Tensor");
  m.def(
      "phasor_filter_backward(Tensor grad_out, Tensor x, Tensor freqs, Tensor coefficients, "
      "Tensor? constant, Tensor? positions, float start, bool[5] output_mask) -> (Tensor, Tensor, "
      "Tensor, Tensor, Tensor)");
}
