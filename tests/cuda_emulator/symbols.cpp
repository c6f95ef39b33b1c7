#include "symbols.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <stdexcept>

namespace emulator::symbols {
namespace {

thread_local char marker;  // gives every build of this module a thread-local block

struct Table {
  std::vector<Symbol> functions, thread_locals;
};

struct Module {
  std::string path;
  uintptr_t begin = 0, end = 0;
  size_t tls_bytes = 0;

  Module() {
    Dl_info info;
    dladdr(reinterpret_cast<void*>(&line_of), &info);
    path = info.dli_fname;
    begin = reinterpret_cast<uintptr_t>(info.dli_fbase);
    dl_iterate_phdr(
        [](dl_phdr_info* object, size_t, void* self) {
          Module& module = *static_cast<Module*>(self);
          if (object->dlpi_addr != module.begin) return 0;
          for (int i = 0; i < object->dlpi_phnum; ++i) {
            const ElfW(Phdr) & header = object->dlpi_phdr[i];
            if (header.p_type == PT_LOAD) module.end = object->dlpi_addr + header.p_vaddr + header.p_memsz;
            if (header.p_type == PT_TLS) module.tls_bytes = header.p_memsz;
          }
          return 1;
        },
        this);
  }
};

const Module& module() {
  static const Module it;
  return it;
}

std::string demangled(const char* name) {
  int status;
  char* text = abi::__cxa_demangle(name, nullptr, nullptr, &status);
  const std::string result = status == 0 ? text : name;
  std::free(text);
  return result;
}

// Hidden and local symbols are in the file's .symtab only, which is not loaded.
Table read_table() {
  std::ifstream file(module().path, std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const auto* elf = reinterpret_cast<const ElfW(Ehdr)*>(bytes.data());
  const auto* sections = reinterpret_cast<const ElfW(Shdr)*>(bytes.data() + elf->e_shoff);
  Table table;
  for (int s = 0; s < elf->e_shnum; ++s) {
    if (sections[s].sh_type != SHT_SYMTAB) continue;
    const char* names = bytes.data() + sections[sections[s].sh_link].sh_offset;
    const auto* symbol = reinterpret_cast<const ElfW(Sym)*>(bytes.data() + sections[s].sh_offset);
    for (size_t i = 0; i < sections[s].sh_size / sizeof(*symbol); ++i, ++symbol) {
      if (symbol->st_shndx == SHN_UNDEF) continue;
      const int type = symbol->st_info & 15;
      if (type != STT_FUNC && type != STT_TLS) continue;
      auto& list = type == STT_FUNC ? table.functions : table.thread_locals;
      list.push_back({demangled(names + symbol->st_name), symbol->st_value, symbol->st_size});
    }
  }
  if (table.functions.empty()) throw std::runtime_error("emulator: " + module().path + " is stripped of its symbols");
  return table;
}

const Table& table() {
  static const Table it = read_table();
  return it;
}

}  // namespace

const std::vector<Symbol>& functions() { return table().functions; }
const std::vector<Symbol>& thread_locals() { return table().thread_locals; }

char* thread_local_block() {
  static const uintptr_t offset = [] {
    for (const Symbol& s : thread_locals())
      if (s.name.find("symbols::") != std::string::npos && s.name.find("marker") != std::string::npos) return s.offset;
    throw std::runtime_error("emulator: no thread-local marker in the symbol table");
  }();
  return &marker - offset;
}

const char* module_begin() { return reinterpret_cast<const char*>(module().begin); }

bool is_module(const void* address) {
  const auto a = reinterpret_cast<uintptr_t>(address);
  return module().begin <= a && a < module().end;
}

std::string name_of(const void* function) {
  const uintptr_t offset = reinterpret_cast<uintptr_t>(function) - module().begin;
  for (const Symbol& s : functions())
    if (s.offset == offset) return s.name;
  return "?";
}

std::string line_of(const void* code) {
  char command[4096], text[512];
  const uintptr_t offset = reinterpret_cast<uintptr_t>(code) - module().begin - 1;  // the call, not what follows it
  snprintf(command, sizeof(command), "addr2line -i -s -e '%s' %#zx 2>/dev/null", module().path.c_str(), size_t(offset));
  std::string line = "?";
  if (FILE* pipe = popen(command, "r")) {
    // The innermost function comes first: an atomic of the emulator's, perhaps.
    while (fgets(text, sizeof(text), pipe)) {
      const std::string next = text;
      if (line == "?" || line.find("cuda_emulator.h") == 0) line = next.substr(0, next.find_first_of(" \n"));
    }
    pclose(pipe);
  }
  return line;
}

}  // namespace emulator::symbols
