// What shuffled_block.cpp is called with. fxsparse/kernels/cpu/shuffled_block.py passes these numbers too.

#pragma once

#include <cstdint>

namespace shuffled_block {

// All sizes in elements; see fxsparse/formats/shuffled_block.py for what the arrays hold. Checked there, not here.
struct Problem {
    int64_t images, height, width, channels;
    int64_t out_height, out_width, out_channels;
    int64_t kernel_height, kernel_width;
    int64_t stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
    int64_t groups, activation, threads;
};

}  // namespace shuffled_block
