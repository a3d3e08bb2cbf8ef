// Runs launches: blocks on threads of the host, the warps of a block in turn until all wait at a
// barrier, the lanes of a warp in groups of which the one at the lowest place goes first. Checks
// addresses, barriers and hazards, and counts.
#include <algorithm>
#include <mutex>
#include <random>
#include <sstream>
#include <thread>

#include "machine.h"

namespace vgpu {
namespace {

std::mutex range_mutex;
std::map<std::uint64_t, std::uint64_t> ranges;  // begin to end
bool enforce_ranges = false;
std::int64_t launch_count = 0;

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

std::string hex(std::uint64_t value) {
  std::ostringstream out;
  out << "0x" << std::hex << value;
  return out.str();
}

}  // namespace

void set_ranges(bool enforce) { enforce_ranges = enforce; }
void add_range(std::uint64_t begin, std::uint64_t size) {
  const std::lock_guard lock(range_mutex);
  ranges[begin] = begin + size;
}
void remove_range(std::uint64_t begin) {
  const std::lock_guard lock(range_mutex);
  ranges.erase(begin);
}

Options& options() {
  static Options value;
  return value;
}
std::vector<Launch>& history() {
  static std::vector<Launch> value;
  return value;
}
std::int64_t launches() { return launch_count; }

// --- Divergence ---

void Warp::reschedule() {
  if (mask != 0) groups.push_back({pc, mask, false});
  mask = 0;
  // Lanes at the same place go on together; they are then no longer parked.
  for (std::size_t i = 0; i < groups.size(); ++i) {
    for (std::size_t j = i + 1; j < groups.size();) {
      if (groups[j].pc == groups[i].pc) {
        groups[i].mask |= groups[j].mask;
        groups[i].parked = groups[i].parked && groups[j].parked;
        groups.erase(groups.begin() + static_cast<std::ptrdiff_t>(j));
      } else {
        ++j;
      }
    }
  }
  std::size_t best = groups.size();
  for (std::size_t i = 0; i < groups.size(); ++i) {
    if (!groups[i].parked && (best == groups.size() || groups[i].pc < groups[best].pc)) best = i;
  }
  if (best == groups.size()) {
    if (!groups.empty()) {
      std::string what = "lanes of a warp wait for each other at different places:";
      for (const Group& g : groups) what += " " + hex(g.mask) + " at " + block->where(g.pc) + ";";
      block->fail(*this, groups[0].pc, what);
    }
    state = State::kDone;
    stop = true;
    next = kAll;
    return;
  }
  pc = groups[best].pc;
  mask = groups[best].mask;
  groups.erase(groups.begin() + static_cast<std::ptrdiff_t>(best));
  next = kAll;
  for (const Group& g : groups) {
    if (!g.parked) next = std::min(next, g.pc);
  }
}

bool Warp::gather(std::uint32_t need, const char*) {
  if ((mask & need) == need) return true;
  const std::uint32_t here = pc - 1;
  for (std::size_t i = 0; i < groups.size();) {
    if (groups[i].pc == here) {
      mask |= groups[i].mask;
      groups.erase(groups.begin() + static_cast<std::ptrdiff_t>(i));
    } else {
      ++i;
    }
  }
  active = mask;
  if ((mask & need) == need) {
    next = kAll;
    for (const Group& g : groups) {
      if (!g.parked) next = std::min(next, g.pc);
    }
    return true;
  }
  if (!block->worker->counts.empty()) {
    --block->worker->counts[here].warps;
    block->worker->counts[here].lanes -= static_cast<unsigned>(__builtin_popcount(mask));
  }
  groups.push_back({here, mask, true});
  mask = 0;
  reschedule();
  return false;
}

// --- Checks ---

std::string Block::where(std::uint32_t pc) const {
  std::string s = "[" + std::to_string(pc) + "] " + kernel->text[pc];
  if (!kernel->place[pc].empty()) s += " (" + kernel->place[pc] + ")";
  return s;
}

void Block::fail(const Warp& w, std::uint32_t pc, const std::string& what) const {
  throw Failure(kernel->name + ", block (" + std::to_string(index.x) + ", " +
                std::to_string(index.y) + ", " + std::to_string(index.z) + "), warp " +
                std::to_string(w.index) + " at " + where(pc) + ": " + what);
}

void Block::check_global(Warp& w, const Inst&, const std::uint64_t* address, std::uint32_t bytes,
                         bool write) {
  const std::uint32_t pc = w.pc - 1;
  std::uint64_t low = ~0ull, high = 0, all = 0;
  for (std::uint32_t m = w.active; m != 0; m &= m - 1) {
    const std::uint64_t a = address[__builtin_ctz(m)];
    low = std::min(low, a);
    high = std::max(high, a);
    all |= a;
  }
  if (all % bytes != 0) {
    for (std::uint32_t m = w.active; m != 0; m &= m - 1) {
      const int l = __builtin_ctz(m);
      if (address[l] % bytes != 0)
        fail(w, pc,
             "lane " + std::to_string(l) + ": address " + hex(address[l]) +
                 " is not a multiple of " + std::to_string(bytes));
    }
  }
  if (enforce) {
    std::uint32_t& last = worker->range_of[pc];
    const std::vector<Range>& known = *ranges;
    const bool cached =
        last < known.size() && low >= known[last].begin && high + bytes <= known[last].end;
    if (!cached) {
      for (std::uint32_t m = w.active; m != 0; m &= m - 1) {
        const int l = __builtin_ctz(m);
        const std::uint64_t a = address[l];
        auto after = std::upper_bound(known.begin(), known.end(), a,
                                      [](std::uint64_t x, const Range& r) { return x < r.begin; });
        if (after == known.begin() || a + bytes > (after - 1)->end) {
          std::string near =
              after == known.begin()
                  ? "before all memory"
                  : std::to_string(static_cast<std::int64_t>(a + bytes - (after - 1)->end)) +
                        " bytes after the end of an allocation of " +
                        std::to_string((after - 1)->end - (after - 1)->begin);
          fail(w, pc,
               "lane " + std::to_string(l) + (write ? " writes " : " reads ") +
                   std::to_string(bytes) + " bytes at " + hex(a) + ", " + near);
        }
        last = static_cast<std::uint32_t>(after - 1 - known.begin());
      }
    }
  }
  if (opt.global_races) note_global(w, address, bytes, write);
  if (opt.profile) count_global(w, address, bytes, write);
}

void Block::note_global(Warp& w, const std::uint64_t* address, std::uint32_t bytes, bool write) {
  const auto me =
      static_cast<std::uint32_t>(index.x + grid.x * (index.y + std::uint64_t{grid.y} * index.z)) +
      1;
  for (std::uint32_t m = w.active; m != 0; m &= m - 1) {
    const std::uint64_t a = address[__builtin_ctz(m)];
    for (std::uint64_t at = a / 2; at < (a + bytes + 1) / 2; ++at) {
      Touched& t = worker->touched[at];
      if (write) {
        if (t.writer != 0 && t.writer != me)
          fail(w, w.pc - 1,
               "block " + std::to_string(t.writer - 1) + " writes the same global memory at " +
                   where(t.pc));
        t.writer = me;
        t.pc = w.pc - 1;
      } else {
        t.several_readers = t.several_readers || (t.reader != 0 && t.reader != me);
        t.reader = me;
      }
    }
  }
}

void Block::count_global(Warp& w, const std::uint64_t* address, std::uint32_t bytes, bool write) {
  // Distinct sectors of the request.
  std::uint64_t list[kLanes * 2];
  int n = 0;
  for (std::uint32_t m = w.active; m != 0; m &= m - 1) {
    const std::uint64_t a = address[__builtin_ctz(m)] / 32;
    list[n++] = a;
  }
  std::sort(list, list + n);
  n = static_cast<int>(std::unique(list, list + n) - list);
  Counts& c = worker->counts[w.pc - 1];
  c.units += static_cast<std::uint64_t>(n);
  // As many as the bytes would fill if they lay side by side.
  c.ideal += (static_cast<std::uint64_t>(__builtin_popcount(w.active)) * bytes + 31) / 32;
  for (int i = 0; i < n; ++i) worker->sectors[list[i]] |= write ? 2 : 1;
}

void Block::check_shared(Warp& w, const Inst&, const std::uint32_t* address, std::uint32_t bytes,
                         bool write) {
  const std::uint32_t pc = w.pc - 1;
  for (std::uint32_t m = w.active; m != 0; m &= m - 1) {
    const int l = __builtin_ctz(m);
    const std::uint32_t a = address[l];
    if (a % bytes != 0)
      fail(w, pc,
           "lane " + std::to_string(l) + ": shared address " + std::to_string(a) +
               " is not a multiple of " + std::to_string(bytes));
    if (a < kSharedBase || a - kSharedBase + bytes > shared_bytes)
      fail(w, pc,
           "lane " + std::to_string(l) + ": " + std::to_string(bytes) + " bytes at offset " +
               std::to_string(static_cast<std::int64_t>(a) - kSharedBase) + " of " +
               std::to_string(shared_bytes) + " bytes of shared memory");
  }
  if (opt.races) {
    for (std::uint32_t m = w.active; m != 0; m &= m - 1) {
      const int l = __builtin_ctz(m);
      note_shared(w, l, address[l] - kSharedBase, bytes, write, pc);
    }
  }
  if (opt.profile) count_shared(w, address, bytes);
}

void Block::count_shared(Warp& w, const std::uint32_t* address, std::uint32_t bytes) {
  // A pass serves 32 banks of 4 bytes; lanes that read the same word share it. 8 and 16 bytes a
  // lane go by half and quarter warps.
  const int group = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  std::uint64_t passes = 0, ideal = 0;
  for (int first = 0; first < kLanes; first += group) {
    std::uint32_t words[kLanes * 4];
    int n = 0;
    for (int l = first; l < first + group; ++l) {
      if (!(w.active >> l & 1u)) continue;
      for (std::uint32_t i = 0; i < std::max(bytes, 4u); i += 4) words[n++] = (address[l] + i) / 4;
    }
    if (n == 0) continue;
    std::sort(words, words + n);
    n = static_cast<int>(std::unique(words, words + n) - words);
    int of_bank[32] = {};
    int most = 0;
    for (int i = 0; i < n; ++i) most = std::max(most, ++of_bank[words[i] % 32]);
    passes += static_cast<std::uint64_t>(most);
    ideal += 1;
  }
  Counts& c = worker->counts[w.pc - 1];
  c.units += passes;
  c.ideal += ideal;
}

void Block::note_shared(Warp& w, int lane, std::uint32_t offset, std::uint32_t bytes, bool write,
                        std::uint32_t pc) {
  const std::uint64_t epoch = worker->epoch;
  const auto thread =
      static_cast<std::uint16_t>(w.index * kLanes + static_cast<std::uint32_t>(lane));
  for (std::uint32_t at = offset / 2; at < (offset + bytes + 1) / 2; ++at) {
    Shadow& s = worker->shadow[at];
    if (s.copy_epoch >= first_epoch && s.copy_epoch != 0)
      fail(w, pc,
           "lane " + std::to_string(lane) + (write ? " writes" : " reads") +
               " shared memory that an asynchronous copy is still to fill, offset " +
               std::to_string(offset));
    const auto hazard = [&](const char* what, std::uint32_t other_warp, std::uint32_t other_pc) {
      fail(w, pc,
           std::string("hazard in shared memory at offset ") + std::to_string(2 * at) + ": lane " +
               std::to_string(lane) + what + std::to_string(other_warp) + " at " + where(other_pc) +
               " without a barrier between");
    };
    const auto warp_hazard = [&](const char* what, std::uint32_t other_pc) {
      if (other_pc == pc && what[1] != 'w') return;
      ++worker->intra_warp_hazards;
      if (worker->intra_warp_example.empty())
        worker->intra_warp_example =
            "lane " + std::to_string(lane) + what + where(other_pc) + " at " + where(pc);
      if (opt.warp_races) fail(w, pc, worker->intra_warp_example);
    };
    if (s.write_epoch == epoch) {
      if (s.write_thread / kLanes != w.index) {
        hazard(
            write ? " writes over what was written by warp " : " reads what was written by warp ",
            s.write_thread / kLanes, s.write_pc);
      } else if (s.write_thread != thread && s.write_sync == w.syncs) {
        warp_hazard(write ? " writes over what another lane wrote at "
                          : " reads what another lane wrote at ",
                    s.write_pc);
      }
    }
    if (write) {
      if (s.read_epoch == epoch) {
        const std::uint32_t others = s.read_warps & ~(1u << w.index);
        if (others != 0) {
          hazard(" writes over what was read by warp ",
                 static_cast<std::uint32_t>(__builtin_ctz(others)), s.read_pc);
        } else if ((s.read_by_several || s.read_thread != thread) && s.read_sync == w.syncs) {
          warp_hazard(" overwrites what another lane read at ", s.read_pc);
        }
      }
      s.write_epoch = epoch;
      s.write_thread = thread;
      s.write_pc = pc;
      s.write_sync = w.syncs;
    } else {
      const bool fresh = s.read_epoch != epoch;
      s.read_warps = (fresh ? 0u : s.read_warps) | 1u << w.index;
      const bool same_sync = !fresh && s.read_sync == w.syncs;
      s.read_by_several = same_sync && (s.read_by_several || s.read_thread != thread);
      s.read_epoch = epoch;
      s.read_thread = thread;
      s.read_pc = pc;
      s.read_sync = w.syncs;
    }
  }
}

void Block::finish_copies(Warp& w, int lane, std::uint32_t keep_groups) {
  std::vector<Copy>& copies = w.copies[lane];
  const std::uint32_t now = w.copy_group;
  std::size_t kept = 0;
  for (const Copy& c : copies) {
    // Groups that were committed last may stay under way; with wait_all (keep 0) none.
    if (keep_groups != 0 && now - c.group <= keep_groups) {
      copies[kept++] = c;
      continue;
    }
    std::uint8_t* to = shared + (c.shared - kSharedBase);
    std::memcpy(to, reinterpret_cast<const void*>(c.global), c.source_bytes);
    std::memset(to + c.source_bytes, 0, static_cast<std::size_t>(c.bytes - c.source_bytes));
    if (opt.races) {
      for (std::uint32_t i = 0; i < c.bytes; i += 2)
        worker->shadow[(c.shared - kSharedBase + i) / 2].copy_epoch = 0;
      note_shared(w, lane, c.shared - kSharedBase, c.bytes, true, c.pc);
    }
  }
  copies.resize(kept);
}

// --- Launches ---

namespace {

// Goes on with a warp until it waits at a barrier or ends, or for at most `budget` instructions.
void run_warp(Warp& w, const Kernel& kernel, Counts* counts, std::uint64_t budget) {
  const Inst* const code = kernel.code.data();
  w.stop = false;
  do {
    if (w.pc >= w.next) {
      w.reschedule();
      if (w.stop) return;
    }
    const std::uint32_t at = w.pc++;
    const Inst& in = code[at];
    w.active = w.mask;
    if (in.guard != 0) {
      std::uint32_t p;
      std::memcpy(&p, w.regs + in.guard, sizeof p);
      w.active &= in.guard_not ? ~p : p;
    }
    if (counts != nullptr) {
      ++counts[at].warps;
      counts[at].lanes += static_cast<unsigned>(__builtin_popcount(w.active));
    }
    if (w.active == 0) continue;
    in.fn(w, in);
  } while (!w.stop && --budget != 0);
}

std::uint32_t special_value(const std::string& name, const Block& b, const Warp& w, int lane) {
  const std::uint32_t thread = w.index * kLanes + static_cast<std::uint32_t>(lane);
  const auto part = [&](std::uint32_t x, std::uint32_t y, std::uint32_t z) {
    return name.back() == 'x' ? x : name.back() == 'y' ? y : z;
  };
  if (name.rfind("%tid", 0) == 0)
    return part(thread % b.dim.x, thread / b.dim.x % b.dim.y, thread / b.dim.x / b.dim.y);
  if (name.rfind("%ntid", 0) == 0) return part(b.dim.x, b.dim.y, b.dim.z);
  if (name.rfind("%ctaid", 0) == 0) return part(b.index.x, b.index.y, b.index.z);
  if (name.rfind("%nctaid", 0) == 0) return part(b.grid.x, b.grid.y, b.grid.z);
  if (name == "%laneid") return static_cast<std::uint32_t>(lane);
  if (name == "%warpid") return w.index;
  if (name == "%lanemask_eq") return 1u << lane;
  if (name == "%lanemask_lt") return (1u << lane) - 1u;
  if (name == "%lanemask_le") return ((1u << lane) - 1u) | 1u << lane;
  if (name == "%lanemask_gt") return ~(((1u << lane) - 1u) | 1u << lane);
  if (name == "%lanemask_ge") return ~((1u << lane) - 1u);
  throw std::runtime_error("PTX: special register " + name);
}

void run_block(Block& b) {
  Worker& worker = *b.worker;
  const Kernel& kernel = *b.kernel;
  const auto threads = static_cast<std::uint32_t>(b.dim.count());
  const std::uint32_t warps = (threads + kLanes - 1) / kLanes;
  const std::size_t bytes = kernel.register_bytes;
  worker.memory.resize(bytes * warps + 64);
  auto* regs = worker.memory.data();
  regs += 64 - reinterpret_cast<std::uintptr_t>(regs) % 64;
  std::memset(regs, 0xff, bytes * warps);  // NaN; predicates true
  std::memset(b.shared, 0xff, b.shared_bytes);
  b.warps.resize(warps);
  b.first_epoch = ++worker.epoch;
  for (std::uint32_t i = 0; i < warps; ++i) {
    Warp& w = b.warps[i];
    w.regs = regs + bytes * i;
    w.index = i;
    w.block = &b;
    const std::uint32_t left = threads - i * kLanes;
    w.lanes = left >= kLanes ? kAll : (1u << left) - 1u;
    w.mask = w.lanes;
    w.pc = 0;
    w.next = kAll;
    w.exited = 0;
    w.syncs = 0;
    w.copy_group = 0;
    w.state = State::kReady;
    w.groups.clear();
    for (auto& copies : w.copies) copies.clear();
    for (const Kernel::Constant& c : kernel.constants) {
      std::uint8_t* at = w.regs + c.offset;
      if (c.bytes == 0) {
        const std::uint32_t p = c.value ? kAll : 0u;
        std::memcpy(at, &p, sizeof p);
      } else {
        for (int l = 0; l < kLanes; ++l)
          std::memcpy(at + c.bytes * static_cast<unsigned>(l), &c.value, c.bytes);
      }
    }
    for (const auto& [name, offset] : kernel.special) {
      for (int l = 0; l < kLanes; ++l) {
        const std::uint32_t value = special_value(name, b, w, l);
        std::memcpy(w.regs + offset + 4 * l, &value, sizeof value);
      }
    }
  }

  Counts* const counts = b.opt.profile ? worker.counts.data() : nullptr;
  std::mt19937_64 random(b.opt.seed * 7919 + b.index.x);
  std::vector<Warp*> order;
  while (true) {
    order.clear();
    std::size_t waiting = 0, done = 0;
    for (Warp& w : b.warps) {
      if (w.state == State::kReady) order.push_back(&w);
      if (w.state == State::kAtBarrier) ++waiting;
      if (w.state == State::kDone) ++done;
    }
    if (order.empty()) {
      if (waiting == 0) break;
      const Warp* first = nullptr;
      for (const Warp& w : b.warps) {
        if (w.state != State::kAtBarrier) continue;
        if (first == nullptr) first = &w;
        if (w.barrier != first->barrier || w.barrier_pc != first->barrier_pc)
          b.fail(w, w.barrier_pc,
                 "warps wait at different barriers: warp " + std::to_string(first->index) + " at " +
                     b.where(first->barrier_pc));
        if (done != 0 || w.exited != 0)
          b.fail(w, w.barrier_pc, "a barrier that threads which have exited do not reach");
      }
      ++worker.epoch;
      for (Warp& w : b.warps) {
        w.state = State::kReady;
        ++w.syncs;
      }
      continue;
    }
    if (b.opt.order == 1) std::reverse(order.begin(), order.end());
    if (b.opt.order == 2) std::shuffle(order.begin(), order.end(), random);
    for (Warp* w : order)
      run_warp(*w, kernel, counts, b.opt.order == 2 ? 1 + random() % 200 : ~0ull);
  }

  if (b.opt.profile) {
    for (const auto& [sector, how] : worker.sectors) {
      const std::uint64_t a = sector * 32;
      auto after = std::upper_bound(b.ranges->begin(), b.ranges->end(), a + 31,
                                    [](std::uint64_t x, const Range& r) { return x < r.begin; });
      std::uint64_t begin = 0, size = 0;
      if (after != b.ranges->begin() && a < (after - 1)->end) {
        begin = (after - 1)->begin;
        size = (after - 1)->end - begin;
      }
      Launch::Traffic& t = worker.traffic[begin];
      t.size = size;
      if (how & 1) t.read += 32;
      if (how & 2) t.written += 32;
    }
    worker.sectors.clear();
  }
}

}  // namespace

void launch(const Kernel& kernel, Dim3 grid, Dim3 block, void** arguments,
            std::uint32_t dynamic_shared) {
  ++launch_count;
  const Options opt = options();
  const std::uint64_t threads = block.count();
  if (grid.count() == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    throw Failure(kernel.name + ": an invalid grid");
  if (threads == 0 || threads > 1024) throw Failure(kernel.name + ": an invalid block");
  if (kernel.max_threads != 0 && threads > kernel.max_threads)
    throw Failure(kernel.name + ": more threads than .maxntid");

  std::vector<std::uint8_t> params(kernel.parameter_bytes);
  for (std::size_t i = 0; i < kernel.parameters.size(); ++i)
    std::memcpy(params.data() + kernel.parameters[i].offset, arguments[i],
                kernel.parameters[i].size);

  std::vector<Range> known;
  bool enforce;
  {
    const std::lock_guard lock(range_mutex);
    enforce = enforce_ranges;
    known.reserve(ranges.size());
    for (const auto& [begin, end] : ranges) known.push_back({begin, end});
  }

  // Which blocks to run: all, or a sample spread over the grid.
  const std::uint64_t blocks = grid.count();
  const std::uint64_t runs = opt.sample != 0 ? std::min(opt.sample, blocks) : blocks;
  const std::uint32_t shared_bytes = kernel.shared_bytes + dynamic_shared;
  const int workers = static_cast<int>(
      std::min<std::uint64_t>(static_cast<std::uint64_t>(std::max(opt.threads, 1)), runs));

  static std::vector<std::unique_ptr<Worker>> pool;  // launches come one at a time
  static std::mutex launch_mutex;
  const std::lock_guard launch_lock(launch_mutex);
  while (pool.size() < static_cast<std::size_t>(workers))
    pool.push_back(std::make_unique<Worker>());
  std::atomic<std::uint64_t> next{0};
  std::mutex error_mutex;
  std::string error;

  const auto work = [&](Worker& worker) {
    worker.counts.assign(opt.profile ? kernel.code.size() : 0, {});
    worker.range_of.assign(kernel.code.size(), kAll);
    worker.traffic.clear();
    worker.touched.clear();
    worker.sectors.clear();
    worker.intra_warp_hazards = 0;
    worker.intra_warp_example.clear();
    if (opt.races && worker.shadow.size() < shared_bytes / 2 + 16)
      worker.shadow.resize(shared_bytes / 2 + 16);
    worker.shared.resize(shared_bytes + 64);
    auto* shared = worker.shared.data();
    shared += 64 - reinterpret_cast<std::uintptr_t>(shared) % 64;
    Block b;
    b.kernel = &kernel;
    b.ranges = &known;
    b.enforce = enforce;
    b.opt = opt;
    b.worker = &worker;
    b.grid = grid;
    b.dim = block;
    b.shared = shared;
    b.shared_bytes = shared_bytes;
    b.params = params.data();
    try {
      for (std::uint64_t i = next++; i < runs; i = next++) {
        std::uint64_t at = runs == blocks ? i : i * blocks / runs + blocks / runs / 2;
        if (opt.order == 1) at = blocks - 1 - at;
        b.index = {static_cast<std::uint32_t>(at % grid.x),
                   static_cast<std::uint32_t>(at / grid.x % grid.y),
                   static_cast<std::uint32_t>(at / grid.x / grid.y)};
        run_block(b);
      }
    } catch (const std::exception& e) {
      const std::lock_guard lock(error_mutex);
      if (error.empty()) error = e.what();
      next = runs;
    }
  };
  if (workers <= 1) {
    work(*pool[0]);
  } else {
    std::vector<std::thread> host;
    for (int i = 1; i < workers; ++i)
      host.emplace_back([&, i] { work(*pool[static_cast<std::size_t>(i)]); });
    work(*pool[0]);
    for (std::thread& t : host) t.join();
  }
  if (!error.empty()) throw Failure(error);
  if (opt.global_races) {
    // What blocks on different host threads did.
    std::unordered_map<std::uint64_t, Touched> all;
    for (int i = 0; i < workers; ++i) {
      for (const auto& [at, t] : pool[static_cast<std::size_t>(i)]->touched) {
        Touched& sum = all[at];
        const bool same = (sum.writer == 0 || t.writer == 0 || sum.writer == t.writer);
        if (t.writer != 0) {
          sum.writer = t.writer;
          sum.pc = t.pc;
        }
        sum.several_readers = sum.several_readers || t.several_readers ||
                              (sum.reader != 0 && t.reader != 0 && sum.reader != t.reader);
        if (t.reader != 0) sum.reader = t.reader;
        const bool read_elsewhere =
            sum.writer != 0 &&
            (sum.several_readers || (sum.reader != 0 && sum.reader != sum.writer));
        if (!same || read_elsewhere)
          throw Failure(kernel.name + ": global memory at " + hex(2 * at) +
                        " is written by one block at [" + std::to_string(sum.pc) + "] " +
                        kernel.text[sum.pc] + " and " + (same ? "read" : "written") +
                        " by another");
      }
    }
  }

  std::uint64_t warp_hazards = 0;
  for (int i = 0; i < workers; ++i)
    warp_hazards += pool[static_cast<std::size_t>(i)]->intra_warp_hazards;
  if (!opt.profile && warp_hazards == 0) return;
  Launch record;
  record.kernel = &kernel;
  record.grid = grid;
  record.block = block;
  record.dynamic_shared = dynamic_shared;
  record.executed_blocks = runs;
  record.counts.assign(opt.profile ? kernel.code.size() : 0, {});
  for (int i = 0; i < workers; ++i) {
    const Worker& worker = *pool[static_cast<std::size_t>(i)];
    for (std::size_t j = 0; j < record.counts.size(); ++j) {
      record.counts[j].warps += worker.counts[j].warps;
      record.counts[j].lanes += worker.counts[j].lanes;
      record.counts[j].units += worker.counts[j].units;
      record.counts[j].ideal += worker.counts[j].ideal;
    }
    for (const auto& [begin, t] : worker.traffic) {
      Launch::Traffic& sum = record.traffic[begin];
      sum.size = t.size;
      sum.read += t.read;
      sum.written += t.written;
    }
    record.intra_warp_hazards += worker.intra_warp_hazards;
    if (record.intra_warp_example.empty()) record.intra_warp_example = worker.intra_warp_example;
  }
  history().push_back(std::move(record));
}

}  // namespace vgpu
