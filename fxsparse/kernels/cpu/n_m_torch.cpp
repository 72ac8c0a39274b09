// `fxsparse::n_m_into` as torch's dispatcher calls it: checks the tensors, then runs n_m.cpp.
//
// Only torch's stable C++ interface is used; see shuffled_block_torch.cpp, which does the same for its format.

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <optional>
#include <type_traits>

#include "n_m.h"
#include "torch_call.h"

namespace {

using n_m::Problem;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using Kernel = void (*)(const void* problem, const void* x, void* y, const void* values, const void* codes, const void* bias);

Kernel float32_kernel = nullptr, bfloat16_kernel = nullptr, float64_kernel = nullptr;

Kernel kernel_for(ScalarType dtype) {
    switch (dtype) {
        case ScalarType::Float: return float32_kernel;
        case ScalarType::BFloat16: return bfloat16_kernel;
        case ScalarType::Double: return float64_kernel;
        default: return nullptr;
    }
}

void n_m_into(Tensor x, Tensor values, Tensor codes, std::optional<Tensor> bias, int64_t rows, int64_t columns, int64_t n,
              int64_t m, Tensor out) {
    const auto dtype = x.scalar_type();
    const Call call{"n_m", x, out};
    const Kernel kernel = kernel_for(dtype);
    call.expect(kernel && m == 4 && (n == 1 || n == 2), "1:4 or 2:4 in float32, bfloat16 or float64");
    call.expect(values.scalar_type() == dtype && out.scalar_type() == dtype, "values and output in the dtype of x");
    call.expect(x.dim() > 0 && x.sizes()[x.dim() - 1] == columns, "the weight's columns in the last dimension of x");
    call.expect(values.numel() == (rows + 15) / 16 * 16 * (columns / 4) * n, "values of the weight's shape");
    call.expect(out.is_contiguous() && out.dim() == x.dim() && out.sizes()[out.dim() - 1] == rows &&
                    out.numel() * columns == x.numel() * rows,
                "a contiguous output of the product's shape");
    if (bias) call.expect(bias->scalar_type() == dtype && bias->numel() == rows, "a bias of the output's columns and dtype");
    if (!out.numel()) return;
    x = dense(x);
    bias = dense(bias);
    const Problem problem{x.numel() / columns, rows, columns, n, torch::stable::get_num_threads()};
    kernel(&problem, x.data_ptr(), out.data_ptr(), values.data_ptr(), codes.data_ptr(), data_of(bias));
}

}  // namespace

#if defined(FXSPARSE_STANDALONE)
extern "C" std::remove_pointer_t<Kernel> fxsparse_n_m_f32, fxsparse_n_m_bf16, fxsparse_n_m_f64;

STABLE_TORCH_LIBRARY_FRAGMENT(fxsparse, m) {
    float32_kernel = fxsparse_n_m_f32;
    bfloat16_kernel = fxsparse_n_m_bf16;
    float64_kernel = fxsparse_n_m_f64;
    m.def(
        "n_m_into(Tensor x, Tensor values, Tensor codes, Tensor? bias, int rows, int columns, int n, int m, Tensor(a!) out)"
        " -> ()");
}
#else
extern "C" void fxsparse_use_kernels(Kernel of_float32, Kernel of_bfloat16, Kernel of_float64) {
    float32_kernel = of_float32;
    bfloat16_kernel = of_bfloat16;
    float64_kernel = of_float64;
}
#endif

STABLE_TORCH_LIBRARY_IMPL(fxsparse, CPU, m) { m.impl("n_m_into", TORCH_BOX(&n_m_into)); }
