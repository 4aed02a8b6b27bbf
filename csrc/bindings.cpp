// Registers the kernels of every op and defines the module dgm_kernels._C.
#include <pybind11/pybind11.h>
#include <torch/library.h>
#include <torch/version.h>

#include <string>

#include "attention/launch.h"
#include "common/isa.h"
#include "coupling/launch.h"
#include "density/launch.h"
#include "latent/launch.h"
#include "masked_conv/launch.h"
#include "masked_conv/launch_pixel.h"
#include "norm/launch.h"
#include "sampler/launch.h"

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

// The schemas are in dgm_kernels/<op>/op.py; a backend is an overload. These ops have kernels for CPU and CUDA.
void register_kernels(torch::Library& m, const std::string& backend) {
  const auto impl = [&](const char* op, auto kernel) { m.impl((op + ("." + backend)).c_str(), kernel); };
  impl("noise_like", TORCH_FN(dgm::sampler::noise_like));
  impl("sampler_step", TORCH_FN(dgm::sampler::sampler_step));
  impl("sampler_step_out", TORCH_FN(dgm::sampler::sampler_step_out));
  impl("add_noise", TORCH_FN(dgm::sampler::add_noise));
  impl("denoising_loss", TORCH_FN(dgm::sampler::denoising_loss));
}

}  // namespace

TORCH_LIBRARY_IMPL(dgm, CPU, m) {
  register_kernels(m, "cpp");
  m.impl("attention.cpp", TORCH_FN(dgm::attention::attention));
  m.impl("attention_backward.cpp", TORCH_FN(dgm::attention::backward));
  m.impl("attention_jvp.cpp", TORCH_FN(dgm::attention::jvp));
  m.impl("attention_decode.cpp", TORCH_FN(dgm::attention::decode));
  m.impl("coupling_affine.cpp", TORCH_FN(dgm::coupling::affine));
  m.impl("coupling_affine_backward.cpp", TORCH_FN(dgm::coupling::affine_backward));
  m.impl("coupling_spline.cpp", TORCH_FN(dgm::coupling::spline));
  m.impl("coupling_spline_backward.cpp", TORCH_FN(dgm::coupling::spline_backward));
  m.impl("coupling_log_prob.cpp", TORCH_FN(dgm::coupling::log_prob));
  m.impl("coupling_made_inverse.cpp", TORCH_FN(dgm::coupling::made_inverse));
  m.impl("latent_bound.cpp", TORCH_FN(dgm::latent::bound));
  m.impl("latent_bound_backward.cpp", TORCH_FN(dgm::latent::bound_backward));
  m.impl("latent_importance.cpp", TORCH_FN(dgm::latent::importance));
  m.impl("latent_importance_backward.cpp", TORCH_FN(dgm::latent::importance_backward));
  m.impl("latent_kl.cpp", TORCH_FN(dgm::latent::kl));
  m.impl("latent_kl_backward.cpp", TORCH_FN(dgm::latent::kl_backward));
  m.impl("latent_quantize.cpp", TORCH_FN(dgm::latent::quantize));
  m.impl("latent_quantize_backward.cpp", TORCH_FN(dgm::latent::quantize_backward));
  m.impl("latent_sample.cpp", TORCH_FN(dgm::latent::sample));
  m.impl("latent_sample_backward.cpp", TORCH_FN(dgm::latent::sample_backward));
  m.impl("latent_tril.cpp", TORCH_FN(dgm::latent::tril));
  m.impl("latent_tril_backward.cpp", TORCH_FN(dgm::latent::tril_backward));
  m.impl("density_log_prob.cpp", TORCH_FN(dgm::density::log_prob));
  m.impl("density_moments.cpp", TORCH_FN(dgm::density::moments));
  m.impl("density_grad_x.cpp", TORCH_FN(dgm::density::grad_x));
  m.impl("density_mean.cpp", TORCH_FN(dgm::density::mean));
  m.impl("density_mean_grad.cpp", TORCH_FN(dgm::density::mean_grad));
  m.impl("density_kernel_sum.cpp", TORCH_FN(dgm::density::kernel_sum));
  m.impl("density_kernel_sum_grad.cpp", TORCH_FN(dgm::density::kernel_sum_grad));
  m.impl("masked_conv.cpp", TORCH_FN(dgm::masked_conv::conv));
  m.impl("masked_conv_input_grad.cpp", TORCH_FN(dgm::masked_conv::input_grad));
  m.impl("masked_conv_weight_grad.cpp", TORCH_FN(dgm::masked_conv::weight_grad));
  m.impl("masked_conv_gate.cpp", TORCH_FN(dgm::masked_conv::gate));
  m.impl("masked_conv_gate_backward.cpp", TORCH_FN(dgm::masked_conv::gate_backward));
  m.impl("masked_conv_mixture.cpp", TORCH_FN(dgm::masked_conv::mixture));
  m.impl("masked_conv_mixture_backward.cpp", TORCH_FN(dgm::masked_conv::mixture_backward));
  m.impl("masked_conv_categorical.cpp", TORCH_FN(dgm::masked_conv::categorical));
  m.impl("masked_conv_categorical_backward.cpp", TORCH_FN(dgm::masked_conv::categorical_backward));
  m.impl("masked_conv_pack.cpp", TORCH_FN(dgm::masked_conv::pack_program));
  m.impl("masked_conv_generate.cpp", TORCH_FN(dgm::masked_conv::generate));
  m.impl("norm_rows.cpp", TORCH_FN(dgm::norm::rows));
  m.impl("norm_rows_backward.cpp", TORCH_FN(dgm::norm::rows_backward));
  m.impl("norm_group_silu.cpp", TORCH_FN(dgm::norm::group_silu));
  m.impl("norm_group_silu_backward.cpp", TORCH_FN(dgm::norm::group_silu_backward));
}

#ifdef DGM_WITH_CUDA
TORCH_LIBRARY_IMPL(dgm, CUDA, m) { register_kernels(m, "cuda"); }
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of dgm_kernels; importing it registers them with torch.ops.dgm.";
  m.def("build_info", &build_info, "What the extension was built with.");
  m.def("active_isa", [] { return dgm::isa_name(dgm::active_isa()); }, "The instruction set that the CPU kernels use.");
}
