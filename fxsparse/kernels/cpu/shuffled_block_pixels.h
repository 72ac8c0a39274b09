// The product of shuffled_block.cpp with pixels in vector lanes, for rows that share their columns with few others or none.
//
// The input is laid out in planes, one for each channel, padding included, so that vectors of output pixels read vectors of
// input pixels, wherever a tap lies. For every column of a group that is V loads, and for each of its rows one broadcast
// weight and V multiply-adds. Sums go to planes too and from there, pixel by pixel, to y: the order of rows costs nothing.

#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "bfloat16.h"
#include "shuffled_block.h"
#include "shuffled_block_tile.h"

namespace {
namespace pixels {

using shuffled_block::Problem;

#ifdef FXSPARSE_FEW_TILES
constexpr int SUMS = 4;
#else
constexpr int SUMS = LANES == 16 ? 24 : 12;  // of a tile: rows x vectors of pixels
#endif
constexpr int ROWS = std::min(LANES == 16 ? 8 : 4, SUMS);  // of a tile
constexpr int64_t PLANE_BYTES = 384 * 1024;                // of a band's input and output
constexpr int64_t LEAST = shuffled_block::LEAST_PIXELS;    // of a band, or its weights would be read for few of them

// Powers of two apart, planes would share their lines of the first-level cache.
inline int64_t odd_lines(int64_t floats) {
    const int64_t lines = (floats + 15) / 16;
    return (lines + 1 - lines % 2) * 16;
}

// a and b become what `PICK` takes from both of them, lane by lane: lanes from LANES on are b's.
template <int (*PICK)(int lane, int which)>
inline __attribute__((always_inline)) void exchange(Vec& a, Vec& b) {
    IntVec of_a, of_b;
#pragma GCC unroll 16
    for (int l = 0; l < LANES; l++) {
        of_a[l] = PICK(l, 0);
        of_b[l] = PICK(l, 1);
    }
    const Vec was = a;
    a = __builtin_shuffle(was, b, of_a);
    b = __builtin_shuffle(was, b, of_b);
}

// Inside of every four lanes: a0 b0 a1 b1 and a2 b2 a3 b3; a0 a1 b0 b1 and a2 a3 b2 b3. Processors do those fastest.
constexpr int one_by_one(int l, int which) { return l / 4 * 4 + which * 2 + l % 4 / 2 + l % 2 * LANES; }
constexpr int two_by_two(int l, int which) { return l / 4 * 4 + which * 2 + l % 2 + l % 4 / 2 * LANES; }
// Fours of lanes: the second half of a against the first of b.
template <int S>
constexpr int by_fours(int l, int which) {
    return which ? (l & S ? LANES + l : l + S) : (l & S ? LANES + l - S : l);
}

// v[i][j] becomes v[j][i].
inline __attribute__((always_inline)) void transpose(Vec (&v)[LANES]) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i += 2) exchange<one_by_one>(v[i], v[i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i += 4) {
        exchange<two_by_two>(v[i], v[i + 2]);
        exchange<two_by_two>(v[i + 1], v[i + 3]);
        std::swap(v[i + 1], v[i + 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
        if (LANES > 4 && !(i & 4)) exchange<by_fours<4>>(v[i], v[i + 4 % LANES]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
        if (LANES > 8 && !(i & 8)) exchange<by_fours<8>>(v[i], v[i + 8 % LANES]);
    }
}

// The first n lanes, zeros behind them.
inline Vec read(const float* from, int64_t n) { return n >= LANES ? load(from) : load_some(from, n); }
inline void write(Vec v, float* to, int64_t n) { n >= LANES ? store(v, to) : store_some(v, to, n); }
inline Vec read(const BFloat16* from, int64_t n) {
    alignas(64) float wide[LANES] = {};
    for (int64_t i = 0; i < std::min<int64_t>(n, LANES); i++) wide[i] = widen(from[i]);
    return load(wide);
}
inline void write(Vec v, BFloat16* to, int64_t n) {
    alignas(64) float wide[LANES];
    store(v, wide);
    for (int64_t i = 0; i < std::min<int64_t>(n, LANES); i++) narrow(wide[i], to + i);
}

// The columns of a group, and what they are multiplied by: [columns, step], of which a tile takes R rows.
struct Columns {
    const int32_t* place;   // in the planes, of all columns that there are
    const int32_t* column;  // those of the group
    int64_t count;
    const float* w;
    int64_t step;
};

// sum += the columns from `first` to `last`.
template <int R, int V>
inline __attribute__((always_inline)) void add_columns(Vec (&sum)[R][V], const float* x, const Columns& columns,
                                                       int64_t first, int64_t last) {
    const auto add = [&](int64_t k, Vec (&to)[R][V]) __attribute__((always_inline)) {
        const Vec* at = reinterpret_cast<const Vec*>(x + columns.place[columns.column[k]]);
        Vec pixel[V];
        if constexpr (R > 1) {  // a single row reads them where it multiplies
#pragma GCC unroll 32
            for (int v = 0; v < V; v++) pixel[v] = at[v];
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const Vec value = splat(columns.w[k * columns.step + r]);
#pragma GCC unroll 32
            for (int v = 0; v < V; v++) to[r][v] += value * (R > 1 ? pixel[v] : at[v]);
        }
    };
    int64_t k = first;
    if constexpr (R * V <= SUMS / 2) {  // too few sums to hide how long an addition takes: twice as many
        Vec other[R][V] = {};
        for (; k + 1 < last; k += 2) {
            add(k, sum);
            add(k + 1, other);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 32
            for (int v = 0; v < V; v++) sum[r][v] += other[r][v];
    }
    for (; k < last; k++) add(k, sum);
}

// R rows x V vectors of pixels, in chains of equal length that are summed up apart. Row r has its plane at y + rows[r] * plane.
template <int R, int V>
void tile(const float* x, const Columns& columns, float* y, int64_t plane, const int32_t* rows) {
    const int64_t chains = (columns.count + CHAIN - 1) / CHAIN;
    for (int64_t c = 0, first = 0, last = columns.count;; c++, first = last) {
        if (chains > 1) last = (c + 1) * columns.count / chains;
        Vec sum[R][V] = {};
        add_columns<R, V>(sum, x, columns, first, last);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 32
            for (int v = 0; v < V; v++) {
                float* to = y + rows[r] * plane + v * LANES;
                store(c ? sum[r][v] + load(to) : sum[r][v], to);
            }
        if (c + 1 >= chains) return;
    }
}

using Tile = void (*)(const float*, const Columns&, float*, int64_t, const int32_t*);

template <int R, int... V>
Tile of_vectors(int64_t vectors, std::integer_sequence<int, V...>) {
    constexpr Tile tiles[] = {tile<R, V + 1>...};
    return tiles[vectors - 1];
}

template <int... R>
Tile of_rows(int64_t rows, int64_t vectors, std::integer_sequence<int, R...>) {
    using OfVectors = Tile (*)(int64_t);
    static constexpr OfVectors tiles[] = {
        [](int64_t n) { return of_vectors<R + 1>(n, std::make_integer_sequence<int, SUMS / (R + 1)>()); }...};
    return tiles[rows - 1](vectors);
}

inline Tile tile_for(int64_t rows, int64_t vectors) {
    return of_rows(rows, vectors, std::make_integer_sequence<int, ROWS>());
}

// Output rows `first` to `first + rows_out` of an image, and the planes they are read from and summed up in.
struct Band {
    int64_t image, first, rows_out;
    float *from, *to;
};

template <typename T>
struct Convolution {
    Problem q;
    const T* x;
    T* y;
    const float* values;  // [K, R] of every group
    const int64_t* value_ptr;
    const int32_t *columns, *column_ptr, *rows, *row_ptr;
    const T* bias;
    const T* residual;
    int64_t flat = 0;                     // all pixels, where each makes one: they are cut into lines of one length
    int64_t phases_y = 1, phases_x = 1;   // remainders by the stride, each with planes of its own, that taps read
    int64_t reach_y = 0, reach_x = 0;     // rows, and pixels, that taps reach beyond the first
    int64_t pitch = 0;                    // from one row of a plane to the next
    int64_t band = 0, bands = 0;          // output rows of a band
    int64_t plane_in = 0, plane_out = 0;  // elements of a plane
    std::vector<int32_t> place{};         // of every column in the planes
    std::vector<float> lane_bias{};

    int64_t planes_in() const { return phases_y * phases_x; }  // of a channel

    void plan() {
        const bool pointwise = q.kernel_height * q.kernel_width * q.stride_y * q.stride_x == 1;
        if (pointwise && !q.padding_x && !q.padding_y) flatten();
        else cut_into_bands();
        plane_in = odd_lines((band + reach_y) * pitch + reach_x + LANES);
        plane_out = odd_lines(band * pitch + LANES);
        place_columns();
        lane_bias.assign((q.out_channels + LANES - 1) / LANES * LANES, 0.0f);
        for (int64_t i = 0; bias && i < q.out_channels; i++) lane_bias[i] = widen(bias[i]);
    }

    void flatten() {
        flat = q.images * q.out_height * q.out_width;
        const int64_t fit = std::max(LEAST, PLANE_BYTES / 4 / (q.channels + q.out_channels));
        const int64_t lines = std::max({(flat + fit - 1) / fit, std::min(q.threads, flat / LEAST), int64_t{1}});
        pitch = ((flat + lines - 1) / lines + LANES - 1) / LANES * LANES;
        q.images = band = 1;
        q.width = q.out_width = pitch;
        q.height = q.out_height = bands = (flat + pitch - 1) / pitch;
    }

    void cut_into_bands() {
        const int64_t tall = (q.kernel_height - 1) * q.dilation_y, wide = (q.kernel_width - 1) * q.dilation_x;
        phases_y = std::min(q.stride_y, tall + 1);
        phases_x = std::min(q.stride_x, wide + 1);
        reach_y = tall / q.stride_y;
        reach_x = wide / q.stride_x;
        // With stride 1 the zeros behind a row are those before the next.
        pitch = q.out_width + reach_x - (q.stride_x == 1 ? std::min(q.padding_x, reach_x) : 0);
        const int64_t of_a_row = pitch * (planes_in() * q.channels + q.out_channels);
        band = std::max(PLANE_BYTES / 4 / of_a_row, (LEAST + pitch - 1) / pitch);
        band = std::clamp<int64_t>(band, 1, q.out_height);
        bands = (q.out_height + band - 1) / band;
        band = (q.out_height + bands - 1) / bands;
        bands = (q.out_height + band - 1) / band;
    }

    // Behind the planes the last vectors read what is no pixel.
    size_t scratch_size() const {
        return q.channels * planes_in() * plane_in + q.out_channels * plane_out + (SUMS + 1) * LANES;
    }

    Band band_at(int64_t i, float* scratch) const {
        const int64_t first = i % bands * band;
        return {i / bands, first, std::min(band, q.out_height - first), scratch + q.out_channels * plane_out, scratch};
    }

    // Input rows of a band as planes [channel][phase][row]; what is outside of the image is 0.
    void lay_out(const Band& b, int64_t from_channel, int64_t to_channel) const {
        for (int64_t py = 0; py < phases_y; py++)
            for (int64_t px = 0; px < phases_x; px++)
                for (int64_t i = 0; i < b.rows_out + reach_y; i++) {
                    const int64_t row = (b.first + i) * q.stride_y + py - q.padding_y;
                    float* to = b.from + (py * phases_x + px) * plane_in + i * pitch;
                    lay_row(b.image, row, px - q.padding_x, from_channel, to_channel, to);
                }
    }

    // What it writes behind the row, the next row writes again.
    void lay_row(int64_t image, int64_t row, int64_t column, int64_t from_channel, int64_t to_channel, float* to) const {
        const int64_t plane = planes_in() * plane_in, length = flat ? pitch : q.out_width + reach_x;
        const T* from[LANES];
        for (int64_t j = 0; j < length; j += LANES, column += LANES * q.stride_x) {
            for (int64_t p = 0; p < LANES; p++) {
                const int64_t c = column + p * q.stride_x, at = (image * q.height + row) * q.width + c;
                const bool inside = row >= 0 && row < q.height && c >= 0 && c < q.width && (!flat || at < flat);
                from[p] = inside && j + p < length ? x + at * q.channels : nullptr;
            }
            for (int64_t c = from_channel; c < to_channel; c += LANES) lay_block(from, c, plane, to + c * plane + j);
        }
    }

    void lay_block(const T* (&from)[LANES], int64_t c, int64_t plane, float* to) const {
        const int64_t n = std::min<int64_t>(LANES, q.channels - c);
        Vec v[LANES];
#pragma GCC unroll 16
        for (int p = 0; p < LANES; p++) v[p] = from[p] ? read(from[p] + c, n) : Vec{};
        transpose(v);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            if (i < n) store(v[i], to + i * plane);
    }

    void place_columns() {
        place.reserve(q.kernel_height * q.kernel_width * q.channels);
        for (int64_t ky = 0; ky < q.kernel_height; ky++)
            for (int64_t kx = 0; kx < q.kernel_width; kx++) {
                const int64_t dy = ky * q.dilation_y, dx = kx * q.dilation_x;
                const int64_t phase = dy % q.stride_y * phases_x + dx % q.stride_x;
                const int64_t tap = phase * plane_in + dy / q.stride_y * pitch + dx / q.stride_x;
                for (int64_t c = 0; c < q.channels; c++)
                    place.push_back(static_cast<int32_t>(c * planes_in() * plane_in + tap));
            }
    }

    // In a network weights come from memory: what the next group reads is fetched while this one is multiplied.
    void fetch(int64_t g) const {
        const auto lines = [](const auto* from, const auto* to) {
            for (; from < to; from += 16) __builtin_prefetch(from, 0, 2);
        };
        lines(columns + column_ptr[g], columns + column_ptr[g + 1]);
        lines(values + value_ptr[g], values + value_ptr[g + 1]);
    }

    // A group, over all pixels of a band.
    void multiply(const Band& b, int64_t g) const {
        if (g + 1 < q.groups) fetch(g + 1);
        const int64_t length = flat ? std::min(pitch, flat - b.first * pitch) : (b.rows_out - 1) * pitch + q.out_width;
        const int64_t vectors = (length + LANES - 1) / LANES, count = row_ptr[g + 1] - row_ptr[g];
        const int64_t tiles = (count + ROWS - 1) / ROWS;
        Columns taken{place.data(), columns + column_ptr[g], column_ptr[g + 1] - column_ptr[g], nullptr, count};
        for (int64_t t = 0; t < tiles; t++) {
            const int64_t r = count * t / tiles, here = count * (t + 1) / tiles - r;
            const int64_t most = SUMS / here, parts = (vectors + most - 1) / most;
            taken.w = values + value_ptr[g] + r;
            for (int64_t p = 0; p < parts; p++) {
                const int64_t v = vectors * p / parts, some = vectors * (p + 1) / parts - v;
                tile_for(here, some)(b.from + v * LANES, taken, b.to + v * LANES, plane_out, rows + row_ptr[g] + r);
            }
        }
    }

    void put(const Band& b, int64_t from_channel, int64_t to_channel) const {
        for (int64_t i = 0; i < b.rows_out; i++)
            for (int64_t j = 0; j < q.out_width; j += LANES) {
                const int64_t at = (b.image * q.out_height + b.first + i) * q.out_width + j;
                const int64_t n = std::min(q.out_width - j, flat ? flat - at : q.out_width);
                for (int64_t c = from_channel; c < to_channel; c += LANES)
                    put_block(b.to + i * pitch + j, c, at * q.out_channels + c, std::min<int64_t>(LANES, n));
            }
    }

    // n pixels of LANES channels.
    void put_block(const float* from, int64_t c, int64_t at, int64_t n) const {
        const int64_t there = std::min<int64_t>(LANES, q.out_channels - c);
        Vec v[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) v[i] = load(from + std::min(c + i, q.out_channels - 1) * plane_out);
        transpose(v);
        const Vec add = load(lane_bias.data() + c);
#pragma GCC unroll 16
        for (int p = 0; p < LANES; p++, at += q.out_channels) {
            if (p >= n) return;
            Vec sum = v[p] + add;
            if (residual) sum += read(residual + at, there);
            if (q.activation == RELU) sum = at_least(sum, 0.0f);
            else if (q.activation != NONE) sum = activate(sum, static_cast<int>(q.activation));
            write(sum, y + at, there);
        }
    }

    // Threads take bands of their own where there are enough; else all share each.
    void run() {
        plan();
        static thread_local std::vector<float> scratch;
        const auto room = [this] {
            if (scratch.size() < scratch_size()) scratch.resize(scratch_size());
            return scratch.data();
        };
        const int64_t all = q.images * bands;
        const bool alone = all >= 4 * q.threads || all % q.threads == 0;
        float* const shared = alone ? nullptr : room();
#pragma omp parallel num_threads(static_cast<int>(q.threads)) if (q.threads > 1)
        if (alone) {
            float* const own = room();
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < all; i++) {
                const Band b = band_at(i, own);
                lay_out(b, 0, q.channels);
                for (int64_t g = 0; g < q.groups; g++) multiply(b, g);
                put(b, 0, q.out_channels);
            }
        } else {
            for (int64_t i = 0; i < all; i++) {
                const Band b = band_at(i, shared);
#pragma omp for
                for (int64_t c = 0; c < q.channels; c += LANES) lay_out(b, c, std::min(c + LANES, q.channels));
#pragma omp for schedule(dynamic, 4)
                for (int64_t g = 0; g < q.groups; g++) multiply(b, g);
#pragma omp for
                for (int64_t c = 0; c < q.out_channels; c += LANES) put(b, c, std::min(c + LANES, q.out_channels));
            }
        }
    }
};

}  // namespace pixels
}  // namespace
