#include "cuda_emulation.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

#if defined(__x86_64__)
// Saves the registers that a call preserves on the old stack and takes them from the new one:
// several times faster than swapcontext, which asks the operating system about signals.
extern "C" void cuda_emulation_switch(void** old_stack, void* new_stack);
asm(R"(
.text
.type cuda_emulation_switch, @function
cuda_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_emulation_switch, .-cuda_emulation_switch
)");
#endif

namespace cuda_emulation {
namespace {

constexpr std::size_t kPage = 4096;
constexpr std::size_t kStackBytes = 256 * 1024;

// Memory for a fiber's stack; running off its end hits a guard page.
class Stack {
 public:
  Stack() {
    void* memory = mmap(nullptr, kStackBytes + kPage, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("no memory for the stacks of fibers");
    mprotect(memory, kPage, PROT_NONE);
    memory_ = static_cast<char*>(memory);
  }
  ~Stack() { munmap(memory_, kStackBytes + kPage); }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;
  char* bottom() const { return memory_ + kPage; }

 private:
  char* memory_;
};

// One stack of execution: a thread of the block, or the scheduler.
struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* fake_stack = nullptr;  // AddressSanitizer's
  const void* bottom = nullptr;
  std::size_t size = 0;
};

struct Copy {
  void* to;
  const void* from;
  std::size_t size;
};

enum class State { kReady, kAtBarrier, kInWarpOperation, kDone };

struct Fiber : Context {
  dim3 thread;
  unsigned index = 0;
  State state = State::kReady;
  const char* file = "";
  int line = 0;
  std::vector<Copy> copies;
};

// A warp operation that some lanes have not reached yet.
struct WarpOperation {
  unsigned warp;
  std::uint32_t mask;
  WarpFunction function;
  std::uint32_t arrived = 0;
  void* arguments[kWarp] = {};
};

struct Schedule {
  enum Kind { kFifo, kLifo, kRandom } kind = kFifo;
  std::mt19937 random;

  // Which of `count` candidates goes next.
  std::size_t choose(std::size_t count) {
    if (kind == kFifo) return 0;
    if (kind == kLifo) return count - 1;
    return random() % count;
  }
};

Schedule schedule;
std::int64_t num_launches = 0;

class Block;
Block* active = nullptr;

std::string at(const char* file, int line) {
  return std::string(file) + ":" + std::to_string(line);
}

class Block {
 public:
  Block(std::vector<std::unique_ptr<Stack>>& stacks, std::size_t shared_bytes,
        const std::function<void()>& body)
      : body_(body), shared_size_(shared_bytes) {
    // A fresh heap block of the exact size: AddressSanitizer finds what lies outside.
    shared_ = static_cast<unsigned char*>(std::malloc(shared_bytes));
    std::memset(shared_, 0xff, shared_bytes);
    const unsigned count = blockDim.x * blockDim.y * blockDim.z;
    while (stacks.size() < count) stacks.push_back(std::make_unique<Stack>());
    fibers_.resize(count);
    for (unsigned i = 0; i < count; ++i) {
      Fiber& fiber = fibers_[i];
      fiber.index = i;
      fiber.thread = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
      fiber.bottom = stacks[i]->bottom();
      fiber.size = kStackBytes;
      prepare(fiber);
      ready_.push_back(&fiber);
    }
  }
  ~Block() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(shared_, shared_size_);
#endif
    std::free(shared_);
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  void run() {
    active = this;
    while (!ready_.empty() && error_.empty()) {
      const std::size_t next = schedule.choose(ready_.size());
      current_ = ready_[next];
      ready_.erase(ready_.begin() + static_cast<std::ptrdiff_t>(next));
      threadIdx = current_->thread;
      switch_to(scheduler_, *current_);
    }
    active = nullptr;
    if (error_.empty()) report_sleepers();
    if (!error_.empty()) throw std::runtime_error(error_);
  }

  void sync_threads(const char* file, int line) {
    Fiber& self = *current_;
    self.file = file;
    self.line = line;
    self.state = State::kAtBarrier;
    unsigned waiting = 0;
    for (const Fiber& fiber : fibers_) {
      if (fiber.state == State::kDone)
        fail("__syncthreads at " + at(file, line) + ": thread " + std::to_string(fiber.index) +
             " has returned");
      if (fiber.state != State::kAtBarrier) continue;
      ++waiting;
      if (fiber.line != line || std::strcmp(fiber.file, file) != 0)
        fail("divergent __syncthreads: thread " + std::to_string(self.index) + " at " +
             at(file, line) + ", thread " + std::to_string(fiber.index) + " at " +
             at(fiber.file, fiber.line));
    }
    if (waiting < fibers_.size()) return sleep();
    for (Fiber& fiber : fibers_) wake(fiber);
    sleep();
  }

  void rendezvous(std::uint32_t mask, void* argument, WarpFunction function, const char* file,
                  int line) {
    Fiber& self = *current_;
    const unsigned warp = self.index / kWarp, lane = self.index % kWarp;
    if ((mask >> lane & 1u) == 0)
      fail("warp operation at " + at(file, line) + ": lane " + std::to_string(lane) +
           " is not in its own mask");
    WarpOperation* operation = nullptr;
    for (WarpOperation& pending : operations_) {
      if (pending.warp == warp && (pending.mask & mask) != 0) operation = &pending;
    }
    if (operation == nullptr) {
      operations_.push_back({warp, mask, function});
      operation = &operations_.back();
    }
    if (operation->mask != mask || operation->function != function)
      fail("warp operation at " + at(file, line) + ": lanes of a warp are in different operations");
    operation->arrived |= 1u << lane;
    operation->arguments[lane] = argument;
    self.file = file;
    self.line = line;
    self.state = State::kInWarpOperation;
    if (operation->arrived == mask) {
      function(operation->arguments);
      for (unsigned i = 0; i < kWarp; ++i) {
        if (mask >> i & 1u) wake(fibers_[warp * kWarp + i]);
      }
      for (auto it = operations_.begin(); it != operations_.end(); ++it) {
        if (&*it == operation) {
          operations_.erase(it);
          break;
        }
      }
    }
    sleep();
  }

  void copy_async(void* to, const void* from, std::size_t size) {
    if ((reinterpret_cast<std::uintptr_t>(to) | reinterpret_cast<std::uintptr_t>(from)) % size != 0)
      fail("an asynchronous copy is not aligned to " + std::to_string(size) + " bytes");
    current_->copies.push_back({to, from, size});
  }

  void copy_async_wait() {
    for (const Copy& copy : current_->copies) std::memcpy(copy.to, copy.from, copy.size);
    current_->copies.clear();
  }

  [[noreturn]] void fail(const std::string& message) {
    error_ = message;
    sleep();  // the scheduler does not come back
    std::abort();
  }

  unsigned char* shared() const { return shared_; }
  std::size_t shared_size() const { return shared_size_; }

 private:
  static void enter() {
    Block& block = *active;
    block.finish_switch(*block.current_, block.scheduler_);
    block.body_();
    block.current_->state = State::kDone;
    block.sleep();
    std::abort();
  }

  void prepare(Fiber& fiber) {
    char* bottom = static_cast<char*>(const_cast<void*>(fiber.bottom));
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(bottom,
                                  kStackBytes);  // a fiber before this one may have died here
#endif
#if defined(__x86_64__)
    // What cuda_emulation_switch pops: six registers and the address of enter, whose stack then
    // lies 8 bytes off a multiple of 16, as the ABI wants it at a function's entry.
    void** top = reinterpret_cast<void**>(bottom + kStackBytes) - 3;
    *--top = reinterpret_cast<void*>(&enter);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    fiber.stack_pointer = top;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = bottom;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &enter, 0);
#endif
  }

  void switch_to(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.size);
#endif
#if defined(__x86_64__)
    cuda_emulation_switch(&from.stack_pointer, to.stack_pointer);
#else
    swapcontext(&from.context, &to.context);
#endif
    finish_switch(from, to);
  }

  // After coming back to `self`; the first time a fiber runs, the scheduler's stack becomes known.
  void finish_switch([[maybe_unused]] Context& self, [[maybe_unused]] Context& from) {
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom = nullptr;
    std::size_t size = 0;
    __sanitizer_finish_switch_fiber(self.fake_stack, &bottom, &size);
    if (&from == &scheduler_) {
      scheduler_.bottom = bottom;
      scheduler_.size = size;
    }
#endif
  }

  void sleep() { switch_to(*current_, scheduler_); }

  void wake(Fiber& fiber) {
    fiber.state = State::kReady;
    ready_.push_back(&fiber);
  }

  void report_sleepers() {
    for (const Fiber& fiber : fibers_) {
      if (fiber.state == State::kDone) continue;
      error_ = "deadlock: thread " + std::to_string(fiber.index) + " waits for others at " +
               at(fiber.file, fiber.line);
      return;
    }
  }

  const std::function<void()>& body_;
  std::size_t shared_size_;
  unsigned char* shared_;
  std::vector<Fiber> fibers_;
  std::deque<Fiber*> ready_;
  std::deque<WarpOperation> operations_;
  Context scheduler_;
  Fiber* current_ = nullptr;
  std::string error_;
};

}  // namespace

void set_schedule(const std::string& name) {
  schedule = Schedule();
  if (name == "fifo") return;
  if (name == "lifo") {
    schedule.kind = Schedule::kLifo;
  } else if (name.rfind("random:", 0) == 0) {
    schedule.kind = Schedule::kRandom;
    schedule.random.seed(static_cast<unsigned>(std::stoul(name.substr(7))));
  } else {
    throw std::runtime_error("schedule must be fifo, lifo or random:SEED, got " + name);
  }
}

void run(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& body) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535)
    throw std::runtime_error("invalid grid");
  if (block.x * block.y * block.z == 0 || block.x * block.y * block.z > 1024)
    throw std::runtime_error("a block has 1 to 1024 threads");
  if (shared_bytes > kMaxSharedBytes)
    throw std::runtime_error("a block cannot have " + std::to_string(shared_bytes) +
                             " bytes of shared memory");
  ++num_launches;
  static std::vector<std::unique_ptr<Stack>> stacks;
  gridDim = grid;
  blockDim = block;
  std::deque<std::size_t> blocks(static_cast<std::size_t>(grid.x) * grid.y * grid.z);
  for (std::size_t i = 0; i < blocks.size(); ++i) blocks[i] = i;
  while (!blocks.empty()) {
    const std::size_t next = schedule.choose(blocks.size());
    const std::size_t index = blocks[next];
    blocks.erase(blocks.begin() + static_cast<std::ptrdiff_t>(next));
    blockIdx =
        dim3(static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
             static_cast<unsigned>(index / grid.x / grid.y));
    Block(stacks, shared_bytes, body).run();
  }
}

std::int64_t launches() { return num_launches; }
void fail(const std::string& message) { active->fail(message); }
void sync_threads(const char* file, int line) { active->sync_threads(file, line); }
void rendezvous(std::uint32_t mask, void* argument, WarpFunction function, const char* file,
                int line) {
  active->rendezvous(mask, argument, function, file, line);
}
void copy_async(void* to, const void* from, std::size_t size) {
  active->copy_async(to, from, size);
}
void copy_async_wait() { active->copy_async_wait(); }
void nothing(void* const (&)[kWarp]) {}
unsigned char* shared_memory() { return active->shared(); }
std::size_t shared_size() { return active->shared_size(); }

void poison([[maybe_unused]] const void* begin, [[maybe_unused]] std::size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(begin, size);
#endif
}

}  // namespace cuda_emulation
