#pragma once
// The thread that is running, for the checks of memory.
#include <string>

namespace emulator {

// False while host code or the emulator itself runs, whose memory accesses are nobody's business: the
// linker may well have given them the checked copy of an inline function.
extern bool in_kernel;

struct Suspend {
  bool before = in_kernel;
  Suspend() { in_kernel = false; }
  ~Suspend() { in_kernel = before; }
};

constexpr unsigned kWarp = 32;
constexpr unsigned kMostThreads = 1024;

unsigned running_thread();                        // its index in the block
std::string describe_thread(unsigned index);      // "thread (3, 0, 0) of block (1, 0, 0)"
[[noreturn]] void fail(const std::string& what);  // ends the launch: run() throws
bool is_stack(const void* address);               // of an emulated thread

}  // namespace emulator
