// The Python module torch_spe._C. Loading it registers the operators with PyTorch's dispatcher.
#include <torch/csrc/utils/pybind.h>

#include "core/streams.h"
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
  pybind11::dict streams;
  for (const torch_spe::core::NamedStream& named : torch_spe::core::kStreams) {
    streams[named.name] = static_cast<int64_t>(named.stream);
  }
  m.attr("STREAMS") = streams;
  const std::vector<int64_t> none;
  m.def(
      "conv_filter",
      [](const at::Tensor& x, const at::Tensor& kernel, const std::optional<at::Tensor>& noise,
         const std::optional<at::Tensor>& constant, const std::optional<at::Tensor>& seed,
         std::optional<int64_t> num_realizations, const std::string& noise_kind,
         const std::vector<int64_t>& noise_stride, const std::vector<int64_t>& start) {
        return torch_spe::conv_filter(x, kernel, noise, constant, seed, num_realizations,
                                      noise_kind, noise_stride, start);
      },
      pybind11::arg("x"), pybind11::arg("kernel"), pybind11::arg("noise") = pybind11::none(),
      pybind11::arg("constant") = pybind11::none(), pybind11::arg("seed") = pybind11::none(),
      pybind11::arg("num_realizations") = pybind11::none(),
      pybind11::arg("noise_kind") = "gaussian", pybind11::arg("noise_stride") = none,
      pybind11::arg("start") = none, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("sine_filter", &torch_spe::sine_filter, pybind11::arg("x"), pybind11::arg("freqs"),
        pybind11::arg("weight"), pybind11::arg("constant") = pybind11::none(),
        pybind11::arg("positions") = pybind11::none(), pybind11::arg("start") = 0.0,
        pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("phasor_filter", &torch_spe::phasor_filter, pybind11::arg("x"), pybind11::arg("freqs"),
        pybind11::arg("coefficients"), pybind11::arg("constant") = pybind11::none(),
        pybind11::arg("positions") = pybind11::none(), pybind11::arg("start") = 0.0,
        pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("sine_features", &torch_spe::sine_features, pybind11::arg("x"), pybind11::arg("freqs"),
        pybind11::arg("amplitudes"), pybind11::arg("offsets") = pybind11::none(),
        pybind11::arg("constant") = pybind11::none(), pybind11::arg("positions") = pybind11::none(),
        pybind11::arg("start") = 0.0, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("linear_attention", &torch_spe::linear_attention, pybind11::arg("q"), pybind11::arg("k"),
        pybind11::arg("v"), pybind11::arg("feature_map") = "elu", pybind11::arg("causal") = false,
        pybind11::arg("normalize") = true, pybind11::arg("eps") = 1e-6,
        pybind11::arg("key_padding_mask") = pybind11::none(),
        pybind11::arg("cu_seqlens") = pybind11::none(),
        pybind11::arg("initial_s") = pybind11::none(),
        pybind11::arg("initial_z") = pybind11::none(), pybind11::arg("return_state") = false,
        pybind11::call_guard<pybind11::gil_scoped_release>());
}
