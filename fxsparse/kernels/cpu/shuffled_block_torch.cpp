// `fxsparse::shuffled_block_into` as torch's dispatcher calls it: checks the tensors, then runs shuffled_block.cpp.
//
// Only torch's stable C++ interface is used. The packed arrays were checked when they were packed; everything else is
// checked here, since a wrong size would be read past its end. fxsparse/kernels/cpu/shuffled_block.py builds this file,
// loads it and hands over the kernels, which are compiled apart. With FXSPARSE_STANDALONE it is linked to them and defines
// the operator as well: that is for programs without Python.

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <optional>
#include <type_traits>

#include "shuffled_block.h"
#include "torch_call.h"

namespace {

using shuffled_block::Layer;
using shuffled_block::Problem;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Kernel = void (*)(const void* problem, const void* x, void* y, const void* values, const void* value_ptr,
                        const void* columns, const void* column_ptr, const void* rows, const void* row_ptr,
                        const void* bias, const void* residual);

Kernel float32_kernel = nullptr, bfloat16_kernel = nullptr;
constexpr int64_t LARGEST_IMAGE = int64_t{1} << 29;  // elements: inside an image the kernel counts with 32 bits

int64_t output_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
    return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

// At least what a convolution lays out at once with pixels in lanes; `_planes` in fxsparse/formats/shuffled_block_op.py.
int64_t planes(const Layer& l, int64_t out_width) {
    const int64_t row = out_width * l.stride_x + (l.kernel_width - 1) * l.dilation_x + 1;
    const int64_t rows = 2 * l.stride_y + (l.kernel_height - 1) * l.dilation_y;
    return l.channels * (l.stride_y * l.stride_x * 2 * shuffled_block::LEAST_PIXELS + rows * row);
}

bool same_shape(const Tensor& a, const Tensor& b) {
    const auto of_a = a.sizes(), of_b = b.sizes();
    if (of_a.size() != of_b.size()) return false;
    for (size_t i = 0; i < of_a.size(); i++)
        if (of_a[i] != of_b[i]) return false;
    return true;
}

// Without image dimensions all pixels are one line.
Problem problem(const Call& call, const Layer& l) {
    const auto from = call.x.sizes(), to = call.out.sizes();
    const size_t last = from.size() - 1;
    const bool image = from.size() == 4;
    const bool pointwise = l.kernel_height * l.kernel_width * l.stride_y * l.stride_x == 1 && !l.padding_y && !l.padding_x;
    call.expect(!from.empty() && from.size() == to.size(), "an output with as many dimensions as x");
    call.expect(from[last] == l.channels && to[last] == l.out_channels, "the weight's channels in the last dimension");
    call.expect(image || pointwise, "x [N, H, W, I]");
    const int64_t n = image ? from[0] : 1, h = image ? from[1] : 1, w = image ? from[2] : call.x.numel() / l.channels;
    const int64_t oh = output_size(h, l.kernel_height, l.stride_y, l.padding_y, l.dilation_y);
    const int64_t ow = output_size(w, l.kernel_width, l.stride_x, l.padding_x, l.dilation_x);
    call.expect(oh > 0 && ow > 0 && call.out.numel() == n * oh * ow * l.out_channels, "an output of the product's size");
    call.expect(!image || (to[0] == n && to[1] == oh && to[2] == ow), "an output of the product's shape");
    call.expect(h * w * l.channels <= LARGEST_IMAGE, "images of at most 2^29 elements");
    if (l.lanes == shuffled_block::PIXELS_IN_LANES && !pointwise)
        call.expect(planes(l, ow) <= LARGEST_IMAGE, "rows of an image, as many as taps reach, of at most 2^29 elements");
    return {n, h, w, l.channels, oh, ow, l.out_channels, l.kernel_height, l.kernel_width, l.stride_y, l.stride_x,
            l.padding_y, l.padding_x, l.dilation_y, l.dilation_x, l.groups, l.activation, torch::stable::get_num_threads(), l.lanes, 0};
}

// Whether x is [N, I, H, W], seen as [N, H, W, I], as a model is given its images: that is read as it is.
bool in_planes(const Tensor& x, const Problem& q) {
    if (x.sizes().size() != 4 || q.lanes != shuffled_block::ROWS_IN_LANES) return false;
    const auto step = x.strides();
    const int64_t plane = q.height * q.width, padded = (q.height + 2 * q.padding_y) * (q.width + 2 * q.padding_x);
    return step[1] == q.width && step[2] == 1 && step[3] == plane && (q.images == 1 || step[0] == q.channels * plane) &&
           padded * q.channels <= LARGEST_IMAGE;
}

const Layer& layer_of(const Call& call, const Tensor& folded, const Tensor& values) {
    const int64_t n = folded.numel();
    call.expect(folded.scalar_type() == ScalarType::Long && folded.is_contiguous() && n * 8 >= int64_t{sizeof(Layer)},
                "a layer of int64");
    const Layer& layer = *static_cast<const Layer*>(folded.data_ptr());
    call.expect(layer.end == n && layer.values == values.numel(), "a layer that is whole, and its own values");
    return layer;
}

void shuffled_block_into(Tensor x, Tensor values, Tensor folded, std::optional<Tensor> residual, Tensor out) {
    const ScalarType dtype = x.scalar_type();
    const Call call{"shuffled_block", x, out};
    call.expect(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "float32 or bfloat16");
    call.expect(out.scalar_type() == dtype && out.is_contiguous(), "a contiguous output in the dtype of x");
    call.expect(values.scalar_type() == dtype, "packed values in the dtype of x");
    if (!out.numel()) return;
    const Layer& layer = layer_of(call, folded, values);
    Problem q = problem(call, layer);
    if (residual) call.expect(residual->scalar_type() == dtype && same_shape(*residual, out), "a residual like the output");
    q.planes = !x.is_contiguous() && in_planes(x, q);
    if (!q.planes) x = dense(x);
    residual = dense(residual);
    const auto* const words = reinterpret_cast<const int64_t*>(&layer);
    const Kernel kernel = dtype == ScalarType::Float ? float32_kernel : bfloat16_kernel;
    kernel(&q, x.data_ptr(), out.data_ptr(), values.data_ptr(), words + layer.value_ptr, words + layer.columns,
           words + layer.column_ptr, words + layer.rows, words + layer.row_ptr,
           layer.bias ? words + layer.bias : nullptr, data_of(residual));
}

}  // namespace

#if defined(FXSPARSE_STANDALONE)
extern "C" std::remove_pointer_t<Kernel> fxsparse_shuffled_block_f32, fxsparse_shuffled_block_bf16;

STABLE_TORCH_LIBRARY_FRAGMENT(fxsparse, m) {
    float32_kernel = fxsparse_shuffled_block_f32;
    bfloat16_kernel = fxsparse_shuffled_block_bf16;
    m.def("shuffled_block_into(Tensor x, Tensor values, Tensor layer, Tensor? residual, Tensor(a!) out) -> ()");
}
#else
extern "C" void fxsparse_use_kernels(Kernel of_float32, Kernel of_bfloat16) {
    float32_kernel = of_float32;
    bfloat16_kernel = of_bfloat16;
}
#endif

STABLE_TORCH_LIBRARY_IMPL(fxsparse, CPU, m) { m.impl("shuffled_block_into", TORCH_BOX(&shuffled_block_into)); }
