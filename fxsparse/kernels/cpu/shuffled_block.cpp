// Convolution and matrix product with a shuffled-block weight, channels last.
//
//   y[pixel, rows[r]] = act(bias[rows[r]] + residual[pixel, rows[r]] + sum_k values[g][k][r] * x[offset[k] + pixel])
//
// A row group g has R rows and K kept columns; a column is one (ky, kx, channel). Rows lie in vector lanes, some pixels
// are handled at once: for every column one load of R weights, and per pixel one broadcast and R / LANES multiply-adds.
// Where a column is read is data (one int per column), not code, so free columns cost nothing.
//
// Compiled once for the machine's widest vectors (16, 8 or 4 floats) by fxsparse/kernels/build.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "bfloat16.h"
#include "shuffled_block.h"

using shuffled_block::Problem;

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 28, WIDEST = 4;
#elif defined(__AVX__)
constexpr int LANES = 8, REGISTERS = 12, WIDEST = 2;
#else
constexpr int LANES = 4, REGISTERS = 12, WIDEST = 2;
#endif
#ifdef FXSPARSE_FEW_TILES  // under sanitizers every tile takes seconds to compile
constexpr int ACCUMULATORS = 4;
#else
constexpr int ACCUMULATORS = REGISTERS;  // of a tile: pixels x vectors of rows; the rest holds weights
#endif
constexpr int PADDED_TO = 16;               // lanes of a group are padded to this many, whatever the machine
constexpr int64_t BAND_BYTES = 384 * 1024;    // of input and output: all groups find them in the second-level cache
constexpr int64_t COPIED_BYTES = 192 * 1024;  // an image that small is copied with its padding
constexpr int64_t CHAIN = 160;               // columns summed up in one go: rounding errors grow with the length
constexpr int64_t CACHE_BYTES = 4096;         // of one way of the first-level cache
constexpr int64_t CACHE_WAYS = 8;
constexpr int64_t WEIGHT_BYTES = 256 * 1024;  // weights that few are read again for every line of pixels
constexpr int64_t LONG_LINE = 56;             // pixels after which reading all weights again costs nothing
constexpr int64_t LINE = 112;               // pixels of a line where there are no lines: 4 x 28, 8 x 14, 16 x 7

typedef float Vec __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));
typedef int32_t IntVec __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));

enum Activation { NONE, RELU, RELU6, SILU, GELU, HARDSWISH };

// What the tiles read: bfloat16 as it is where the processor multiplies pairs of them, else widened to float.
#if defined(__AVX512BF16__)
template <typename T>
using Read = T;
#else
template <typename T>
using Read = float;
#endif

inline Vec splat(float v) { return Vec{} + v; }
inline Vec at_least(Vec v, float low) { return v < splat(low) ? splat(low) : v; }  // NaN stays NaN
inline Vec at_most(Vec v, float high) { return v > splat(high) ? splat(high) : v; }

// e^v by 2^n * p(r), |r| <= ln(2) / 2: Cephes' expf, 2 units in the last place.
inline Vec exponential(Vec at) {
    const Vec v = at_most(at_least(at, -87.3f), 88.3f);
    IntVec n = __builtin_convertvector(v * 1.44269504f + (v < splat(0.0f) ? splat(-0.5f) : splat(0.5f)), IntVec);
    Vec whole = __builtin_convertvector(n, Vec);
    Vec r = v - whole * 0.693359375f + whole * 2.12194440e-4f;
    Vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return at > splat(88.3f) ? splat(INFINITY) : p * reinterpret_cast<Vec>((n + 127) << 23);
}

// Abramowitz and Stegun 7.1.26, |error| <= 1.5e-7.
inline Vec error_function(Vec v) {
    Vec a = v < splat(0.0f) ? -v : v;
    Vec t = 1.0f / (1.0f + 0.3275911f * a);
    Vec p = splat(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    Vec e = 1.0f - p * t * exponential(-a * a);
    return v < splat(0.0f) ? -e : e;
}

inline Vec activate(Vec v, int activation) {
    switch (activation) {
        case RELU: return at_least(v, 0.0f);
        case RELU6: return at_most(at_least(v, 0.0f), 6.0f);
        case SILU: return v / (1.0f + exponential(-v));
        case GELU: return 0.5f * v * (1.0f + error_function(v * 0.70710678f));
        case HARDSWISH: return v * (at_most(at_least(v + 3.0f, 0.0f), 6.0f) * (1.0f / 6.0f));
        default: return v;
    }
}

// Where the lanes of one register tile go, and what is added to them.
template <typename T>
struct Sink {
    T* y;                // [pixels, channels]
    const T* residual;   // the same shape, or null
    const float* bias;   // per lane, zeros where there is none
    const int32_t* rows; // channel of every lane
    int64_t lanes;       // rows of the group from the first lane of the tile on
    bool in_order;       // rows[0], rows[0] + 1, ...
    int64_t step;        // elements between two pixels
    int activation;
    bool fetch;          // what is written, and the residual, come from memory: fetch them while there is time
};

// Lanes that go to scattered channels, or are stored in another type than float.
template <typename T, int V, int P>
inline void put_lanes(const Vec (&sum)[P][V], const Sink<T>& sink) {
    float lane[P][V * LANES];
    std::memcpy(lane, sum, sizeof sum);
    const int64_t n = std::min<int64_t>(V * LANES, sink.lanes);
    if (sink.residual)
        for (int p = 0; p < P; p++)
            for (int64_t i = 0; i < n; i++) lane[p][i] += widen(sink.residual[p * sink.step + sink.rows[i]]);
    if (sink.activation != NONE)
        for (int p = 0; p < P; p++)
            for (int v = 0; v < V; v++) {
                Vec* at = reinterpret_cast<Vec*>(&lane[p][v * LANES]);
                *at = activate(*at, sink.activation);
            }
    for (int p = 0; p < P; p++)
        for (int64_t i = 0; i < n; i++) narrow(lane[p][i], &sink.y[p * sink.step + sink.rows[i]]);
}

// The first `n` lanes only: a group's last register may be half full, and what lies behind it belongs to another group.
inline Vec load_some(const float* from, int64_t n) {
#if defined(__AVX512F__)
    return reinterpret_cast<Vec>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), from));
#else
    Vec v{};
    std::memcpy(&v, from, n * sizeof(float));
    return v;
#endif
}
inline void store_some(float* to, Vec v, int64_t n) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << n) - 1), reinterpret_cast<__m512>(v));
#else
    std::memcpy(to, &v, n * sizeof(float));
#endif
}

#if defined(__AVX512BF16__)
template <int V, int P>
inline void put_in_order(Vec (&sum)[P][V], const Sink<BFloat16>& sink) {
    const BFloat16* from = sink.residual ? sink.residual + sink.rows[0] : nullptr;
    BFloat16* to = sink.y + sink.rows[0];
    for (int v = 0; v < V; v++) {
        const int64_t n = std::min<int64_t>(LANES, sink.lanes - v * LANES), at = v * LANES;
        if (n <= 0) break;
        const __mmask16 some = static_cast<__mmask16>((1u << n) - 1);
        for (int p = 0; p < P; p++) {
            Vec value = sum[p][v];
            if (from) {
                const __m256i bits = _mm256_maskz_loadu_epi16(some, from + p * sink.step + at);
                value += reinterpret_cast<Vec>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
            }
            if (sink.activation != NONE) value = activate(value, sink.activation);
            const __m256bh narrow = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(value));
            _mm256_mask_storeu_epi16(to + p * sink.step + at, some, reinterpret_cast<__m256i>(narrow));
        }
    }
}
#endif

// Lanes that go to channels that follow each other.
template <int V, int P>
inline void put_in_order(Vec (&sum)[P][V], const Sink<float>& sink) {
    const float* from = sink.residual ? sink.residual + sink.rows[0] : nullptr;
    float* to = sink.y + sink.rows[0];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
        const int64_t n = sink.lanes - v * LANES, at = v * LANES;
        if (n <= 0) break;
        if (from) {
#pragma GCC unroll 32
            for (int p = 0; p < P; p++)
                sum[p][v] += n >= LANES ? *reinterpret_cast<const Vec*>(from + p * sink.step + at)
                                        : load_some(from + p * sink.step + at, n);
        }
        if (sink.activation == RELU) {
#pragma GCC unroll 32
            for (int p = 0; p < P; p++) sum[p][v] = at_least(sum[p][v], 0.0f);
        } else if (sink.activation != NONE) {
            for (int p = 0; p < P; p++) sum[p][v] = activate(sum[p][v], sink.activation);
        }
        if (n >= LANES) {
#pragma GCC unroll 32
            for (int p = 0; p < P; p++)
                *reinterpret_cast<Vec*>(to + p * sink.step + at) = sum[p][v];
        } else {
            for (int p = 0; p < P; p++) store_some(to + p * sink.step + at, sum[p][v], n);
        }
    }
}

// What the next group will read, fetched a little with every column: `step` bytes of it, 0 for nothing.
struct Ahead {
    const char* from;
    int64_t step;
};

// What sums are kept in: whole registers, or half ones for groups of few rows, of which twice as many are added at once.
template <bool HALF>
struct Part {
    typedef Vec Type;
};
template <>
struct Part<true> {
    typedef float Type __attribute__((vector_size(LANES / 2 * sizeof(float)), aligned(sizeof(float))));
};

// sum += the columns from `first` to `last`, P pixels x V vectors of rows.
template <bool HALF, int V, int P>
inline __attribute__((always_inline)) void add_columns(typename Part<HALF>::Type (&sum)[P][V], const float* x,
                                                       int64_t step, const int32_t* offset, int64_t first, int64_t last,
                                                       const float* w, int64_t lanes, const Ahead& ahead) {
    typedef typename Part<HALF>::Type Sum;
    for (int64_t k = first; k < last; k++) {
        const float* at = x + offset[k];
        __builtin_prefetch(ahead.from + k * ahead.step, 0, 2);
        Sum weight[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) weight[v] = reinterpret_cast<const Sum*>(w + k * lanes)[v];
#pragma GCC unroll 32
        for (int p = 0; p < P; p++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) sum[p][v] += weight[v] * at[p * step];
    }
}

#if defined(__AVX512BF16__)
// The same in pairs of columns: w[k] and w[k + 1], k even, lie lane by lane beside each other, and so do, in one register,
// the two elements of x that they are multiplied by, wherever those come from. Half a pair has a zero beside it.
template <int V, int P, typename Two>
inline __attribute__((always_inline)) void add_pair(Vec (&sum)[P][V], const BFloat16* w, const Two& two) {
    __m512bh weight[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) weight[v] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(w + v * 2 * LANES));
#pragma GCC unroll 32
    for (int p = 0; p < P; p++) {
        const __m512bh at = reinterpret_cast<__m512bh>(two(p));
#pragma GCC unroll 4
        for (int v = 0; v < V; v++)
            sum[p][v] = reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum[p][v]), at, weight[v]));
    }
}

template <bool HALF, int V, int P>
inline __attribute__((always_inline)) void add_columns(Vec (&sum)[P][V], const BFloat16* x, int64_t step,
                                                       const int32_t* offset, int64_t first, int64_t last,
                                                       const BFloat16* w, int64_t lanes, const Ahead& ahead) {
    constexpr __mmask32 ODD = 0xAAAAAAAAu;
    int64_t k = first;
    if (k % 2 && k < last) {
        const BFloat16* at = x + offset[k];
        add_pair<V, P>(sum, w + (k - 1) * lanes, [=](int p) { return _mm512_maskz_set1_epi16(ODD, at[p * step].bits); });
        k++;
    }
    for (; k + 1 < last; k += 2) {
        const BFloat16 *at = x + offset[k], *other = x + offset[k + 1];
        __builtin_prefetch(ahead.from + k * ahead.step, 0, 2);
        add_pair<V, P>(sum, w + k * lanes, [=](int p) {
            return _mm512_mask_set1_epi16(_mm512_set1_epi16(at[p * step].bits), ODD, other[p * step].bits);
        });
    }
    if (k < last) {
        const BFloat16* at = x + offset[k];
        add_pair<V, P>(sum, w + k * lanes, [=](int p) { return _mm512_maskz_set1_epi16(~ODD, at[p * step].bits); });
    }
}
#endif

template <typename T, int V, int P>
inline __attribute__((always_inline)) void put(Vec (&sum)[P][V], const Sink<T>& sink) {
    if constexpr (std::is_same_v<T, Read<T>>) {
        if (sink.in_order) return put_in_order<V, P>(sum, sink);
    }
    put_lanes<T, V, P>(sum, sink);
}

// All columns, in chains of equal length that are summed up apart: registers first, then their sums.
template <typename T, int V, int P, bool HALF = false>
void tile(const Read<T>* x, int64_t step, const int32_t* offset, int64_t from, int64_t to, const Read<T>* w,
          int64_t lanes, const Ahead& ahead, const Sink<T>& sink) {
    typedef typename Part<HALF>::Type Sum;
    Sum sum[P][V];
#pragma GCC unroll 32
    for (int p = 0; p < P; p++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sum[p][v] = reinterpret_cast<const Sum*>(sink.bias)[v];
    if (sink.in_order && sink.fetch) {
        const int64_t n = std::min<int64_t>(sink.lanes, V * LANES);
        for (int p = 0; p < P; p++)
            for (int64_t lane = 0; lane < n; lane += 16) {
                const int64_t at = p * sink.step + sink.rows[0] + lane;
                __builtin_prefetch(sink.y + at, 1, 2);
                if (sink.residual) __builtin_prefetch(sink.residual + at, 0, 2);
            }
    }
    const int64_t columns = to - from, chains = (columns + CHAIN - 1) / CHAIN;
    if (chains <= 1) {
        add_columns<HALF, V, P>(sum, x, step, offset, from, to, w, lanes, ahead);
    } else {
        Sum total[P][V];
        std::memcpy(total, sum, sizeof sum);
        for (int64_t c = 0; c < chains; c++) {
#pragma GCC unroll 32
            for (int p = 0; p < P; p++)
#pragma GCC unroll 4
                for (int v = 0; v < V; v++) sum[p][v] = Sum{};
            add_columns<HALF, V, P>(sum, x, step, offset, from + c * columns / chains, from + (c + 1) * columns / chains, w,
                              lanes, ahead);
#pragma GCC unroll 32
            for (int p = 0; p < P; p++)
#pragma GCC unroll 4
                for (int v = 0; v < V; v++) sum[p][v] = total[p][v] = total[p][v] + sum[p][v];
        }
    }
    if constexpr (HALF) {
        Vec whole[P][V]{};
        for (int p = 0; p < P; p++) std::memcpy(&whole[p][0], &sum[p][0], sizeof(Sum));
        put<T, V, P>(whole, sink);
    } else {
        put<T, V, P>(sum, sink);
    }
}

template <typename T>
using Tile = void (*)(const Read<T>*, int64_t, const int32_t*, int64_t, int64_t, const Read<T>*, int64_t, const Ahead&,
                      const Sink<T>&);

template <typename T, int V, int... P>
constexpr Tile<T> pick(int pixels, std::integer_sequence<int, P...>) {
    constexpr Tile<T> tiles[] = {tile<T, V, P + 1>...};
    return tiles[pixels - 1];
}

template <typename T, int... P>
constexpr Tile<T> pick_half(int pixels, std::integer_sequence<int, P...>) {
    constexpr Tile<T> tiles[] = {tile<T, 1, P + 1, true>...};
    return tiles[pixels - 1];
}

// Of this many vectors of rows, the last of which holds `lanes` rows.
template <typename T>
Tile<T> tile_for(int vectors, int pixels, int64_t lanes) {
    if constexpr (LANES == PADDED_TO && std::is_same_v<Read<T>, float>)
        if (lanes <= LANES / 2) return pick_half<T>(pixels, std::make_integer_sequence<int, ACCUMULATORS>());
    switch (vectors) {
        case 1: return pick<T, 1>(pixels, std::make_integer_sequence<int, ACCUMULATORS / 1>());
        case 2: return pick<T, 2>(pixels, std::make_integer_sequence<int, ACCUMULATORS / 2>());
#if defined(__AVX512F__)
        case 3: return pick<T, 3>(pixels, std::make_integer_sequence<int, ACCUMULATORS / 3>());
        case 4: return pick<T, 4>(pixels, std::make_integer_sequence<int, ACCUMULATORS / 4>());
#endif
        default: return nullptr;
    }
}

// A rectangle of output pixels whose input is read with constant steps.
template <typename T>
struct Field {
    const Read<T>* x;
    int64_t x_line, x_pixel;  // elements from one line, or pixel, to the next
    T* y;
    const T* residual;
    int64_t y_line, y_pixel;
    int64_t lines, pixels;
    int64_t row_step;  // elements from one input row to the next, for the taps
    int64_t first_row;  // output row of the first line when taps above and below the image are to be skipped, or -1
};

template <typename T>
struct Convolution {
    static constexpr int64_t SIZE = sizeof(Read<T>);
    static constexpr int64_t BESIDE = std::is_same_v<Read<T>, float> ? 1 : 2;  // values of a lane that lie together
    Problem q;
    const T* x;
    T* y;
    const Read<T>* values;  // [K, L] of every group; bfloat16 in pairs, [K / 2, L, 2]
    const int64_t* value_ptr;
    const int32_t *columns, *column_ptr, *rows, *row_ptr;
    const T* bias;
    const T* residual;
    int64_t pixels_in = 0, pixels_out = 0;  // of all images
    bool copies = false;                    // the input is read from a padded (or widened) copy of a band
    int64_t left = 0, right = 0;            // output columns between which no tap leaves the image sideways
    int64_t band = 0, bands = 0, parts = 0; // output rows of a band; bands of an image; parts of the groups
    std::vector<int64_t> part_ptr{};        // groups of every part
    std::vector<float> lane_bias{};         // of every lane of every group, one after the other
    std::vector<int64_t> lane_ptr{};
    bool far_out = false;                   // the output does not fit into the second-level cache
    std::vector<char> in_order{};           // whether a group's rows follow each other

    int64_t taps_wide() const { return (q.kernel_width - 1) * q.dilation_x + 1; }
    int64_t copy_width() const { return (q.out_width - 1) * q.stride_x + taps_wide(); }
    int64_t input_rows(int64_t out_rows) const {
        return (out_rows - 1) * q.stride_y + (q.kernel_height - 1) * q.dilation_y + 1;
    }

    // One input pixel makes one output pixel: images and rows do not matter, so cut all pixels into lines of one length.
    void flatten() {
        pixels_out = q.images * q.out_height * q.out_width;
        pixels_in = q.images * q.height * q.width;
        const bool pointwise = q.kernel_height * q.kernel_width * q.stride_y * q.stride_x == 1;
        if (!pointwise || q.padding_y || q.padding_x) return;
        q.images = 1;
        q.width = q.out_width = std::min(LINE, pixels_out);
        q.height = q.out_height = (pixels_out + q.width - 1) / q.width;
    }

    void plan() {
        flatten();
        left = (q.padding_x + q.stride_x - 1) / q.stride_x;
        right = std::min(q.out_width, (q.width + q.padding_x - taps_wide()) / q.stride_x + 1);
        const bool padded = q.padding_y || q.padding_x;
        const bool small = q.height * q.width * q.channels * SIZE <= COPIED_BYTES;
        copies = !std::is_same_v<T, Read<T>> || (padded && (small || right - left < 4));
        const int64_t in_row = (copies ? copy_width() : q.width) * q.channels * q.stride_y;
        band = std::max<int64_t>(1, BAND_BYTES / SIZE / (in_row + q.out_width * q.out_channels));
        if (copies) band = std::max(band, std::min<int64_t>(q.out_height, q.kernel_height * q.dilation_y));
        bands = (q.out_height + band - 1) / band;
        band = (q.out_height + bands - 1) / bands;
        bands = (q.out_height + band - 1) / band;
        far_out = pixels_out * q.out_channels * SIZE > 4 * COPIED_BYTES;
        const int64_t units = q.images * bands;
        const int64_t wanted = q.threads > 1 ? (4 * q.threads + units - 1) / units : 1;
        parts = std::max<int64_t>(1, std::min(q.groups, wanted));
        split_groups();
        prepare_lanes();
    }

    void prepare_lanes() {
        lane_ptr.assign(1, 0);
        for (int64_t g = 0; g < q.groups; g++) {
            const int32_t* row = rows + row_ptr[g];
            const int64_t count = row_ptr[g + 1] - row_ptr[g];
            bool follow = true;
            lane_ptr.push_back(lane_ptr[g] + (count + PADDED_TO - 1) / PADDED_TO * PADDED_TO);
            lane_bias.resize(lane_ptr[g + 1], 0.0f);
            for (int64_t i = 0; i < count; i++) {
                if (bias) lane_bias[lane_ptr[g] + i] = widen(bias[row[i]]);
                follow = follow && row[i] == row[0] + i;
            }
            in_order.push_back(follow);
        }
    }

    // Parts of about equal work.
    void split_groups() {
        part_ptr.assign(parts + 1, q.groups);
        part_ptr[0] = 0;
        const int64_t all = value_ptr[q.groups];
        for (int64_t g = 0, part = 1; g < q.groups && part < parts; g++)
            while (part < parts && value_ptr[g + 1] * parts >= all * part) part_ptr[part++] = g + 1;
    }

    // Input rows of a band, `wide` pixels of each from column `from_x` on, zeros outside of the image.
    void copy_band(int64_t image, int64_t first, int64_t rows_out, int64_t from_x, int64_t wide, Read<T>* to) const {
        const int64_t before = std::clamp<int64_t>(-from_x, 0, wide);
        const int64_t end = std::clamp<int64_t>(q.width - from_x, before, wide);
        for (int64_t i = 0; i < input_rows(rows_out); i++, to += wide * q.channels) {
            const int64_t row = first * q.stride_y - q.padding_y + i;
            if (row < 0 || row >= q.height) {
                std::memset(to, 0, wide * q.channels * SIZE);
                continue;
            }
            const int64_t at = (image * q.height + row) * q.width + from_x + before;
            const int64_t kept = std::clamp<int64_t>(pixels_in - at, 0, end - before);  // the last line may be short
            std::memset(to, 0, before * q.channels * SIZE);
            copy(x + at * q.channels, kept * q.channels, to + before * q.channels);
            std::memset(to + (before + kept) * q.channels, 0, (wide - before - kept) * q.channels * SIZE);
        }
    }
    static void copy(const Read<T>* from, int64_t n, Read<T>* to) { std::memcpy(to, from, n * SIZE); }
    template <typename From>
    static void copy(const From* from, int64_t n, float* to) {
        for (int64_t i = 0; i < n; i++) to[i] = widen(from[i]);
    }

    // The band as fields: one where the input is copied or not padded; else what lies inside, read in place, and one
    // for the border columns on either side, whose pixels are taken downwards.
    void lay_out(int64_t image, int64_t first, int64_t rows_out, std::vector<Read<T>>& copied,
                 std::vector<Field<T>>& fields) const {
        fields.clear();
        const int64_t at = (image * q.out_height + first) * q.out_width;
        if (copies) {
            copied.resize(input_rows(rows_out) * copy_width() * q.channels);
            copy_band(image, first, rows_out, -q.padding_x, copy_width(), copied.data());
            const int64_t row_step = copy_width() * q.channels;
            fields.push_back(field(copied.data(), row_step, at, rows_out, 0, q.out_width, first));
            return;
        }
        const int64_t row_step = q.width * q.channels, top = first * q.stride_y - q.padding_y;
        if constexpr (std::is_same_v<T, Read<T>>) {
            const T* from = x + (image * q.height + top) * row_step + (left * q.stride_x - q.padding_x) * q.channels;
            fields.push_back(field(from, row_step, at, rows_out, left, right, first));
        }
        const int64_t strip = input_rows(rows_out) * taps_wide() * q.channels;
        copied.resize((left + q.out_width - right) * strip);
        Read<T>* to = copied.data();
        for (int64_t ox = 0; ox < left; ox++, to += strip) fields.push_back(border(image, first, rows_out, ox, to));
        for (int64_t ox = right; ox < q.out_width; ox++, to += strip)
            fields.push_back(border(image, first, rows_out, ox, to));
    }

    // Output column `ox` of a band, read from a padded copy of the pixels under its taps.
    Field<T> border(int64_t image, int64_t first, int64_t rows_out, int64_t ox, Read<T>* to) const {
        copy_band(image, first, rows_out, ox * q.stride_x - q.padding_x, taps_wide(), to);
        const int64_t at = (image * q.out_height + first) * q.out_width;
        Field<T> f = field(to, taps_wide() * q.channels, at, 1, ox, ox + 1, -1);
        f.pixels = rows_out;
        f.x_pixel = f.x_line;
        f.y_pixel = f.y_line;
        return f;
    }

    Field<T> field(const Read<T>* from, int64_t row_step, int64_t at, int64_t lines, int64_t x0, int64_t x1,
                   int64_t first_row) const {
        const int64_t to = (at + x0) * q.out_channels;
        return {from, row_step * q.stride_y, q.channels * q.stride_x, y + to, residual ? residual + to : nullptr,
                q.out_width * q.out_channels, q.out_channels, lines, x1 - x0, row_step, first_row};
    }

    // Position of every column of the groups relative to a pixel. Columns ascend, so taps change seldom.
    void locate(int64_t part, int64_t row_step, std::vector<int32_t>& offset) const {
        const int32_t first = column_ptr[part_ptr[part]];
        offset.resize(column_ptr[part_ptr[part + 1]] - first);
        int64_t begin = 0, end = 0, shift = 0;
        for (size_t k = 0; k < offset.size(); k++) {
            const int64_t column = columns[first + k];
            if (column < begin || column >= end) {
                const int64_t tap = column / q.channels, ky = tap / q.kernel_width, kx = tap % q.kernel_width;
                begin = tap * q.channels;
                end = begin + q.channels;
                shift = ky * q.dilation_y * row_step + kx * q.dilation_x * q.channels - begin;
            }
            offset[k] = static_cast<int32_t>(column + shift);
        }
    }

    // The columns of group g whose taps lie inside the image for an output row: [from, to).
    std::pair<int64_t, int64_t> inside(int64_t g, int64_t out_row) const {
        const int64_t top = out_row * q.stride_y - q.padding_y, tap_row = q.kernel_width * q.channels;
        const int32_t *begin = columns + column_ptr[g], *end = columns + column_ptr[g + 1];
        const int64_t low = top < 0 ? (-top + q.dilation_y - 1) / q.dilation_y : 0;
        const int64_t high = top >= q.height ? 0 : std::min(q.kernel_height, (q.height - top - 1) / q.dilation_y + 1);
        const int64_t from = low ? std::lower_bound(begin, end, low * tap_row) - begin : 0;
        const int64_t to = high < q.kernel_height ? std::lower_bound(begin, end, high * tap_row) - begin : end - begin;
        return {from, std::max(from, to)};
    }

    struct Scratch {
        std::vector<Read<T>> copied;
        std::vector<int32_t> offset;
        std::vector<Field<T>> fields;
    };

    // Either every group goes over all lines, and its weights stay in the caches; or all groups over every line, and
    // what they read and write stays there: better while the weights are few, or used for many pixels each time.
    void run_field(int64_t part, const Field<T>& f, Scratch& scratch) const {
        locate(part, f.row_step, scratch.offset);
        const int64_t from = part_ptr[part], to = part_ptr[part + 1];
        if (f.pixels >= LONG_LINE || (value_ptr[to] - value_ptr[from]) * SIZE <= WEIGHT_BYTES) {
            for (int64_t line = 0; line < f.lines; line++)
                for (int64_t g = from; g < to; g++) run_group(g, f, line, line + 1, scratch, part);
        } else {
            for (int64_t g = from; g < to; g++) run_group(g, f, 0, f.lines, scratch, part);
        }
    }

    void run_group(int64_t g, const Field<T>& f, int64_t first_line, int64_t last_line, Scratch& scratch,
                   int64_t part) const {
        const int64_t count = row_ptr[g + 1] - row_ptr[g], lanes = lane_ptr[g + 1] - lane_ptr[g];
        const int32_t* row = rows + row_ptr[g];
        const int32_t* offset = scratch.offset.data() + column_ptr[g] - column_ptr[part_ptr[part]];
        const int64_t vectors = (count + LANES - 1) / LANES, tiles = (vectors + WIDEST - 1) / WIDEST;
        for (int64_t t = 0, v = 0; t < tiles; t++) {
            const int64_t wide = (vectors - v + tiles - t - 1) / (tiles - t), lane = v * LANES;
            const Sink<T> sink{nullptr, nullptr, lane_bias.data() + lane_ptr[g] + lane, row + lane, count - lane,
                               in_order[g] != 0, f.y_pixel, static_cast<int>(q.activation), far_out};
            const int64_t lines = last_line - first_line;
            for (int64_t i = 0; i < lines; i++)
                run_line(g, f, first_line + i, static_cast<int>(wide), values + value_ptr[g] + lane * BESIDE, lanes, offset,
                         after(g, t * lines + i, tiles * lines), sink);
            v += wide;
        }
    }

    // The pixels that the next line is the first to read: scattered reads are no pattern for the hardware's prefetcher.
    static void prefetch(const Read<T>* from, int64_t n) {
        for (int64_t i = 0; i < n; i += 64 / SIZE) __builtin_prefetch(from + i, 0, 2);
    }

    // Share `i` of `n` of the next group's weights: in a network they come from memory, and would keep this core waiting.
    Ahead after(int64_t g, int64_t i, int64_t n) const {
        const int64_t columns_here = std::max<int64_t>(1, column_ptr[g + 1] - column_ptr[g]);
        if (g + 1 == q.groups) return {reinterpret_cast<const char*>(values + value_ptr[g]), 0};
        const int64_t bytes = (value_ptr[g + 2] - value_ptr[g + 1]) * SIZE;
        return {reinterpret_cast<const char*>(values + value_ptr[g + 1]) + bytes * i / n, bytes / n / columns_here};
    }

    void run_line(int64_t g, const Field<T>& f, int64_t line, int wide, const Read<T>* w, int64_t lanes,
                  const int32_t* offset, const Ahead& ahead, Sink<T> sink) const {
        // Pixels that lie multiples of 4096 bytes apart share their lines of the first-level cache: not more than fit.
        const int64_t apart = CACHE_BYTES / std::gcd(CACHE_BYTES, f.x_pixel * SIZE);
        const int64_t most = std::min<int64_t>(ACCUMULATORS / wide, (CACHE_WAYS - 1) * apart);
        const int64_t tall = (q.kernel_height - 1) * q.dilation_y * f.row_step;
        const bool far = !copies && f.pixels > 1 && g == 0 && q.height * q.width * q.channels * SIZE > 4 * COPIED_BYTES;
        int64_t from = 0, to = column_ptr[g + 1] - column_ptr[g];
        if (f.first_row >= 0) std::tie(from, to) = inside(g, f.first_row + line);
        const int64_t pixels = std::min(f.pixels, pixels_out - (f.y + line * f.y_line - y) / q.out_channels);
        const int64_t cuts = (pixels + most - 1) / most;
        for (int64_t c = 0; c < cuts; c++) {
            const int64_t first = c * pixels / cuts, here = (c + 1) * pixels / cuts - first;
            const int64_t at = line * f.y_line + first * f.y_pixel;
            if (far) prefetch(f.x + (line + 1) * f.x_line + first * f.x_pixel + tall, here * q.channels);
            sink.y = f.y + at;
            sink.residual = f.residual ? f.residual + at : nullptr;
            tile_for<T>(wide, static_cast<int>(here), sink.lanes)(f.x + line * f.x_line + first * f.x_pixel, f.x_pixel,
                                                      offset, from, to, w, lanes, ahead, sink);
        }
    }

    void run() {
        plan();
        const int64_t items = q.images * bands * parts;
#pragma omp parallel num_threads(static_cast<int>(q.threads)) if (q.threads > 1 && items > 1)
        {
            Scratch scratch;
            int64_t held = -1;
#pragma omp for schedule(dynamic, 1)
            for (int64_t item = 0; item < items; item++) {
                const int64_t unit = item / parts, part = item % parts, first = unit % bands * band;
                if (held != unit)
                    lay_out(unit / bands, first, std::min(band, q.out_height - first), scratch.copied, scratch.fields);
                held = unit;
                for (const Field<T>& f : scratch.fields) run_field(part, f, scratch);
            }
        }
    }
};

template <typename T>
void run(const Problem* q, const void* x, void* y, const Read<T>* values, const int64_t* value_ptr,
         const int32_t* columns, const int32_t* column_ptr, const int32_t* rows, const int32_t* row_ptr,
         const void* bias, const void* residual) {
    Convolution<T> convolution{*q,    static_cast<const T*>(x),    static_cast<T*>(y),
                               values, value_ptr,                   columns,
                               column_ptr, rows,                    row_ptr,
                               static_cast<const T*>(bias), static_cast<const T*>(residual)};
    convolution.run();
}

// Pairs [K / 2, L, 2] of every group as [K, L], for processors that do not multiply pairs.
[[maybe_unused]] std::vector<float> apart(const BFloat16* pairs, const int64_t* value_ptr, const int32_t* row_ptr,
                                          int64_t groups) {
    std::vector<float> values(value_ptr[groups]);
    for (int64_t g = 0; g < groups; g++) {
        const int64_t lanes = (row_ptr[g + 1] - row_ptr[g] + PADDED_TO - 1) / PADDED_TO * PADDED_TO;
        for (int64_t at = value_ptr[g]; at < value_ptr[g + 1]; at += 2 * lanes)
            for (int64_t i = 0; i < 2 * lanes; i++) values[at + i % 2 * lanes + i / 2] = widen(pairs[at + i]);
    }
    return values;
}

}  // namespace

extern "C" {

void fxsparse_shuffled_block_f32(const Problem* q, const void* x, void* y, const float* values,
                                 const int64_t* value_ptr, const int32_t* columns, const int32_t* column_ptr,
                                 const int32_t* rows, const int32_t* row_ptr, const void* bias, const void* residual) {
    run<float>(q, x, y, values, value_ptr, columns, column_ptr, rows, row_ptr, bias, residual);
}

void fxsparse_shuffled_block_bf16(const Problem* q, const void* x, void* y, const BFloat16* values,
                                  const int64_t* value_ptr, const int32_t* columns, const int32_t* column_ptr,
                                  const int32_t* rows, const int32_t* row_ptr, const void* bias, const void* residual) {
#if defined(__AVX512BF16__)
    run<BFloat16>(q, x, y, values, value_ptr, columns, column_ptr, rows, row_ptr, bias, residual);
#else
    const std::vector<float> wide = apart(values, value_ptr, row_ptr, q->groups);
    run<BFloat16>(q, x, y, wide.data(), value_ptr, columns, column_ptr, rows, row_ptr, bias, residual);
#endif
}
}
