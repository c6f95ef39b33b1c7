#pragma once
// How the host uses the emulator: bindings declare memory, tests switch it on.
#include <cstddef>
#include <string>
#include <vector>

namespace emulator {

// While it is on, ops on CPU tensors run their CUDA kernels here. The seed orders threads and blocks:
// 0: ascending, 1: descending, others: at random. With `dry_run`, launches are counted and nothing runs.
void start(unsigned seed, bool dry_run = false);
void stop();
bool is_on();

// What a kernel may do with memory that is declared to it; it may touch no other.
enum class Content {
  input,      // read
  undefined,  // write, and read what the kernels of this call have written
};
void declare(const void* memory, size_t bytes, Content content);
void forget();  // all that is declared: the call is over

// An array within undefined memory that is declared, if `workspace` is not null: from here on only such arrays
// of it may be touched. Returns how many bytes to leave free behind it, so that leaving it is noticed.
size_t declare_array(const void* array, size_t bytes, const void* workspace);

// Kernels of this module, demangled.
std::vector<std::string> kernels();

// What has been launched since start(), in order; "clear" for gpu::clear().
std::vector<std::string> launches();

// How many barriers and warp operations have been passed since start(): a count of steps, for tests of bounds.
size_t meetings();

// A byte for fresh memory, another one each time; 0 in a dry run, in which lengths are read that nobody has written.
unsigned char garbage();

// Small kernels, each with one fault that a checker must report (faults.cu).
std::vector<std::string> fault_names();
void run_fault(const std::string& name);

}  // namespace emulator
