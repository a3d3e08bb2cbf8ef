// What the CPU kernels consist of, each part on its own: python -m benchmarks.pieces compiles this
// for an instruction set and runs it on one thread. Prints lines `name|batch|value`; times are in
// milliseconds for [B, N, H, D] of B = batch, N = 1024, H = 8, D = E = R = 64, K = 10, a constant,
// float32, rates in GFLOP/s. Tensors come from memory: calls take copies of them in turns.
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdio>

#include "cpu/attention/forward.cpp"
#include "cpu/attention/one_position.cpp"
#include "cpu/sine_filter_forward.cpp"

namespace torch_spe::cpu::TORCH_SPE_ISA {
namespace {

constexpr std::int64_t kLength = 1024, kHeads = 8, kSize = 64, kSines = 10, kRows = 2 * kSines + 1;

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The least of the times of a call in milliseconds, of half a second of calls.
template <class Function>
double time_of(const Function& function) {
  double least = 1e9;
  function();
  for (const double end = now() + 0.5; now() < end;) {
    const double begin = now();
    function();
    least = std::min(least, (now() - begin) * 1e3);
  }
  return least;
}

void print(const char* name, std::int64_t batch, double value) {
  std::printf("%s|%d|%.6g\n", name, static_cast<int>(batch), value);
  std::fflush(stdout);
}

class Buffer {
 public:
  explicit Buffer(std::int64_t size, std::int64_t copies = 1)
      : size_(size), copies_(copies), work_(size * copies) {
    for (std::int64_t i = 0; i < size * copies; ++i)
      work_[i] = static_cast<float>(i * 7919 % 1000) / 500 - 1;
  }
  float* get() { return work_.get(); }
  float* next() { return work_.get() + next_++ % copies_ * size_; }

 private:
  std::int64_t size_, copies_, next_ = 0;
  Workspace<float> work_;
};

// As many that they fill no cache.
std::int64_t copies_of(std::int64_t size) { return max_of(2, (std::int64_t{1} << 26) / size); }

core::SineFilterParams sine_params(std::int64_t batch, Buffer& weight, Buffer& constant,
                                   double* freqs) {
  core::SineFilterParams p{};
  p.dtype = core::DType::kFloat32;
  p.batch = batch;
  p.length = kLength;
  p.num_heads = kHeads;
  p.in_features = p.num_realizations = kSize;
  p.num_sines = kSines;
  p.ndim = p.num_threads = 1;
  p.x_strides[0] = kLength * kHeads * kSize;
  p.x_strides[1] = kHeads * kSize;
  p.x_strides[2] = kSize;
  p.x_strides[3] = 1;
  p.freqs = freqs;
  p.weight = weight.get();
  p.constant = constant.get();
  return p;
}

// The sine filter, forward, and what it is made of.
void measure_sine(std::int64_t batch) {
  const std::int64_t size = batch * kLength * kHeads * kSize;
  Buffer x(size, copies_of(size)), out(size, copies_of(size));
  Buffer weight(kHeads * kSize * kRows * kSize), constant(kHeads * kSize * kSize);
  Workspace<double> freqs(kHeads * kSize * kSines);
  for (std::int64_t i = 0; i < kHeads * kSize * kSines; ++i)
    freqs[i] = static_cast<double>(i % 101) * 0.004 + 0.001;
  core::SineFilterParams p = sine_params(batch, weight, constant, freqs.get());
  print("sine filter", batch, time_of([&] {
          p.x = x.next();
          p.out = out.next();
          sine_filter_forward(p);
        }));
  // Memory that each call gets from the system, as PyTorch's allocator does for large tensors.
  const auto bytes = static_cast<std::size_t>(size) * sizeof(float);
  print("sine filter, new memory", batch, time_of([&] {
          p.x = x.next();
          p.out = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
          sine_filter_forward(p);
          munmap(p.out, bytes);
        }));

  const std::int64_t group = batch == 1 ? group_size<float>(p, kSineTile, kOneRowCodeTileBytes)
                                        : group_size<float>(p, kCodePositions, kCodeTileBytes);
  const std::int64_t stride = code_stride<float>(group, kSize), tiles = kLength / kSineTile;
  Buffer basis(kSize * kRows * kSineTile), code(kCodePositions * stride);
  Buffer tile_x(kSineTile * batch * kSize), tile_y(kSineTile * batch * kSize);
  Buffer all_codes(kSize * kSize), turned(kSize * kSize);
  SineBasis<float> basis_of(p);
  const auto each_head = [&](const auto& function) {
    for (std::int64_t head = 0; head < kHeads; ++head) {
      for (std::int64_t tile = 0; tile < tiles; ++tile) function(head, tile * kSineTile);
    }
  };
  print("sine filter: basis", batch, time_of([&] {
          each_head([&](std::int64_t head, std::int64_t n0) {
            for (std::int64_t d0 = 0; d0 < kSize; d0 += group)
              basis_of.fill(head, n0, kSineTile, d0, min_of(group, kSize - d0), basis.get());
          });
        }));
  const auto each_group = [&](const auto& function) {
    for (std::int64_t d0 = 0; d0 < kSize; d0 += group) {
      for (std::int64_t t0 = 0; t0 < kSineTile; t0 += kCodePositions)
        function(min_of(group, kSize - d0), min_of(kCodePositions, kSineTile - t0), t0);
    }
  };
  if (batch > 1) {
    const double codes = time_of([&] {
      each_group([&](std::int64_t count, std::int64_t positions, std::int64_t t0) {
        for (std::int64_t d = 0; d < count; ++d)
          code_tile(positions, kSize, kRows, basis.get() + d * kRows * kSineTile + t0,
                    weight.get() + d * kRows * kSize, code.get() + d * kSize, stride);
      });
    });
    const double contracted = time_of([&] {
      each_group([&](std::int64_t count, std::int64_t positions, std::int64_t t0) {
        for (std::int64_t t = 0; t < positions; ++t)
          contract(batch, count, kSize, tile_x.get() + (t0 + t) * batch * kSize, kSize,
                   code.get() + t * stride, tile_y.get() + (t0 + t) * batch * kSize);
      });
    });
    // Backward, the gradient of x: sums along rows of codes, or a product with their transpose.
    const double dots = time_of([&] {
      for (std::int64_t t = 0; t < kSineTile; ++t)
        dot(batch, kSize, kSize, tile_y.get() + t * batch * kSize, all_codes.get(),
            tile_x.get() + t * batch * kSize);
    });
    const double transposing = time_of([&] {
      for (std::int64_t t = 0; t < kSineTile; ++t) {
        transpose(kSize, kSize, all_codes.get(), kSize, turned.get(), kSize);
        multiply(batch, kSize, kSize, plain<float>(tile_y.get() + t * batch * kSize, kSize),
                 turned.get(), kSize, 0.0f, tile_x.get() + t * batch * kSize, kSize);
      }
    });
    const double outers = time_of([&] {
      for (std::int64_t t = 0; t < kSineTile; ++t)
        outer(batch, kSize, kSize, tile_x.get() + t * batch * kSize,
              tile_y.get() + t * batch * kSize, turned.get());
    });
    const double elements = static_cast<double>(kSineTile) * kSize * kSize;
    const double products = 2e-6 * static_cast<double>(batch) * elements;
    print("gradient of x, rate", batch, products / dots);
    print("gradient of x by a transpose, rate", batch, products / transposing);
    print("gradient of codes, rate", batch, products / outers);
    print("sine filter: codes", batch, codes * static_cast<double>(tiles * kHeads));
    print("sine filter: products with x", batch, contracted * static_cast<double>(tiles * kHeads));
    print("codes, rate", batch, 2e-6 * kRows * elements / codes);
    print("products with x, rate", batch, products / contracted);
  }
  print("sine filter: rows of x", batch, time_of([&] {
          p.x = x.next();
          each_head([&](std::int64_t head, std::int64_t n0) {
            load_x<float>(p, head, n0, kSineTile, 0, kSize, tile_x.get());
          });
        }));
  const auto store = [&](float* to) {
    each_head([&](std::int64_t head, std::int64_t n0) {
      for (std::int64_t b = 0; b < batch; ++b) {
        for (std::int64_t t = 0; t < kSineTile; ++t)
          store_row(tile_y.get() + (t * batch + b) * kSize, 1, kSize,
                    to + ((b * kLength + n0 + t) * kHeads + head) * kSize);
      }
    });
  };
  print("sine filter: rows of the output", batch, time_of([&] { store(out.next()); }));
  print("sine filter: rows of the output, new memory", batch, time_of([&] {
          void* to =
              mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
          store(static_cast<float*>(to));
          munmap(to, bytes);
        }));
}

// Linear attention, forward, and its products: of chunks of 64 tokens.
void measure_attention(std::int64_t batch, bool causal) {
  const std::int64_t size = batch * kLength * kHeads * kSize, chunk = 64;
  const std::int64_t copies = copies_of(size);
  Buffer q(size, copies), k(size, copies), v(size, copies), out(size, copies);
  core::LinearAttentionParams p{};
  p.dtype = core::DType::kFloat32;
  p.feature_map = core::FeatureMap::kElu;
  p.causal = causal;
  p.normalize = true;
  p.eps = 1e-6;
  p.num_sequences = batch;
  p.num_heads = kHeads;
  p.query_length = p.key_length = kLength;
  p.num_realizations = p.value_features = kSize;
  p.num_threads = 1;
  const std::int64_t strides[4] = {kLength * kHeads * kSize, kHeads * kSize, kSize, 1};
  for (int i = 0; i < 4; ++i) p.q_strides[i] = p.k_strides[i] = p.v_strides[i] = strides[i];
  const char* const kind = causal ? "causal attention" : "attention";
  char name[64];
  const auto print_part = [&](const char* part, double value) {
    std::snprintf(name, sizeof(name), "%s%s", kind, part);
    print(name, batch, value);
  };
  print_part("", time_of([&] {
               p.q = q.next();
               p.k = k.next();
               p.v = v.next();
               p.out = out.next();
               linear_attention_forward(p);
             }));
  Buffer a(chunk * kSize), b(kSize * kSize), c(kSize * kSize);
  const auto product = [&](Skip skip) {
    multiply(chunk, kSize, kSize, plain<float>(a.get(), kSize), b.get(), kSize, 0.0f, c.get(),
             kSize, skip);
  };
  const double chunks = static_cast<double>(batch * kLength * kHeads / chunk);
  print_part(": products", chunks * time_of([&] {
                             if (causal) {
                               product(Skip::kUpperOfC);  // weights
                               product(Skip::kUpperOfA);  // times values
                             }
                             product(Skip::kNothing);  // what the state gives
                             product(Skip::kNothing);  // what is added to it
                           }));
  const auto load = [&](auto map, const float* from) {
    for (std::int64_t n = 0; n < batch * kLength; n += chunk) {
      for (std::int64_t head = 0; head < kHeads; ++head) {
        for (std::int64_t t = 0; t < chunk; ++t)
          load_mapped_row<decltype(map)::value>(from + ((n + t) * kHeads + head) * kSize, 1, kSize,
                                                a.get() + t * kSize);
      }
    }
  };
  using Elu = FeatureMapTag<core::FeatureMap::kElu>;
  using Identity = FeatureMapTag<core::FeatureMap::kIdentity>;
  print_part(": rows with elu", time_of([&] {
               load(Elu{}, q.next());
               load(Elu{}, k.next());
               load(Identity{}, v.next());
             }));
  print_part(": rows without", time_of([&] {
               load(Identity{}, q.next());
               load(Identity{}, k.next());
               load(Identity{}, v.next());
             }));
}

}  // namespace
}  // namespace torch_spe::cpu::TORCH_SPE_ISA

int main() {
  using namespace torch_spe::cpu::TORCH_SPE_ISA;
  for (const std::int64_t batch : {1, 2, 4, 8, 16}) measure_sine(batch);
  for (const std::int64_t batch : {1, 4}) {
    measure_attention(batch, true);
    measure_attention(batch, false);
  }
}
