// Two accesses to a byte conflict if one of them is a plain write, or one is plain and the other atomic
// and writes. They race unless something orders them: an earlier launch, a barrier of the block between
// them, a __syncwarp() of their warp, being of one thread, or, between blocks, fences and atomics
// (visibility.h). Whether they do is told from the stamps of the last accesses to each byte, whatever order
// the threads happened to run in.
//
// The compiler tells of each access: kernels are compiled with -fsanitize=thread, but linked with the
// callbacks at the end of this file instead of ThreadSanitizer's.
#include "memory.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>

#include "cuda_emulator.h"
#include "emulator.h"
#include "scheduler.h"
#include "symbols.h"
#include "visibility.h"

extern "C" {
__attribute__((weak)) void __asan_poison_memory_region(void const volatile*, size_t);
__attribute__((weak)) void __asan_unpoison_memory_region(void const volatile*, size_t);
}

namespace emulator {
namespace memory {
namespace {

// Time is counted in epochs: one begins with each launch, block and barrier.
uint32_t now = 0, launch_epoch = 0, block_epoch = 0;
std::vector<uint32_t> warp_epochs;  // of the running block, counted apart for each warp
std::vector<uint32_t> fences;       // that each of its threads has passed

struct Stamp {
  uint32_t epoch;  // 0: never
  uint32_t warp_epoch;
  uint32_t code;  // offset in the module
  uint32_t thread : 10, atomic : 1, fences : 21;

  visibility::Moment moment() const { return {epoch, warp_epoch, uint16_t(thread), fences}; }
};
static_assert(kMostThreads == 1 << 10);

Stamp stamp_of_now(uint32_t code, bool atomic) {
  const unsigned thread = running_thread();
  return {now, warp_epochs[thread / kWarp], code, thread, atomic, fences[thread]};
}

struct Cell {
  Stamp write;     // the last one
  Stamp reads[2];  // the last one and one of another thread, of another warp where there was one
};

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Memory that kernels may touch.
struct Region {
  char* begin;
  size_t bytes;
  std::string name;
  bool shared, writable, defined;
  std::unique_ptr<Cell[], Free> cells;  // one a byte; null pages until they are used

  Region(char* begin, size_t bytes, std::string name, bool shared, bool writable, bool defined)
      : begin(begin),
        bytes(bytes),
        name(std::move(name)),
        shared(shared),
        writable(writable),
        defined(defined),
        cells(static_cast<Cell*>(std::calloc(std::max<size_t>(bytes, 1), sizeof(Cell)))) {}
};

using Regions = std::map<const char*, Region>;  // by their beginnings; none overlaps another
Regions regions;
Region* last_found = nullptr;

Region* find(const char* address) {
  const auto holds = [&](const Region& r) { return size_t(address - r.begin) < r.bytes; };
  if (last_found && holds(*last_found)) return last_found;
  auto next = regions.upper_bound(address);
  if (next == regions.begin() || !holds(std::prev(next)->second)) return nullptr;
  return last_found = &std::prev(next)->second;
}

void erase(const char* begin, size_t bytes) {
  last_found = nullptr;
  auto it = regions.upper_bound(begin);
  if (it != regions.begin() && std::prev(it)->second.begin + std::prev(it)->second.bytes > begin) --it;
  while (it != regions.end() && it->first < begin + std::max<size_t>(bytes, 1)) it = regions.erase(it);
}

void add(char* begin, size_t bytes, std::string name, bool shared, bool writable, bool defined) {
  erase(begin, bytes);
  regions.try_emplace(begin, begin, bytes, std::move(name), shared, writable, defined);
}

template <class F>
void erase_if(F unwanted) {
  last_found = nullptr;
  for (auto it = regions.begin(); it != regions.end();) it = unwanted(it->second) ? regions.erase(it) : std::next(it);
}

// ---- shared memory ------------------------------------------------------------------------------

// Each carved array lies behind the last by a gap, so that leaving it is noticed.
constexpr size_t kGap = 64;
constexpr size_t kMostArrays = 64;

struct Span {
  char* begin;
  size_t bytes;
};

struct Dynamic {
  std::vector<char> memory;
  size_t bytes;                   // that the launch asked for
  std::map<size_t, Span> arrays;  // carved so far, by offset
} dynamic;

int shared_garbage;  // what shared memory holds when a block begins

char* dynamic_begin() {  // aligned as CUDA's
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(dynamic.memory.data()) + kGap - 1) / kGap * kGap);
}

void poison(const void* p, size_t bytes, bool on) {
  if (on && __asan_poison_memory_region) __asan_poison_memory_region(p, bytes);
  if (!on && __asan_unpoison_memory_region) __asan_unpoison_memory_region(p, bytes);
}

// Static shared arrays are thread-local variables of kernels.
bool is_shared(const symbols::Symbol& s) { return s.name.find("_kernel") != std::string::npos; }

char* known_block = nullptr;  // the thread-local block in which these lie
std::vector<Span> static_arrays;

void add_static_arrays() {
  char* block = symbols::thread_local_block();
  if (block == known_block) return;
  known_block = block;
  static_arrays.clear();
  for (const symbols::Symbol& s : symbols::thread_locals()) {
    if (!is_shared(s)) continue;
    add(block + s.offset, s.bytes, "__shared__ " + s.name.substr(s.name.rfind(':') + 1), true, true, false);
    static_arrays.push_back({block + s.offset, s.bytes});
  }
}

// ---- the checks ---------------------------------------------------------------------------------

const char* launch_arguments;
size_t launch_argument_bytes;
bool checking = false;  // the kernels of this build tell of their accesses

bool is_ordered(const Stamp& stamp, const Region& region) {
  if (stamp.epoch < launch_epoch) return true;
  if (stamp.epoch < block_epoch)  // another block: of shared memory it has its own
    return region.shared || visibility::is_visible(stamp.moment(), stamp_of_now(0, false).moment());
  if (stamp.epoch < now) return true;
  const unsigned me = running_thread(), warp = me / kWarp;
  return stamp.thread == me || (stamp.thread / kWarp == warp && stamp.warp_epoch < warp_epochs[warp]);
}

struct Access {
  const char* address;
  size_t bytes;
  Kind kind;
  const void* code;

  bool is_read() const { return kind == Kind::read || kind == Kind::read_past_l1; }

  [[noreturn]] void report(const std::string& what, const std::string& more) const {
    const char* verb = is_read() ? "read" : kind == Kind::write ? "write" : "atomic access";
    fail(what + ": " + verb + " of " + std::to_string(bytes) + " bytes at " + symbols::line_of(code) + " by " +
         describe_thread(running_thread()) + ", " + more);
  }

  [[noreturn]] void report_bounds() const {
    auto next = regions.upper_bound(address);
    std::string where = "where nothing was declared to the kernel";
    if (next != regions.begin()) {
      const Region& r = std::prev(next)->second;
      where = std::to_string(address - (r.begin + r.bytes)) + " bytes behind the end of " + describe(r);
      if (next != regions.end() && next->second.begin - address < address - (r.begin + r.bytes)) {
        where = std::to_string(next->second.begin - address) + " bytes before " + describe(next->second);
      }
    } else if (next != regions.end()) {
      where = std::to_string(next->second.begin - address) + " bytes before " + describe(next->second);
    }
    report("out of bounds", where);
  }

  static std::string describe(const Region& r) { return r.name + " [" + std::to_string(r.bytes) + " bytes]"; }

  void check_order(const Stamp& earlier, const char* verb, const Region& region, size_t at) const {
    if (earlier.epoch == 0 || is_ordered(earlier, region)) return;
    const void* earlier_code = symbols::module_begin() + earlier.code;
    report("race", "byte " + std::to_string(at) + " of " + describe(region) + "; conflicts with the " +
                       (earlier.atomic ? "atomic access" : verb) + " at " + symbols::line_of(earlier_code) +
                       " by thread " + std::to_string(earlier.thread) +
                       (earlier.epoch < block_epoch ? " of another block" : " of this block"));
  }

  // L1 is not coherent, and a compiler may read through a cache of constants what a kernel only reads.
  void check_cache(const Stamp& write, const Region& region, size_t at) const {
    if (kind == Kind::read_past_l1 || region.shared || write.epoch < launch_epoch || write.epoch >= block_epoch) return;
    report("read through L1", "byte " + std::to_string(at) + " of " + describe(region) +
                                  ", which another block of this launch has written: read it with __ldcg");
  }
};

void remember_read(Cell& cell, const Stamp& me) {
  Stamp &last = cell.reads[0], &other = cell.reads[1];
  const bool others_warp = other.epoch == me.epoch && other.thread / kWarp != me.thread / kWarp;
  const bool lasts_warp = last.epoch == me.epoch && last.thread / kWarp == me.thread / kWarp;
  if (!(others_warp && lasts_warp) && (last.thread != me.thread || last.epoch != me.epoch)) other = last;
  last = me;
}

}  // namespace

void access(const void* address, size_t bytes, Kind kind, const void* code) {
  const Suspend suspend;
  const Access a{static_cast<const char*>(address), bytes, kind, code};
  if (!checking || is_stack(address) || symbols::is_module(address)) return;  // local variables, constants
  if (size_t(a.address - launch_arguments) < launch_argument_bytes) return;
  Region* region = find(a.address);
  if (!region || a.address + bytes > region->begin + region->bytes) a.report_bounds();
  if (!a.is_read() && !region->writable) a.report("write to an input", Access::describe(*region));
  const auto offset = uint32_t(static_cast<const char*>(code) - symbols::module_begin());
  const Stamp me = stamp_of_now(offset, kind == Kind::atomic);
  const size_t first = size_t(a.address - region->begin);
  for (size_t i = first; i < first + bytes; ++i) {
    Cell& cell = region->cells[i];
    const bool defined = region->defined || (region->shared ? cell.write.epoch >= block_epoch : cell.write.epoch > 0);
    if (kind != Kind::write && !defined) {
      a.report("uninitialised read", "byte " + std::to_string(i) + " of " + Access::describe(*region));
    }
    if (!(me.atomic && cell.write.atomic)) a.check_order(cell.write, "write", *region, i);
    if (a.is_read()) {
      a.check_cache(cell.write, *region, i);
      remember_read(cell, me);
    } else {
      for (const Stamp& read : cell.reads) a.check_order(read, "read", *region, i);
      cell.write = me;
    }
  }
  if (kind == Kind::atomic && !region->shared) visibility::atomic(address, me.moment());
}

Launch::Launch(const void* arguments, size_t bytes, size_t shared_bytes) {
  launch_arguments = static_cast<const char*>(arguments);
  launch_argument_bytes = bytes;
  launch_epoch = ++now;
  visibility::begin_launch();
  dynamic.memory.resize(shared_bytes + (kMostArrays + 2) * kGap);
  dynamic.bytes = shared_bytes;
  poison(dynamic.memory.data(), dynamic.memory.size(), true);
  dynamic.arrays.clear();
  add_static_arrays();
}

Launch::~Launch() {
  ++now;
  poison(dynamic.memory.data(), dynamic.memory.size(), false);
  erase_if([](const Region& r) { return size_t(r.begin - dynamic.memory.data()) < dynamic.memory.size(); });
}

void begin_block(unsigned warps, unsigned seed) {
  block_epoch = ++now;
  warp_epochs.assign(warps, 1);
  fences.assign(warps * kWarp, 0);
  visibility::begin_block(block_epoch);
  const int garbage = seed == 0 ? 0xdb : seed == 1 ? 0 : int(block_epoch * 37 + seed) & 0xff;
  for (const Span& s : static_arrays) std::memset(s.begin, garbage, s.bytes);
  for (const auto& [offset, array] : dynamic.arrays) std::memset(array.begin, garbage, array.bytes);
  shared_garbage = garbage;
}

void block_barrier() {
  ++now;
  visibility::block_barrier();
}
void warp_barrier(unsigned warp) { ++warp_epochs[warp]; }

void clear(void* begin, size_t bytes) {
  Region* region = find(static_cast<char*>(begin));
  if (!region || !region->writable || static_cast<char*>(begin) + bytes > region->begin + region->bytes)
    throw std::runtime_error("emulator: out of bounds: " + std::to_string(bytes) + " bytes are cleared");
  std::memset(begin, 0, bytes);
  ++now;
  Cell* const cells = region->cells.get() + (static_cast<char*>(begin) - region->begin);
  for (size_t i = 0; i < bytes; ++i) cells[i].write = {now, 0, 0, 0, false, 0};
}

}  // namespace memory

void fence() {
  ++memory::fences[running_thread()];
  visibility::fence(memory::stamp_of_now(0, false).moment());
}

void read_past_l1(const void* address, size_t bytes, const void* code) {
  memory::access(address, bytes, memory::Kind::read_past_l1, code);
}

void* carve(size_t offset, size_t bytes) {
  using namespace memory;
  const Suspend suspend;
  if (offset + bytes > dynamic.bytes) {
    fail("dynamic shared memory too small: " + std::to_string(offset + bytes) + " bytes are carved, " +
         std::to_string(dynamic.bytes) + " were asked for at the launch");
  }
  if (bytes == 0) return dynamic_begin() + offset;
  auto array = dynamic.arrays.find(offset);
  if (array == dynamic.arrays.end()) {
    if (dynamic.arrays.size() == kMostArrays) fail("more than 64 arrays in dynamic shared memory");
    char* begin = dynamic_begin() + offset + dynamic.arrays.size() * kGap;
    array = dynamic.arrays.emplace(offset, Span{begin, bytes}).first;
    add(begin, bytes, "the dynamic shared array at offset " + std::to_string(offset), true, true, false);
    poison(begin, bytes, false);
    std::memset(begin, shared_garbage, bytes);
  }
  if (bytes != array->second.bytes) fail("two sizes of the dynamic shared array at offset " + std::to_string(offset));
  return array->second.begin;
}

static const char kWritable[] = "an output or workspace";
static const char kArray[] = "an array of a workspace";

void declare(const void* begin, size_t bytes, Content content) {
  if (!is_on() || bytes == 0) return;
  const bool input = content == Content::input;
  memory::add(static_cast<char*>(const_cast<void*>(begin)), bytes, input ? "an input" : kWritable, false, !input,
              input);
}

size_t declare_array(const void* array, size_t bytes, const void* workspace) {
  if (workspace && is_on()) {
    const auto declared_at = [](const void* p, const char* name) {
      const memory::Region* region = memory::find(static_cast<const char*>(p));
      return region && region->begin == p && region->name == name ? region : nullptr;
    };
    if (const auto* whole = declared_at(workspace, kWritable)) memory::erase(whole->begin, whole->bytes);
    const auto* same = declared_at(array, kArray);  // of an earlier launch of this call
    if (bytes > 0 && !(same && same->bytes == bytes)) {
      memory::add(static_cast<char*>(const_cast<void*>(array)), bytes, kArray, false, true, false);
    }
  }
  return memory::kGap;
}

void forget() {
  memory::erase_if([](const memory::Region& r) { return !r.shared; });
}

}  // namespace emulator

// What GCC and Clang call under -fsanitize=thread. Calls from host code come here too, for such a build's
// inline functions: they are ignored, and so are accesses that are no kernel's.
extern "C" {
#define SSD_EXT_CALLBACK(name, bytes, kind)                                                          \
  void name(void* p) {                                                                               \
    if (emulator::in_kernel)                                                                         \
      emulator::memory::access(p, bytes, emulator::memory::Kind::kind, __builtin_return_address(0)); \
  }
#define SSD_EXT_CALLBACKS(bytes)                              \
  SSD_EXT_CALLBACK(__tsan_read##bytes, bytes, read)           \
  SSD_EXT_CALLBACK(__tsan_write##bytes, bytes, write)         \
  SSD_EXT_CALLBACK(__tsan_unaligned_read##bytes, bytes, read) \
  SSD_EXT_CALLBACK(__tsan_unaligned_write##bytes, bytes, write)
SSD_EXT_CALLBACKS(1)
SSD_EXT_CALLBACKS(2)
SSD_EXT_CALLBACKS(4)
SSD_EXT_CALLBACKS(8)
SSD_EXT_CALLBACKS(16)
void __tsan_read_range(void* p, size_t bytes) {
  if (emulator::in_kernel)
    emulator::memory::access(p, bytes, emulator::memory::Kind::read, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t bytes) {
  if (emulator::in_kernel)
    emulator::memory::access(p, bytes, emulator::memory::Kind::write, __builtin_return_address(0));
}
void __tsan_init() { emulator::memory::checking = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
