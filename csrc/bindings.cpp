// Registers the kernels of every op and defines the module dgm_kernels._C.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include <string>

#include "common/isa.h"

namespace py = pybind11;

namespace {

py::list split_commas(const std::string& text) { return py::str(text).attr("split")(","); }

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = DGM_COMPILER;
  info["isas"] = split_commas(DGM_ISAS);
#ifdef DGM_WITH_CUDA
  info["cuda"] = DGM_CUDA_VERSION;
  info["cuda_archs"] = split_commas(DGM_CUDA_ARCHS);
#else
  info["cuda"] = py::none();
  info["cuda_archs"] = py::list();
#endif
  return info;
}

}  // namespace

// ---- Operator registrations: one TORCH_LIBRARY_IMPL block per dispatch key; the schemas are in dgm_kernels/<op>/op.py

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of dgm_kernels; importing it registers them with torch.ops.dgm.";
  m.def("build_info", &build_info, "What the extension was built with.");
  m.def("active_isa", [] { return dgm::isa_name(dgm::active_isa()); }, "The instruction set that the CPU kernels use.");
}
