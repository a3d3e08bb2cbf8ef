// Runs the sine filter's CUDA kernels, forward and backward, in bfloat16 (at consecutive and at
// given positions, for which there are different kernels) and float32, under several schedules, and
// compares them with plain loops. Tests compile it with bugs planted in the kernels,
// which must make it fail.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <vector>

#include "sine_filter.cu"

namespace {

using namespace torch_spe;

// A heap block of exactly the values asked for.
template <class Storage>
std::vector<Storage> numbers(std::size_t size, unsigned seed) {
  std::vector<Storage> out(size);
  for (Storage& number : out) {
    seed = seed * 1664525u + 1013904223u;
    core::store(static_cast<float>(seed >> 8) * 0x1p-23f - 1.0f, &number);
  }
  return out;
}

double value_of(double number) { return number; }
template <class Storage>
double value_of(Storage number) {
  return static_cast<double>(core::load(number));
}

template <class Storage>
bool agree(const char* name, const std::vector<Storage>& got, const std::vector<double>& expected,
           double tolerance) {
  double scale = 0, error = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double difference = std::fabs(value_of(got[i]) - expected[i]);
    scale = std::fmax(scale, std::fabs(expected[i]));
    if (!(difference <= error)) error = difference;
  }
  if (error <= tolerance * scale) return true;
  std::printf("%s: error %g of %g\n", name, error, scale);
  return false;
}

template <class Storage>
bool run(core::DType dtype, bool given_positions, double tolerance) {
  constexpr std::int64_t B = 2, N = 70, H = 2, D = 17, K = 2, R = 72, J = 2 * K;
  const auto x = numbers<Storage>(B * N * H * D, 1), weight = numbers<Storage>(H * D * J * R, 2),
             grad_out = numbers<Storage>(B * N * H * R, 3);
  const auto freqs = numbers<double>(H * D * K, 4);
  std::vector<double> positions(N);
  for (std::int64_t n = 0; n < N; ++n) positions[n] = static_cast<double>(n);
  std::vector<double> out(B * N * H * R), grad_x(B * N * H * D), grad_weight(H * D * J * R),
      grad_freqs(freqs.size());
  for (std::int64_t b = 0; b < B; ++b) {
    for (std::int64_t n = 0; n < N; ++n) {
      for (std::int64_t h = 0; h < H; ++h) {
        for (std::int64_t d = 0; d < D; ++d) {
          const std::int64_t ix = ((b * N + n) * H + h) * D + d;
          for (std::int64_t j = 0; j < J; ++j) {
            const double angle = core::kTwoPi * freqs[(h * D + d) * K + j / 2] * n;
            const double basis = j % 2 == 0 ? std::cos(angle) : std::sin(angle);
            const double slope =
                core::kTwoPi * n * (j % 2 == 0 ? -std::sin(angle) : std::cos(angle));
            for (std::int64_t r = 0; r < R; ++r) {
              const std::int64_t io = ((b * N + n) * H + h) * R + r,
                                 iw = ((h * D + d) * J + j) * R + r;
              const double xv = core::load(x[ix]), w = core::load(weight[iw]),
                           g = core::load(grad_out[io]);
              out[io] += xv * basis * w;
              grad_x[ix] += g * basis * w;
              grad_weight[iw] += g * basis * xv;
              grad_freqs[(h * D + d) * K + j / 2] += g * slope * xv * w;
            }
          }
        }
      }
    }
  }

  std::vector<Storage> got_out(out.size()), got_grad_x(grad_x.size());
  std::vector<float> got_grad_weight(grad_weight.size());
  std::vector<double> got_grad_freqs(grad_freqs.size());
  cuda::SineFilterBackwardParams p{};
  p.dtype = dtype;
  p.batch = B;
  p.length = N;
  p.num_heads = H;
  p.in_features = D;
  p.num_sines = K;
  p.num_realizations = R;
  p.ndim = 1;
  p.x = x.data();
  p.freqs = freqs.data();
  p.weight = weight.data();
  p.out = got_out.data();
  p.grad_out = grad_out.data();
  p.grad_x = got_grad_x.data();
  p.grad_weight = got_grad_weight.data();
  if (given_positions) {
    p.positions = positions.data();
  } else {
    p.grad_freqs = got_grad_freqs.data();
  }
  const std::int64_t x_strides[4] = {N * H * D, H * D, D, 1},
                     g_strides[4] = {N * H * R, H * R, R, 1};
  for (int i = 0; i < 4; ++i) {
    p.x_strides[i] = x_strides[i];
    p.grad_out_strides[i] = g_strides[i];
  }
  cuda::sine_filter_forward(p, false, nullptr);
  std::vector<unsigned char> workspace(cuda::sine_filter_backward_workspace(p), 0xff);
  cuda::sine_filter_backward(p, workspace.data(), false, nullptr);
  const bool forward = agree("out", got_out, out, tolerance);
  const bool data = agree("grad_x", got_grad_x, grad_x, tolerance);
  const bool slopes = given_positions || agree("grad_freqs", got_grad_freqs, grad_freqs, tolerance);
  return agree("grad_weight", got_grad_weight, grad_weight, tolerance) && forward && data && slopes;
}

}  // namespace

int main() {
  bool good = true;
  for (const char* schedule : {"fifo", "lifo", "random:1", "random:2"}) {
    cuda_emulation::set_schedule(schedule);
    try {
      good = run<core::BFloat16>(core::DType::kBFloat16, false, 1e-2) && good;
      good = run<core::BFloat16>(core::DType::kBFloat16, true, 1e-2) && good;
      good = run<float>(core::DType::kFloat32, false, 1e-5) && good;
    } catch (const std::exception& error) {
      std::printf("%s\n", error.what());
      good = false;
    }
  }
  if (good) std::printf("good\n");
  return good ? 0 : 1;
}
