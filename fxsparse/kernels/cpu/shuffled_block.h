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
    int64_t lanes;  // enum Lanes
    int64_t planes;  // 1: x is [N, I, H, W]; only with rows in lanes
};

enum Lanes { ROWS_IN_LANES, PIXELS_IN_LANES };  // the order is that of LANES in kernels/shared.py
constexpr int64_t LEAST_PIXELS = 64;            // with pixels in lanes, laid out at once if there are as many

// What stays the same from call to call, at the beginning of a tensor of int64: fxsparse/formats/shuffled_block_layer.py
// writes it. The arrays begin so many int64 after its own beginning; a bias at 0 is none.
struct Layer {
    int64_t out_channels, channels, kernel_height, kernel_width, dimensions;
    int64_t stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
    int64_t groups, activation, lanes, values;
    int64_t value_ptr, columns, column_ptr, rows, row_ptr, bias, end;
};
static_assert(sizeof(Layer) == 22 * sizeof(int64_t));  // NUMBERS there

}  // namespace shuffled_block
