// A functional model of a CUDA device that executes PTX: what the parser, the instructions and the
// launcher share.
//
// A kernel is decoded once into a flat array of instructions. A warp's registers are arrays of 32
// lanes, so that an instruction is a loop over lanes that the host compiler turns into vector
// code. Immediates and special registers live in the same register file, as constants: an
// instruction knows nothing but byte offsets into it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace vgpu {

constexpr int kLanes = 32;
constexpr std::uint32_t kAll = 0xffffffffu;
// Where shared memory starts in the 32-bit shared window: not at 0, as on devices that keep the
// first kilobyte for themselves, so that an address of 0 is an error.
constexpr std::uint32_t kSharedBase = 1024;
// Generic addresses of shared memory: an unmapped window, so that host code cannot touch it.
constexpr std::uint64_t kSharedWindow = 0x7eff00000000ull;

struct Warp;
struct Inst;
using Handler = void (*)(Warp&, const Inst&);

// Spaces that instructions address.
enum class Space : std::uint8_t { kGlobal, kShared, kParam, kLocal, kGeneric };

struct Inst {
  Handler fn = nullptr;
  std::uint32_t o[5] = {};     // byte offsets of operands in the register file
  std::int32_t imm = 0;        // offset of an address, or a mode
  std::uint32_t guard = 0;     // byte offset of the guard predicate, 0 for none
  std::uint32_t target = 0;    // of a branch; or where operands start in Kernel::extra
  std::uint8_t guard_not = 0;  // the guard is negated
  std::uint8_t vector = 1;     // values of a vector access
  std::uint8_t bytes = 0;      // bytes of one number of an access
  std::uint8_t flags = 0;
};

struct Parameter {
  std::string name;
  std::uint32_t offset, size;
};

struct Kernel {
  std::string name;
  std::string target;  // sm_90
  std::vector<Inst> code;
  std::vector<std::uint32_t> extra;  // operands of instructions with many of them
  std::vector<std::string> text;     // the PTX of each instruction
  std::vector<std::string> place;    // file:line where -lineinfo told, else empty
  std::vector<Parameter> parameters;
  std::uint32_t parameter_bytes = 0;
  std::uint32_t shared_bytes = 0;  // static; dynamic shared memory follows
  std::uint32_t local_bytes = 0;
  std::uint32_t register_bytes = 64;  // of one warp's register file; offset 0 means none
  std::uint32_t max_threads = 0;      // .maxntid
  std::uint32_t min_blocks = 0;       // .minnctapersm
  // Constants of the register file: every lane holds the value.
  struct Constant {
    std::uint32_t offset, bytes;
    std::uint64_t value;
  };
  std::vector<Constant> constants;
  // Special registers, by name, where they are used.
  std::map<std::string, std::uint32_t> special;
};

// Reads modules of PTX; kernels are decoded when they are first asked for.
class Program {
 public:
  void add_module(const std::string& path);
  // Throws std::runtime_error for what is unknown or not supported.
  const Kernel& kernel(const std::string& name);
  std::vector<std::string> kernel_names() const;

 private:
  struct Entry {
    std::shared_ptr<std::string> text;
    std::size_t begin, end;  // from the entry's name to the end of its body
    std::shared_ptr<std::vector<std::string>> files;
    std::string target;
    std::unique_ptr<Kernel> decoded;
  };
  std::map<std::string, Entry> entries_;
};

// Counts of one instruction, over the blocks that were executed.
struct Counts {
  std::uint64_t warps = 0;  // times a warp executed it
  std::uint64_t lanes = 0;  // active lanes of these
  // Of accesses to global memory: 32-byte sectors and 128-byte lines; of shared memory: passes
  // over the banks, and passes without conflicts.
  std::uint64_t units = 0, ideal = 0;
};

// Memory that kernels may touch.
struct Range {
  std::uint64_t begin, end;
};
void set_ranges(bool enforce);  // whether accesses outside of known ranges are errors
void add_range(std::uint64_t begin, std::uint64_t size);
void remove_range(std::uint64_t begin);

struct Dim3 {
  std::uint32_t x = 1, y = 1, z = 1;
  std::uint64_t count() const { return static_cast<std::uint64_t>(x) * y * z; }
};

struct Options {
  int threads = 2;            // of the host
  bool races = true;          // look for hazards in shared memory
  bool global_races = false;  // ... in global memory, between blocks
  bool warp_races = false;    // ... between lanes of a warp without bar.warp.sync, as errors
  bool profile = false;       // count sectors and bank conflicts
  bool rough = false;         // approximate functions at the bound of their documented error
  std::uint64_t sample = 0;   // execute at most this many blocks of a launch, 0: all
  int order = 0;              // of warps: 0 ascending, 1 descending, 2 random
  std::uint64_t seed = 1;
};
Options& options();

// One launch, with what was counted.
struct Launch {
  const Kernel* kernel = nullptr;
  Dim3 grid, block;
  std::uint32_t dynamic_shared = 0;
  std::uint64_t executed_blocks = 0;
  std::vector<Counts> counts;
  // Bytes in whole sectors that blocks read and wrote, each sector once a block, by allocation.
  struct Traffic {
    std::uint64_t size = 0, read = 0, written = 0;
  };
  std::map<std::uint64_t, Traffic> traffic;
  std::uint64_t intra_warp_hazards = 0;
  std::string intra_warp_example;
};

std::vector<Launch>& history();  // of profiled launches
std::int64_t launches();
// Runs a kernel to its end. Throws std::runtime_error where it breaks a rule.
void launch(const Kernel& kernel, Dim3 grid, Dim3 block, void** arguments,
            std::uint32_t dynamic_shared);

// --- Execution ---

// State of 2 bytes of shared memory, for finding hazards. Epochs count barriers and never repeat
// within a worker, so that nothing needs to be cleared between blocks.
struct Shadow {
  std::uint64_t write_epoch = 0, read_epoch = 0, copy_epoch = 0;
  std::uint32_t write_pc = 0, read_pc = 0;
  std::uint32_t write_sync = 0, read_sync = 0;  // warp-wide barriers of the warp so far
  std::uint32_t read_warps = 0;                 // warps that read in this epoch
  std::uint16_t write_thread = 0, read_thread = 0;
  bool read_by_several = false;
};

struct Copy {
  std::uint32_t shared;
  std::uint64_t global;
  std::uint8_t bytes, source_bytes;
  std::uint32_t group;
  std::uint32_t pc;
};

struct Group {  // lanes at the same place
  std::uint32_t pc, mask;
  bool parked;  // at a warp-wide operation, waiting for other lanes
};

enum class State : std::uint8_t { kReady, kAtBarrier, kDone };

struct Block;

struct Warp {
  std::uint8_t* regs = nullptr;
  std::uint32_t active = 0;   // lanes that execute the instruction
  std::uint32_t mask = 0;     // lanes of the running group
  std::uint32_t pc = 0;       // of the instruction after the one that is executed
  std::uint32_t next = kAll;  // lowest place of the other groups
  std::uint32_t lanes = 0;    // lanes that exist
  std::uint32_t exited = 0;
  std::uint32_t index = 0;
  std::uint32_t syncs = 0;
  State state = State::kReady;
  bool stop = false;  // leave the loop of instructions
  std::uint32_t barrier = 0, barrier_pc = 0;
  std::uint32_t copy_group = 0;
  std::vector<Group> groups;
  std::vector<Copy> copies[kLanes];
  Block* block = nullptr;

  std::uint32_t live() const { return lanes & ~exited; }
  void reschedule();
  // Makes lanes that wait at this instruction take part. False: not all lanes of `need` are here,
  // and another group goes on.
  bool gather(std::uint32_t need, const char* what);
};

// Who touched 2 bytes of global memory in this launch: the number of a block + 1, 0 for nobody.
struct Touched {
  std::uint32_t writer = 0, reader = 0;
  std::uint32_t pc = 0;  // of the write
  bool several_readers = false;
};

// What one host thread keeps between blocks.
struct Worker {
  std::vector<Counts> counts;
  std::vector<std::uint32_t> range_of;  // of each instruction's last access
  std::vector<Shadow> shadow;
  std::vector<std::uint8_t> memory;  // register files
  std::vector<std::uint8_t> shared;
  std::vector<std::uint8_t> local;
  std::unordered_map<std::uint64_t, std::uint8_t>
      sectors;  // that the block touched: 1 read, 2 written
  std::map<std::uint64_t, Launch::Traffic> traffic;
  std::unordered_map<std::uint64_t, Touched> touched;
  std::uint64_t epoch = 1;
  std::uint64_t intra_warp_hazards = 0;
  std::string intra_warp_example;
};

struct Block {
  const Kernel* kernel = nullptr;
  const std::vector<Range>* ranges = nullptr;
  bool enforce = false;
  Options opt;
  Worker* worker = nullptr;
  Dim3 grid, dim, index;
  std::uint8_t* shared = nullptr;
  std::uint32_t shared_bytes = 0;
  const std::uint8_t* params = nullptr;
  std::vector<Warp> warps;
  std::uint64_t first_epoch = 0;

  [[noreturn]] void fail(const Warp& w, std::uint32_t pc, const std::string& what) const;
  std::string where(std::uint32_t pc) const;
  void check_global(Warp& w, const Inst& in, const std::uint64_t* address, std::uint32_t bytes,
                    bool write);
  void check_shared(Warp& w, const Inst& in, const std::uint32_t* address, std::uint32_t bytes,
                    bool write);
  void note_shared(Warp& w, int lane, std::uint32_t offset, std::uint32_t bytes, bool write,
                   std::uint32_t pc);
  void note_global(Warp& w, const std::uint64_t* address, std::uint32_t bytes, bool write);
  void count_global(Warp& w, const std::uint64_t* address, std::uint32_t bytes, bool write);
  void count_shared(Warp& w, const std::uint32_t* address, std::uint32_t bytes);
  void finish_copies(Warp& w, int lane, std::uint32_t keep_groups);
};

// The instruction named by a PTX opcode with all its suffixes; see instructions.cpp.
struct Operand {
  enum Kind { kRegister, kImmediate, kSymbol, kSpecial, kAddress, kVector, kSink } kind = kSink;
  std::string name;            // register, symbol, or the base of an address
  std::uint64_t value = 0;     // immediate
  std::int64_t offset = 0;     // of an address
  bool negated = false;        // !%p
  std::vector<Operand> items;  // of a vector
  std::string second;          // d|p of shfl and setp
};

// What decoding an instruction may ask of the kernel's decoder.
class Decoder {
 public:
  virtual ~Decoder() = default;
  // Offset of a register, or of a constant with that many bits.
  virtual std::uint32_t source(const Operand& operand, int bits) = 0;
  virtual std::uint32_t destination(const Operand& operand) = 0;
  virtual std::uint32_t pair_destination(const Operand& operand) = 0;  // the p of d|p, or 0
  virtual int bits_of(const Operand& operand) = 0;  // of a register; 0 for anything else
  virtual std::uint32_t address(const Operand& operand, Space space, std::int32_t* offset) = 0;
  virtual std::uint32_t branch_target(const Operand& operand) = 0;
  virtual std::vector<std::uint32_t>& extra() = 0;
};
// Fills `inst`; throws std::runtime_error for an instruction that is not known.
void decode(const std::string& opcode, std::vector<Operand>& operands, Decoder& decoder,
            Inst& inst);
void set_rough(bool wanted);  // of approximate functions, see Options

}  // namespace vgpu
