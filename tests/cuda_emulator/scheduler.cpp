// Runs the threads of a launch, each on a stack of its own and all in one thread of the host, block
// after block. A thread runs until it meets others at a barrier or a warp operation.
#include "scheduler.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <numeric>
#include <random>
#include <regex>
#include <stdexcept>

#include "context.h"
#include "cuda_emulator.h"
#include "emulator.h"
#include "memory.h"
#include "symbols.h"

// There only where AddressSanitizer is linked.
extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t bytes);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* bytes);
}

namespace emulator {

uint3 thread_index, block_index;
dim3 block_size, grid_size;
bool in_kernel = false;

namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr size_t kMostSharedBytes = 48 << 10;  // without cudaFuncSetAttribute, which no launcher calls

const char* const kOpNames[] = {
    "__syncthreads",     "__syncthreads_count", "__syncthreads_and", "__syncthreads_or",  "__syncwarp",
    "a shuffle",         "__ballot_sync",       "__any_sync",        "__all_sync",        "__match_any_sync",
    "__reduce_add_sync", "__reduce_min_sync",   "__reduce_max_sync", "__reduce_and_sync", "__reduce_or_sync",
};

enum class State { ready, at_barrier, at_warp_op, exited };

// Where a thread waits, with what it brings.
struct Meeting {
  Op op;
  Site site;
  unsigned mask;
  uint64_t value;
  unsigned source_lane;

  bool matches(const Meeting& other) const {
    return op == other.op && mask == other.mask && site.line == other.site.line &&
           (site.file == other.site.file || std::strcmp(site.file, other.site.file) == 0);
  }
};

struct Thread {
  Context context;
  void* fake_stack;  // AddressSanitizer's
  uint3 index;
  State state;
  Meeting meeting;
  uint64_t result;
};

// The threads' stacks, each above a page that nobody may touch.
class Stacks {
 public:
  Stacks() : page_(size_t(sysconf(_SC_PAGESIZE))), stride_(kStackBytes + page_) {
    void* memory = mmap(nullptr, bytes(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("emulator: no memory for stacks");
    base_ = static_cast<char*>(memory);
    for (unsigned i = 0; i < kMostThreads; ++i) mprotect(of(i), kStackBytes, PROT_READ | PROT_WRITE);
  }
  char* of(unsigned thread) const { return base_ + thread * stride_ + page_; }
  bool contain(const void* p) const { return size_t(static_cast<const char*>(p) - base_) < bytes(); }

 private:
  size_t bytes() const { return kMostThreads * stride_; }
  size_t page_, stride_;
  char* base_;
} const stacks;

bool on = false;
unsigned seed = 0;
bool dry;                           // a dry run
std::vector<const void*> sequence;  // of launches since start()
size_t met;                         // barriers and warp operations since start()

// The launch in progress.
void (*body)(void*);
void* body_arguments;
std::mt19937 random_numbers;
std::string failure;
std::vector<Thread> threads;  // of the running block
std::vector<unsigned> ready;  // threads to run on
Thread* running;
Context host;
void* host_fake_stack;
const void* host_stack;
size_t host_stack_bytes;

unsigned index_of(const Thread& thread) { return unsigned(&thread - threads.data()); }

void enter(Thread& thread) {
  running = &thread;
  thread_index = thread.index;
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(&host_fake_stack, stacks.of(index_of(thread)), kStackBytes);
  Context::change(host, thread.context);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(host_fake_stack, nullptr, nullptr);
}

// Leaves the running thread, for good if it has exited.
void leave() {
  Thread& thread = *running;
  const bool for_good = thread.state == State::exited;
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &thread.fake_stack, host_stack, host_stack_bytes);
  Context::change(thread.context, host);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(thread.fake_stack, nullptr, nullptr);
}

[[noreturn]] void thread_main() {
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_stack_bytes);
  in_kernel = true;
  body(body_arguments);
  in_kernel = false;
  running->state = State::exited;
  leave();
  __builtin_unreachable();
}

void make_ready(Thread& thread) {
  thread.state = State::ready;
  ready.push_back(index_of(thread));
}

Thread& next_ready() {
  size_t at = 0;
  if (seed == 1) at = ready.size() - 1;
  if (seed > 1) at = random_numbers() % ready.size();
  const unsigned index = ready[at];
  if (seed == 0) {
    ready.erase(ready.begin());
  } else {
    ready[at] = ready.back();
    ready.pop_back();
  }
  return threads[index];
}

// ---- meetings -----------------------------------------------------------------------------------

std::string describe(Site site) {
  const std::string file = site.file;
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line);
}

std::string hex(unsigned mask) {
  char text[16];
  snprintf(text, sizeof(text), "%08x", mask);
  return text;
}

// Who is where, one line for all threads that are in one place.
std::string whereabouts() {
  std::map<std::string, std::pair<unsigned, unsigned>> places;  // -> how many, the first of them
  for (const Thread& t : threads) {
    std::string place = "have left the kernel";
    if (t.state != State::exited) {
      place = std::string("wait at ") + kOpNames[int(t.meeting.op)] + ", " + describe(t.meeting.site);
      if (t.state == State::at_warp_op) place += ", mask " + hex(t.meeting.mask);
    }
    ++places.emplace(place, std::pair(0u, index_of(t))).first->second.first;
  }
  std::string text;
  for (const auto& [place, who] : places) {
    text += "\n  " + std::to_string(who.first) + " threads " + place + "; the first is " + describe_thread(who.second);
  }
  return text;
}

// What a barrier or warp operation makes of the values that the threads bring.
struct Fold {
  Op op;
  uint64_t sum = 0, any = 0, all = ~uint64_t(0), least = ~uint64_t(0), most = 0;

  void add(uint64_t value) {
    sum += value;
    any |= value;
    all &= value;
    least = std::min(least, value);
    most = std::max(most, value);
  }
  uint64_t result() const {
    switch (op) {
      case Op::syncthreads_count:
      case Op::reduce_add:
        return uint32_t(sum);
      case Op::syncthreads_or:
      case Op::any:
      case Op::reduce_or:
        return any;
      case Op::syncthreads_and:
      case Op::all:
      case Op::reduce_and:
        return all;
      case Op::reduce_min:
        return least;
      case Op::reduce_max:
        return most;
      default:
        return 0;
    }
  }
};

// Ends the meeting of the whole block, if that is what everybody waits for.
bool release_block() {
  Fold fold{threads[0].meeting.op};
  for (const Thread& t : threads) {
    if (t.state != State::at_barrier || !t.meeting.matches(threads[0].meeting)) return false;
    fold.add(t.meeting.value);
  }
  for (Thread& t : threads) {
    t.result = fold.result();
    make_ready(t);
  }
  memory::block_barrier();
  ++met;
  return true;
}

// Ends the warp operation at which `last` has arrived, once every lane of its mask is there.
void release_warp(Thread& last) {
  const unsigned first = index_of(last) / kWarp * kWarp, mask = last.meeting.mask;
  const auto named = [mask](unsigned lane) { return mask >> lane & 1; };
  Thread* const warp = &threads[first];
  Fold fold{last.meeting.op};
  uint64_t ballot = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!named(lane)) continue;
    if (first + lane >= threads.size()) return;
    if (warp[lane].state != State::at_warp_op || !warp[lane].meeting.matches(last.meeting)) return;
    fold.add(warp[lane].meeting.value);
    ballot |= uint64_t(warp[lane].meeting.value != 0) << lane;
  }
  const auto lanes_with = [&](uint64_t value) {
    uint64_t equal = 0;
    for (unsigned lane = 0; lane < kWarp; ++lane)
      if (named(lane)) equal |= uint64_t(warp[lane].meeting.value == value) << lane;
    return equal;
  };
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!named(lane)) continue;
    Thread& t = warp[lane];
    switch (fold.op) {
      case Op::shfl:
        if (!named(t.meeting.source_lane)) {
          fail("a shuffle reads lane " + std::to_string(t.meeting.source_lane) + ", which is not in mask " + hex(mask) +
               ", at " + describe(t.meeting.site) + ", " + describe_thread(index_of(t)));
        }
        t.result = warp[t.meeting.source_lane].meeting.value;
        break;
      case Op::ballot:
        t.result = ballot;
        break;
      case Op::match_any:
        t.result = lanes_with(t.meeting.value);
        break;
      default:
        t.result = fold.result();
    }
    make_ready(t);
  }
  if (fold.op == Op::syncwarp && mask == ~0u) memory::warp_barrier(first / kWarp);
  ++met;
}

uint64_t meet(State state, const Meeting& meeting) {
  const Suspend suspend;
  Thread& thread = *running;
  thread.state = state;
  thread.meeting = meeting;
  if (state == State::at_warp_op) {
    if (!(meeting.mask >> index_of(thread) % kWarp & 1))
      fail("the calling lane is not in mask " + hex(meeting.mask) + ": " + kOpNames[int(meeting.op)] + " at " +
           describe(meeting.site) + ", " + describe_thread(index_of(thread)));
    release_warp(thread);
  }
  leave();
  return thread.result;
}

// ---- blocks and launches ------------------------------------------------------------------------

void start_threads() {
  const unsigned count = block_size.x * block_size.y * block_size.z;
  threads.assign(count, Thread{});
  ready.clear();
  for (unsigned i = 0; i < count; ++i) {
    Thread& t = threads[i];
    t.index = {i % block_size.x, i / block_size.x % block_size.y, i / (block_size.x * block_size.y)};
    t.context.start(stacks.of(i), kStackBytes, thread_main);
    make_ready(t);
  }
}

void run_block() {
  start_threads();
  for (;;) {
    while (!ready.empty()) {
      Thread& thread = next_ready();
      enter(thread);
      if (!failure.empty()) throw std::runtime_error("emulator: " + failure);
    }
    const auto is = [](State state) { return [state](const Thread& t) { return t.state == state; }; };
    if (std::all_of(threads.begin(), threads.end(), is(State::exited))) return;
    if (release_block()) continue;
    const bool warp = std::any_of(threads.begin(), threads.end(), is(State::at_warp_op));
    throw std::runtime_error(
        "emulator: " + std::string(warp ? "warp operation with missing lanes" : "divergent barrier") + ":" +
        whereabouts());
  }
}

void check_launch(dim3 grid, dim3 block, size_t shared_bytes) {
  const auto refuse = [](const std::string& why) { throw std::runtime_error("emulator: invalid launch: " + why); };
  const auto text = [](dim3 d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
  };
  const size_t count = size_t(block.x) * block.y * block.z;
  if (count == 0 || count > kMostThreads || block.z > 64) refuse("block " + text(block));
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) refuse("grid " + text(grid));
  if (shared_bytes > kMostSharedBytes) refuse(std::to_string(shared_bytes) + " bytes of dynamic shared memory");
}

}  // namespace

void run(const void* kernel, void (*run_body)(void*), void* arguments, size_t argument_bytes, dim3 grid, dim3 block,
         size_t shared_bytes) {
  const size_t blocks = size_t(grid.x) * grid.y * grid.z;
  if (blocks == 0) return;
  check_launch(grid, block, shared_bytes);
  sequence.push_back(kernel);
  if (dry) return;
  body = run_body;
  body_arguments = arguments;
  grid_size = grid;
  block_size = block;
  failure.clear();
  random_numbers.seed(seed);
  const memory::Launch launch(arguments, argument_bytes, shared_bytes);

  std::vector<size_t> order(blocks);
  std::iota(order.begin(), order.end(), size_t(0));
  if (seed == 1) std::reverse(order.begin(), order.end());
  if (seed > 1) std::shuffle(order.begin(), order.end(), random_numbers);
  for (const size_t i : order) {
    block_index = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
    memory::begin_block((block.x * block.y * block.z + kWarp - 1) / kWarp, seed);
    run_block();
  }
}

uint64_t meet_block(Op op, uint64_t value, Site site) { return meet(State::at_barrier, {op, site, ~0u, value, 0}); }
uint64_t meet_warp(Op op, unsigned mask, uint64_t value, unsigned source_lane, Site site) {
  return meet(State::at_warp_op, {op, site, mask, value, source_lane});
}

void atomic_access(void* address, size_t bytes, const void* code) {
  const Suspend suspend;
  if (seed > 1 && random_numbers() % 4 == 0) {
    make_ready(*running);
    leave();
  }
  memory::access(address, bytes, memory::Kind::atomic, code);
}

unsigned running_thread() { return index_of(*running); }

std::string describe_thread(unsigned index) {
  const auto text = [](uint3 i) {
    return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
  };
  return "thread " + text(threads[index].index) + " of block " + text(block_index);
}

void fail(const std::string& what) {
  failure = what;
  running->state = State::exited;
  leave();
  __builtin_unreachable();
}

bool is_stack(const void* address) { return stacks.contain(address); }

void clear(void* begin, size_t bytes) {
  if (bytes == 0) return;
  sequence.push_back(nullptr);
  memory::clear(begin, bytes);
}

void start(unsigned with_seed, bool dry_run) {
  forget();
  on = true;
  dry = dry_run;
  seed = with_seed;
  sequence.clear();
  met = 0;
}
void stop() {
  on = false;
  forget();
}
bool is_on() { return on; }

// By name: a kernel of the extension is a function that is called so, in a room.
static bool is_kernel(const std::string& function) {
  static const std::regex pattern(R"((void )?ssd_ext::\w+::\(anonymous namespace\)::\w+_kernel(<.*>)?\(.*\))");
  return function.find("{lambda") == std::string::npos && std::regex_match(function, pattern);
}

std::vector<std::string> kernels() {
  std::vector<std::string> names;
  for (const symbols::Symbol& s : symbols::functions())
    if (is_kernel(s.name)) names.push_back(s.name);
  return names;
}

std::vector<std::string> launches() {
  std::vector<std::string> names;
  for (const void* kernel : sequence) names.push_back(kernel ? symbols::name_of(kernel) : "clear");
  return names;
}

size_t meetings() { return met; }

unsigned char garbage() {
  static unsigned char last = 0x5a;
  return dry ? 0 : last += 0x4b;
}

}  // namespace emulator
