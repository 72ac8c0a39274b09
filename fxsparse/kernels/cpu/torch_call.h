// What the operators have in common that torch's dispatcher calls: their errors, and inputs made contiguous.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>

namespace {

inline std::string shape_of(const torch::stable::Tensor& tensor) {
    std::string text;
    for (const int64_t size : tensor.sizes()) text += (text.empty() ? "" : ", ") + std::to_string(size);
    return "[" + text + "]";
}

// What is multiplied and where to, for the words of an error.
struct Call {
    const char* name;
    const torch::stable::Tensor &x, &out;

    void expect(bool holds, const char* what) const {
        STD_TORCH_CHECK(holds, "fxsparse::", name, ": expected ", what, "; got x ", shape_of(x), " and an output ",
                        shape_of(out), ". Call fxsparse.compile again with inputs like these.");
    }
};

inline torch::stable::Tensor dense(const torch::stable::Tensor& tensor) {
    return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}
inline std::optional<torch::stable::Tensor> dense(const std::optional<torch::stable::Tensor>& tensor) {
    return tensor ? std::optional(dense(*tensor)) : tensor;
}
inline const void* data_of(const std::optional<torch::stable::Tensor>& tensor) {
    return tensor ? tensor->data_ptr() : nullptr;
}

}  // namespace
