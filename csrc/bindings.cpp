// The Python module torch_spe._C. Loading it registers the operators with PyTorch's dispatcher.
#include <torch/csrc/utils/pybind.h>

#include "torch_spe/torch_spe.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of torch_spe.";
  m.def("build_info", [] {
    const torch_spe::BuildInfo info = torch_spe::build_info();
    pybind11::dict dict;
    dict["version"] = info.version;
    dict["torch"] = info.torch;
    dict["compiler"] = info.compiler;
    dict["cuda"] =
        info.cuda.empty() ? pybind11::object(pybind11::none()) : pybind11::str(info.cuda);
    dict["cuda_architectures"] = info.cuda_architectures;
    dict["instruction_set"] = info.instruction_set;
    return dict;
  });
  m.def("sine_filter", &torch_spe::sine_filter, pybind11::arg("x"), pybind11::arg("freqs"),
        pybind11::arg("weight"), pybind11::arg("constant") = pybind11::none(),
        pybind11::arg("positions") = pybind11::none(), pybind11::arg("start") = 0.0,
        pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("phasor_filter", &torch_spe::phasor_filter, pybind11::arg("x"), pybind11::arg("freqs"),
        pybind11::arg("coefficients"), pybind11::arg("constant") = pybind11::none(),
        pybind11::arg("positions") = pybind11::none(), pybind11::arg("start") = 0.0,
        pybind11::call_guard<pybind11::gil_scoped_release>());
}
