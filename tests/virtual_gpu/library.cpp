// Lets PyTorch run torch_spe's operators on CPU tensors through the CUDA kernels on the virtual
// GPU:
//   torch.ops.load_library("libtorch_spe_virtual_gpu.so")
//   torch.ops.torch_spe_virtual_gpu.enable(True)
// after which tensors that are made must lie in memory that this library's allocator knows.
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <sstream>
#include <utility>
#include <vector>

#include "machine.h"
#include "ops/kernels.h"

namespace vgpu {
Program& loaded_program();
}

namespace torch_spe::ops {
bool register_cuda_kernels();
}

namespace {

// Tells the virtual GPU what memory tensors have, so that kernels can be kept inside. Between two
// allocations lies a gap that belongs to none.
class TrackedAllocator final : public c10::Allocator {
 public:
  static constexpr std::size_t kGap = 256;
  c10::DataPtr allocate(std::size_t bytes) override {
    if (bytes == 0) return {nullptr, c10::Device(c10::kCPU)};
    void* memory = nullptr;
    if (posix_memalign(&memory, kGap, bytes + 2 * kGap) != 0) throw std::bad_alloc();
    char* data = static_cast<char*>(memory) + kGap;
    vgpu::add_range(reinterpret_cast<std::uintptr_t>(data), bytes);
    return {data, data, &free_data, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_data; }
  void copy_data(void* to, const void* from, std::size_t count) const override {
    default_copy_data(to, from, count);
  }

 private:
  static void free_data(void* data) {
    if (data == nullptr) return;
    vgpu::remove_range(reinterpret_cast<std::uintptr_t>(data));
    std::free(static_cast<char*>(data) - kGap);
  }
};

bool install_allocator() {
  static auto* allocator = new TrackedAllocator;
  const char* off = std::getenv("TORCH_SPE_VIRTUAL_GPU_BOUNDS");
  if (off != nullptr && std::string(off) == "0") return false;
  c10::SetCPUAllocator(allocator, 1);
  vgpu::set_ranges(true);
  return true;
}
[[maybe_unused]] const bool installed = install_allocator();

std::int64_t number_of(const char* name, std::int64_t otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : std::atoll(value);
}
const bool configured = [] {
  vgpu::Options& o = vgpu::options();
  o.threads = static_cast<int>(number_of("TORCH_SPE_VIRTUAL_GPU_THREADS", 2));
  o.races = number_of("TORCH_SPE_VIRTUAL_GPU_RACES", 1) != 0;
  o.global_races = number_of("TORCH_SPE_VIRTUAL_GPU_GLOBAL_RACES", 0) != 0;
  o.warp_races = number_of("TORCH_SPE_VIRTUAL_GPU_WARP_RACES", 0) != 0;
  o.rough = number_of("TORCH_SPE_VIRTUAL_GPU_ROUGH", 0) != 0;
  vgpu::set_rough(o.rough);
  return true;
}();

void set_schedule(const std::string& name) {
  vgpu::Options& o = vgpu::options();
  if (name == "fifo") {
    o.order = 0;
  } else if (name == "lifo") {
    o.order = 1;
  } else if (name.rfind("random:", 0) == 0) {
    o.order = 2;
    o.seed = std::stoull(name.substr(7));
  } else {
    throw std::runtime_error("schedule must be fifo, lifo or random:SEED, got " + name);
  }
}

// Counts launches, at most `sample` blocks of each, until it is called with profile = False.
void profile(bool wanted, std::int64_t sample) {
  vgpu::Options& o = vgpu::options();
  o.profile = wanted;
  o.sample = static_cast<std::uint64_t>(sample);
  o.races = !wanted && number_of("TORCH_SPE_VIRTUAL_GPU_RACES", 1) != 0;
  vgpu::history().clear();
}

std::string escaped(const std::string& s) {
  std::string out;
  for (const char c : s) {
    if (c == '"' || c == '\\') out += '\\';
    out += c == '\t' ? ' ' : c;
  }
  return out;
}

// The recorded launches as JSON.
std::string report() {
  std::ostringstream out;
  out << "[";
  bool first = true;
  for (const vgpu::Launch& l : vgpu::history()) {
    if (!first) out << ",\n";
    first = false;
    out << "{\"kernel\": \"" << l.kernel->name << "\", \"grid\": [" << l.grid.x << ", " << l.grid.y
        << ", " << l.grid.z << "], \"block\": [" << l.block.x << ", " << l.block.y << ", "
        << l.block.z << "], \"static_shared\": " << l.kernel->shared_bytes
        << ", \"dynamic_shared\": " << l.dynamic_shared
        << ", \"executed_blocks\": " << l.executed_blocks
        << ", \"warp_hazards\": " << l.intra_warp_hazards << ", \"warp_hazard\": \""
        << escaped(l.intra_warp_example) << "\", \"traffic\": [";
    bool comma = false;
    for (const auto& [begin, t] : l.traffic) {
      out << (comma ? ", " : "") << "[" << t.size << ", " << t.read << ", " << t.written << "]";
      comma = true;
    }
    out << "], \"instructions\": [";
    comma = false;
    for (std::size_t i = 0; i < l.counts.size(); ++i) {
      const vgpu::Counts& c = l.counts[i];
      if (c.warps == 0) continue;
      out << (comma ? ",\n " : "\n ") << "[" << i << ", \"" << escaped(l.kernel->text[i])
          << "\", \"" << l.kernel->place[i] << "\", " << c.warps << ", " << c.lanes << ", "
          << c.units << ", " << c.ideal << "]";
      comma = true;
    }
    out << "]}";
  }
  out << "]";
  return out.str();
}

// Launches a kernel of a PTX file that has no host code (made by triton). Arguments as 64-bit
// words.
void launch_ptx(const std::string& path, const std::string& name, at::IntArrayRef grid,
                std::int64_t threads, std::int64_t shared, at::IntArrayRef arguments) {
  static std::map<std::string, std::unique_ptr<vgpu::Program>> programs;
  auto& program = programs[path];
  if (!program) {
    program = std::make_unique<vgpu::Program>();
    program->add_module(path);
  }
  const vgpu::Kernel& kernel = program->kernel(name);
  std::vector<std::int64_t> words(arguments.begin(), arguments.end());
  words.resize(std::max(words.size(), kernel.parameters.size()), 0);
  std::vector<void*> pointers;
  for (auto& w : words) pointers.push_back(&w);
  const auto u = [](std::int64_t x) { return static_cast<std::uint32_t>(x); };
  vgpu::launch(kernel, {u(grid[0]), u(grid[1]), u(grid[2])}, {u(threads), 1, 1}, pointers.data(),
               u(shared));
}

// Another library of this kind may have been loaded after this one.
void enable(bool enabled) {
  if (enabled) torch_spe::ops::register_cuda_kernels();
  torch_spe::ops::use_alternative_kernels(enabled);
}

TORCH_LIBRARY(torch_spe_virtual_gpu, m) {
  m.def("enable(bool enabled) -> ()", enable);
  m.def("launches() -> int", vgpu::launches);
  m.def("set_schedule(str schedule) -> ()",
        [](const std::string& schedule) { set_schedule(schedule); });
  m.def("profile(bool wanted, int sample) -> ()", profile);
  m.def("report() -> str", report);
  // Decodes every kernel; the names of those that it cannot, with the reason.
  m.def("check_kernels() -> str", [] {
    std::string bad;
    for (const std::string& name : vgpu::loaded_program().kernel_names()) {
      try {
        vgpu::loaded_program().kernel(name);
      } catch (const std::exception& e) {
        bad += name + ": " + e.what() + "\n";
      }
    }
    return bad;
  });
  m.def(
      "launch_ptx(str path, str name, int[] grid, int threads, int shared, int[] arguments) -> ()",
      [](const std::string& path, const std::string& name, at::IntArrayRef grid,
         std::int64_t threads, std::int64_t shared,
         at::IntArrayRef arguments) { launch_ptx(path, name, grid, threads, shared, arguments); });
  m.def("kernel_count() -> int",
        [] { return static_cast<std::int64_t>(vgpu::loaded_program().kernel_names().size()); });
}

}  // namespace
