// How shuffled_block.cpp cuts its work: how much at once, rectangles of output pixels, and what is fetched ahead.

#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "shuffled_block_tile.h"

namespace {

constexpr int64_t BAND_BYTES = 384 * 1024;       // of input and output: all groups find them in the second-level cache
constexpr int64_t MANY_WEIGHTS = 1024 * 1024;    // bytes; bands are twice as large there, or weights are read too often
constexpr int64_t COPIED_BYTES = 192 * 1024;     // an image that small is copied with its padding
constexpr int64_t TOGETHER_BYTES = 2048 * 1024;  // of input and output of images that are handled at once
#ifdef FXSPARSE_FEW_TILES  // sanitizers look at small layers
constexpr int64_t WEIGHT_BYTES = 1024;
#else
constexpr int64_t WEIGHT_BYTES = 256 * 1024;  // weights that few are read again for every line of pixels
#endif
constexpr int64_t CACHE_BYTES = 4096;  // of one way of the first-level cache
constexpr int64_t CACHE_WAYS = 8;
constexpr int64_t SHORT_LINE = NARROW ? 40 : 4;  // pixels: images with fewer beside each other are copied, padded
constexpr int64_t LONG_LINE = 56;                // pixels after which reading all weights again costs nothing
constexpr int64_t LINE = NARROW ? 60 : 112;  // pixels of a line where there are no lines: 4 x 28, 8 x 14 or 16 x 7
constexpr int64_t SCATTERED_LINE = 56;        // the same where sums lie apart until all rows are there,
constexpr int64_t LEAST_LINE = 14;            // and what a thread is given at least
#ifdef FXSPARSE_FEW_TILES
constexpr int64_t SCATTERED_ROWS = 32;
#else
constexpr int64_t SCATTERED_ROWS = 128;       // of a layer: fewer lie in few lines of the cache, wherever they are
#endif

// A rectangle of output pixels whose input is read with constant steps.
template <typename T>
struct Field {
    const Read<T>* x;
    int64_t x_line, x_pixel;  // elements from one line, or pixel, to the next
    T* y;
    const T* residual;
    int64_t y_line, y_pixel;
    int64_t lines, pixels;
    int64_t row_step, tap_step;  // elements from one input row, or pixel, to the next, for the taps
    int64_t first_row;  // output row of the first line when taps above and below the image are to be skipped, or -1
    bool is_border;     // fields of one kind have the same steps
    int64_t per_row;    // pixels of a line after which it goes on in the next row of the image
    int64_t plane = 1;  // elements from one channel to the next
    float* sums = nullptr;  // of rows that lie scattered: see `hand_out`
};

// What the tiles of a group, all but the first `idle`, fetch of the next group's weights: in a network they come from
// memory, and would keep this core waiting. As fast as possible just before they are needed: they would not stay for long
// in the second-level cache, which another thread of this core may share.
struct Next {
    const char* from;
    int64_t idle, share, step;  // share: bytes of a tile; step: of those with every column

    Ahead of(int64_t tile) const { return tile < idle ? Ahead{from, 0} : Ahead{from + (tile - idle) * share, step}; }
};

template <typename T>
class Room {
  public:
    T* of(int64_t n) {
        if (n > size) {
            held.reset(new T[n]);
            size = n;
        }
        return held.get();
    }

  private:
    std::unique_ptr<T[]> held;
    int64_t size = 0;
};

// What a thread works with; kept from call to call, since fresh memory costs a page fault every 4096 bytes.
template <typename T>
struct Scratch {
    std::vector<int32_t> offset[2];  // of columns: inside, at the border
    std::vector<int64_t> place[2];   // of the pixels of a line, there
    std::vector<Field<T>> fields;
    Room<Read<T>> copied;
    Room<float> sums;
};

}  // namespace
