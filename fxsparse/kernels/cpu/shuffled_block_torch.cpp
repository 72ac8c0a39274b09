// `fxsparse::shuffled_block_into` as torch's dispatcher calls it: checks the tensors, then runs shuffled_block.cpp.
//
// Only torch's stable C++ interface is used. The packed arrays were checked when they were packed; everything else is
// checked here, since a wrong size would be read past its end. fxsparse/kernels/cpu/shuffled_block.py builds this file,
// loads it and hands over the kernels, which are compiled apart. With FXSPARSE_STANDALONE it is linked to them and defines
// the operator as well: that is for programs without Python.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "shuffled_block.h"
#include "torch_call.h"

namespace {

using shuffled_block::Problem;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;
using Kernel = void (*)(const void* problem, const void* x, void* y, const void* values, const void* value_ptr,
                        const void* columns, const void* column_ptr, const void* rows, const void* row_ptr,
                        const void* bias, const void* residual);

Kernel float32_kernel = nullptr, bfloat16_kernel = nullptr;
constexpr int64_t LARGEST_IMAGE = int64_t{1} << 29;  // elements: inside an image the kernel counts with 32 bits
const char* const ACTIVATIONS[] = {"none", "relu", "relu6", "silu", "gelu", "hardswish"};

int64_t number_of(const std::string& activation) {
    const auto* const end = std::end(ACTIVATIONS);
    return std::find(std::begin(ACTIVATIONS), end, activation) - std::begin(ACTIVATIONS);
}

int64_t output_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
    return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

bool same_shape(const Tensor& a, const Tensor& b) {
    const auto of_a = a.sizes(), of_b = b.sizes();
    if (of_a.size() != of_b.size()) return false;
    for (size_t i = 0; i < of_a.size(); i++)
        if (of_a[i] != of_b[i]) return false;
    return true;
}

// All of it but its last three numbers. Without image dimensions all pixels are one line.
Problem problem(const Call& call, const Sizes& shape, const Sizes& stride, const Sizes& padding, const Sizes& dilation) {
    const int64_t kh = shape.size() == 4 ? shape[2] : 1, kw = shape.size() == 4 ? shape[3] : 1;
    const auto from = call.x.sizes(), to = call.out.sizes();
    const size_t last = from.size() - 1;
    const bool image = from.size() == 4;
    const bool pointwise = kh * kw * stride[0] * stride[1] == 1 && !padding[0] && !padding[1];
    call.expect(!from.empty() && from.size() == to.size(), "an output with as many dimensions as x");
    call.expect(from[last] == shape[1] && to[last] == shape[0], "the weight's channels in the last dimension");
    call.expect(image || pointwise, "x [N, H, W, I]");
    const int64_t n = image ? from[0] : 1, h = image ? from[1] : 1, w = image ? from[2] : call.x.numel() / shape[1];
    const int64_t oh = output_size(h, kh, stride[0], padding[0], dilation[0]);
    const int64_t ow = output_size(w, kw, stride[1], padding[1], dilation[1]);
    call.expect(oh > 0 && ow > 0 && call.out.numel() == n * oh * ow * shape[0], "an output of the product's size");
    call.expect(!image || (to[0] == n && to[1] == oh && to[2] == ow), "an output of the product's shape");
    call.expect(h * w * shape[1] <= LARGEST_IMAGE, "images of at most 2^29 elements");
    return {n, h, w, shape[1], oh, ow, shape[0], kh, kw, stride[0], stride[1], padding[0], padding[1], dilation[0],
            dilation[1], 0, 0, 0};
}

void shuffled_block_into(Tensor x, Tensor values, Tensor value_ptr, Tensor columns, Tensor column_ptr, Tensor rows,
                         Tensor row_ptr, std::optional<Tensor> bias, std::optional<Tensor> residual, Sizes shape,
                         Sizes stride, Sizes padding, Sizes dilation, std::string activation, Tensor out) {
    const ScalarType dtype = x.scalar_type();
    const Call call{"shuffled_block", x, out};
    call.expect(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "float32 or bfloat16");
    call.expect(out.scalar_type() == dtype && out.is_contiguous(), "a contiguous output in the dtype of x");
    call.expect(values.scalar_type() == dtype, "packed values in the dtype of x");
    if (!out.numel()) return;
    Problem q = problem(call, shape, stride, padding, dilation);
    if (bias) call.expect(bias->scalar_type() == dtype && bias->numel() == shape[0], "a bias of the output's channels and dtype");
    if (residual) call.expect(residual->scalar_type() == dtype && same_shape(*residual, out), "a residual like the output");
    q.groups = row_ptr.numel() - 1;
    q.activation = number_of(activation);
    call.expect(q.activation < 6, "a known activation");
    q.threads = torch::stable::get_num_threads();
    x = dense(x);
    bias = dense(bias);
    residual = dense(residual);
    const Kernel kernel = dtype == ScalarType::Float ? float32_kernel : bfloat16_kernel;
    kernel(&q, x.data_ptr(), out.data_ptr(), values.data_ptr(), value_ptr.data_ptr(), columns.data_ptr(),
           column_ptr.data_ptr(), rows.data_ptr(), row_ptr.data_ptr(), data_of(bias), data_of(residual));
}

}  // namespace

#if defined(FXSPARSE_STANDALONE)
extern "C" std::remove_pointer_t<Kernel> fxsparse_shuffled_block_f32, fxsparse_shuffled_block_bf16;

STABLE_TORCH_LIBRARY_FRAGMENT(fxsparse, m) {
    float32_kernel = fxsparse_shuffled_block_f32;
    bfloat16_kernel = fxsparse_shuffled_block_bf16;
    m.def(
        "shuffled_block_into(Tensor x, Tensor values, Tensor value_ptr, Tensor columns, Tensor column_ptr, Tensor rows,"
        " Tensor row_ptr, Tensor? bias, Tensor? residual, int[] shape, int[2] stride, int[2] padding, int[2] dilation,"
        " str activation, Tensor(a!) out) -> ()");
}
#else
extern "C" void fxsparse_use_kernels(Kernel of_float32, Kernel of_bfloat16) {
    float32_kernel = of_float32;
    bfloat16_kernel = of_bfloat16;
}
#endif

STABLE_TORCH_LIBRARY_IMPL(fxsparse, CPU, m) { m.impl("shuffled_block_into", TORCH_BOX(&shuffled_block_into)); }
