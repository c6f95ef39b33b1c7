// ssd_ext._C.emulator, for the tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "emulator.h"
#include "mutants.h"

int emulator::mutant = -1;

void bind_emulator(pybind11::module_ m) {
  m.doc() = "Runs the CUDA kernels on the CPU";
  m.def("start", &emulator::start, pybind11::arg("seed"), pybind11::arg("dry_run") = false);
  m.def("stop", &emulator::stop);
  m.def("kernels", &emulator::kernels);
  m.def("launches", &emulator::launches);
  m.def("meetings", &emulator::meetings);
  m.def("fault_names", &emulator::fault_names);
  m.def("run_fault", &emulator::run_fault);
  m.def("set_mutant", [](int number) { emulator::mutant = number; });  // see mutate.py
}
