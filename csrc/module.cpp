// The Python module. It tells how it was built; the ops register themselves with torch when it is
// loaded. No torch header here: torch bundles its own, older pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "common/simd.h"

namespace {

std::map<std::string, std::string> build_info() {
  return {
      {"torch_headers", SSD_EXT_TORCH_HEADERS},
      {"torch_target", SSD_EXT_TORCH_TARGET},
#if defined(SSD_EXT_WITH_CUDA)
      {"cuda", SSD_EXT_CUDA_VERSION},
      {"cuda_architectures", SSD_EXT_CUDA_ARCHITECTURES},
#endif
#if defined(SSD_EXT_EMULATE)
      {"emulator", SSD_EXT_EMULATE},
#endif
#if defined(SSD_EXT_SANITIZE)
      {"sanitizers", "address,undefined"},
#endif
#if defined(__clang__)
      {"compiler", __VERSION__},
#else
      {"compiler", "GCC " __VERSION__},
#endif
  };
}

}  // namespace

#if defined(SSD_EXT_EMULATE)
void bind_emulator(pybind11::module_ m);
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of ssd_ext: importing it registers torch.ops.ssd_ext.*";
  m.def("build_info", &build_info, "How this module was built; no 'cuda' key in a CPU-only build.");
  m.def("simd_level", &ssd_ext::simd_level_name, "Instruction set of the CPU kernels: baseline, avx2 or avx512.");
  m.def("set_simd_level", &ssd_ext::set_simd_level, "Changes it, for tests; ValueError where the CPU lacks it.");
#if defined(SSD_EXT_EMULATE)
  bind_emulator(m.def_submodule("emulator"));
#endif
}
