// The Python module peft_ext._C. Loading it registers the ops (static TORCH_LIBRARY initialisers).
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/version.h>

#include "cpu/capability.h"
#include "cpu/dropout.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = PEFT_EXT_VERSION;
  info["torch"] = TORCH_VERSION;
#ifdef __clang__
  info["compiler"] = __VERSION__;
#else
  info["compiler"] = "GCC " __VERSION__;
#endif
  info["cpp_standard"] = static_cast<long>(__cplusplus);
  info["isa_built"] = py::str(PEFT_EXT_ISA_BUILT).attr("split")(",");
  info["isa_in_use"] = peft_ext::isa_name(peft_ext::cpu_isa());
  info["amx"] = peft_ext::cpu_has_amx();
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#ifdef PEFT_EXT_CUDA_VERSION
  info["cuda"] = PEFT_EXT_CUDA_VERSION;
#else
  info["cuda"] = py::none();
#endif
  return info;
}

py::object draw_seed() {
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(peft_ext::draw_seed()));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info, "What this extension was built from and which instruction set it runs.");
  m.def("draw_seed", &draw_seed, "A fresh int64 seed [1] for dropout, from torch's generator of the CPU.");
}
