// Stands in for the CUDA runtime: what host code made by nvcc and the launchers call. Device memory
// is host memory, a launch runs to its end, and errors of kernels are C++ exceptions. PTX comes
// from the files *.ptx beside this library.
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <stdexcept>
#include <unordered_map>

#include "machine.h"

namespace {

struct CallConfiguration {
  dim3 grid, block;
  std::size_t shared;
  cudaStream_t stream;
};

// The folder of this library.
std::filesystem::path own_folder() {
  Dl_info info;
  if (dladdr(reinterpret_cast<const void*>(&own_folder), &info) == 0)
    throw std::runtime_error("the virtual GPU does not know where its library lies");
  return std::filesystem::absolute(info.dli_fname).parent_path();
}

vgpu::Program& program() {
  static vgpu::Program* value = [] {
    auto* p = new vgpu::Program;
    for (const auto& file : std::filesystem::directory_iterator(own_folder()))
      if (file.path().extension() == ".ptx") p->add_module(file.path());
    return p;
  }();
  return *value;
}

struct Function {
  std::string name;
  int most_shared = 48 * 1024;
};
std::unordered_map<const void*, Function>& functions() {
  static auto* value = new std::unordered_map<const void*, Function>;
  return *value;
}
Function& function_of(const void* host) {
  const auto found = functions().find(host);
  if (found == functions().end()) throw std::runtime_error("a launch of an unknown kernel");
  return found->second;
}

std::vector<CallConfiguration>& configurations() {
  static thread_local std::vector<CallConfiguration> value;
  return value;
}

constexpr int kMostSharedOptIn = 227 * 1024;

}  // namespace

namespace vgpu {
Program& loaded_program() { return program(); }
}  // namespace vgpu

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  functions()[host] = {name};
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, std::size_t, int, int) {}
char __cudaInitModule(void**) { return 1; }
// nvcc 13 asks for the kernel's handle first; here the function itself serves.
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, std::size_t shared,
                                     cudaStream_t stream) {
  configurations().push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, std::size_t* shared, void* stream) {
  const CallConfiguration c = configurations().back();
  configurations().pop_back();
  *grid = c.grid;
  *block = c.block;
  *shared = c.shared;
  *static_cast<cudaStream_t*>(stream) = c.stream;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** arguments,
                             std::size_t shared, cudaStream_t) {
  const Function& f = function_of(host);
  const vgpu::Kernel& kernel = program().kernel(f.name);
  if (static_cast<int>(kernel.shared_bytes + shared) > f.most_shared)
    throw std::runtime_error(f.name + ": " + std::to_string(shared) +
                             " bytes of shared memory, but the limit is " +
                             std::to_string(f.most_shared));
  vgpu::launch(kernel, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, arguments,
               static_cast<std::uint32_t>(shared));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               std::size_t shared, cudaStream_t stream) {
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared,
                          stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* host,
                                void** arguments) {
  return cudaLaunchKernel(host, config->gridDim, config->blockDim, arguments,
                          config->dynamicSmemBytes, config->stream);
}

cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value > kMostSharedOptIn) return cudaErrorInvalidValue;
    function_of(host).most_shared = value;
  }
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* host) {
  std::memset(attributes, 0, sizeof *attributes);
  const vgpu::Kernel& kernel = program().kernel(function_of(host).name);
  attributes->sharedSizeBytes = kernel.shared_bytes;
  attributes->maxThreadsPerBlock =
      kernel.max_threads == 0 ? 1024 : static_cast<int>(kernel.max_threads);
  attributes->ptxVersion = 90;
  attributes->binaryVersion = 90;
  attributes->numRegs = 64;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 132;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = 48 * 1024;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = kMostSharedOptIn;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = 2048;
      break;
    case cudaDevAttrMaxGridDimX:
      *value = 0x7fffffff;
      break;
    default:
      *value = 0;
  }
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*,
                                                                   int threads, std::size_t,
                                                                   unsigned) {
  *blocks = 2048 / (threads == 0 ? 1 : threads);
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* f, int threads,
                                                          std::size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, f, threads, shared, 0);
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error of the virtual GPU"; }
const char* cudaGetErrorName(cudaError_t) { return "virtual"; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  std::memmove(to, from, bytes);
  return cudaSuccess;
}

}  // extern "C"
