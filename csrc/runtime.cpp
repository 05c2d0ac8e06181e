// The Python module swat_ext._C: how the extension was built, and which instruction set its CPU kernels run on.
//
// Operators do not pass through here: loading this library registers them in torch.ops.swat_ext (see ops/).

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kernels/cpu/dispatch.h"

namespace py = pybind11;

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "gcc " __VERSION__;
#endif

// SWAT_* come from setup.py.
py::dict build_info() {
  py::dict info;
  info["version"] = SWAT_VERSION;
  info["compiler"] = kCompiler;
  info["flags"] = SWAT_FLAGS;
#ifdef SWAT_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["torch"] = SWAT_TORCH_VERSION;
  return info;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (swat::cpu::Isa isa : swat::cpu::supported()) names.emplace_back(swat::cpu::name(isa));
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  // What this throws becomes an ImportError with the same words.
  swat::cpu::force_from_environment();

  module.doc() = "Build information, and the instruction set of the CPU kernels.";
  module.def(
      "build_info", &build_info,
      "How this extension was built: version, compiler, flags, cuda (bool) and torch, the version built against.");
  module.def(
      "isa", [] { return swat::cpu::name(swat::cpu::active_isa()); },
      "Name of the instruction set that the CPU kernels use.");
  module.def("supported_isas", &supported_isas,
             "Names of the instruction sets that this processor runs, slowest first.");
  module.def("set_isa", &swat::cpu::force, py::arg("isa"),
             "Use the instruction set of this name, or 'auto' for the fastest, in every later call.\n\n"
             "Raises ValueError if the name is unknown or the processor does not support the set.");
}
