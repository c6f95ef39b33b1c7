#pragma once
// What the symbol table of this module knows.
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace emulator::symbols {

struct Symbol {
  std::string name;  // demangled
  uintptr_t offset;  // from the beginning of the module, or of its thread-local block
  size_t bytes;
};

const std::vector<Symbol>& functions();
const std::vector<Symbol>& thread_locals();
char* thread_local_block();  // of this module, in the calling thread
const char* module_begin();
bool is_module(const void* address);  // code or data of this module

std::string name_of(const void* function);
std::string line_of(const void* code);  // "matching.cu:123", by addr2line

}  // namespace emulator::symbols
