// Runs the source of CUDA kernels on the CPU, for tests: what csrc/cuda/runtime.h and
// csrc/cuda/primitives.h take from CUDA when they are compiled with TORCH_SPE_CUDA_EMULATION.
//
// The threads of a block are fibers on one thread of the operating system, and blocks run one after
// the other. A fiber runs until it waits, at a barrier or for the other lanes of a warp operation;
// the schedule decides which one goes on then, so that a missing barrier shows under some schedule.
// Shared memory starts out as NaN in every block, and is a heap block of exactly the size asked
// for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __syncthreads() ::cuda_emulation::sync_threads(__FILE__, __LINE__)
#define __syncwarp() \
  ::cuda_emulation::rendezvous(0xffffffffu, nullptr, ::cuda_emulation::nothing, __FILE__, __LINE__)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the fiber that is running.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_emulation {

constexpr int kWarp = 32;
constexpr std::size_t kMaxSharedBytes = 99 * 1024;  // of the smallest supported architectures

// "fifo", "lifo" or "random:SEED": which ready thread, and which block, runs next.
void set_schedule(const std::string& schedule);

// Runs `body` in every thread of every block. Throws std::runtime_error when threads deadlock or
// break a rule of barriers and warp operations.
void run(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& body);

// How many times `run` was called.
std::int64_t launches();

// Ends the launch with an error; called inside a kernel.
[[noreturn]] void fail(const std::string& message);

// Waits for all threads of the block; all must be at the same line.
void sync_threads(const char* file, int line);

// A warp operation: every lane of `mask` brings an argument, and the last to arrive calls
// `function` with those of all lanes (null for lanes outside the mask).
using WarpFunction = void (*)(void* const (&arguments)[kWarp]);
void rendezvous(std::uint32_t mask, void* argument, WarpFunction function, const char* file,
                int line);
void nothing(void* const (&arguments)[kWarp]);

// The bytes arrive at the thread's next copy_async_wait, so that a missing wait shows.
void copy_async(void* to, const void* from, std::size_t size);
void copy_async_wait();

unsigned char* shared_memory();
std::size_t shared_size();

// Under AddressSanitizer an access to [begin, begin + size) is an error until the block ends.
void poison(const void* begin, std::size_t size);

}  // namespace cuda_emulation
