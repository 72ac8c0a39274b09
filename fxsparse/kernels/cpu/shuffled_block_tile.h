// Register tiles of shuffled_block.cpp: some output pixels times some vectors of rows, summed up over columns.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "bfloat16.h"

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 28, WIDEST = 4;
#elif defined(__AVX__)
constexpr int LANES = 8, REGISTERS = 12, WIDEST = 2;
#else
constexpr int LANES = 4, REGISTERS = 12, WIDEST = 2;
#endif
constexpr bool NARROW = LANES < 16;  // few pixels are added up at once, so there is a pointer for each of them
#ifdef FXSPARSE_FEW_TILES  // under sanitizers every tile takes seconds to compile
constexpr int ACCUMULATORS = 4;
#else
constexpr int ACCUMULATORS = REGISTERS;  // of a tile: pixels x vectors of rows; the rest holds weights
#endif
constexpr int PADDED_TO = 16;               // lanes of a group are padded to this many, whatever the machine
constexpr int64_t CHAIN = 160;               // columns summed up in one go: rounding errors grow with the length

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
#pragma GCC unroll 32
    for (int p = 0; p < P; p++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) *reinterpret_cast<Vec*>(&lane[p][v * LANES]) = sum[p][v];
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
#pragma GCC unroll 32
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

// sum += the columns from `first` to `last`, P pixels x V vectors of rows. Pixel p lies at line + place[p]; in wide vectors
// `step` after the one before.
template <bool HALF, int V, int P>
inline __attribute__((always_inline)) void add_columns(typename Part<HALF>::Type (&sum)[P][V], const float* line,
                                                       const int64_t* place, int64_t step, const int32_t* offset,
                                                       int64_t first, int64_t last, const float* w, int64_t lanes,
                                                       const Ahead& ahead) {
    typedef typename Part<HALF>::Type Sum;
    const float* pixel[P];
    for (int p = 0; p < P; p++) {
        pixel[p] = line + place[p];
        if (NARROW) asm("" : "+r"(pixel[p]));  // or g++ adds `line` and `place` up again for every column
    }
    const auto add = [&](int64_t k) __attribute__((always_inline)) {
        const float* at = pixel[0] + offset[k];
        Sum weight[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) weight[v] = reinterpret_cast<const Sum*>(w + k * lanes)[v];
#pragma GCC unroll 32
        for (int p = 0; p < P; p++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++)
                sum[p][v] += weight[v] * (NARROW ? pixel[p][offset[k]] : at[p * step]);
    };
    int64_t k = first;
    for (; NARROW && k + 1 < last; k += 2) {  // narrow vectors are limited by the number of instructions
        __builtin_prefetch(ahead.from + k * ahead.step, 0, 2);
        add(k);
        add(k + 1);
    }
    for (; k < last; k++) {
        __builtin_prefetch(ahead.from + k * ahead.step, 0, 2);
        add(k);
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
inline __attribute__((always_inline)) void add_columns(Vec (&sum)[P][V], const BFloat16* line,
                                                       const int64_t* place, int64_t step, const int32_t* offset,
                                                       int64_t first, int64_t last, const BFloat16* w, int64_t lanes,
                                                       const Ahead& ahead) {
    constexpr __mmask32 ODD = 0xAAAAAAAAu;
    const BFloat16* x = line + place[0];
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
void tile(const Read<T>* line, const int64_t* place, int64_t step, const int32_t* offset, int64_t from, int64_t to,
          const Read<T>* w, int64_t lanes, const Ahead& ahead, const Sink<T>& sink) {
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
        add_columns<HALF, V, P>(sum, line, place, step, offset, from, to, w, lanes, ahead);
    } else {
        Sum total[P][V];
#pragma GCC unroll 32
        for (int p = 0; p < P; p++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) total[p][v] = sum[p][v];
        for (int64_t c = 0; c < chains; c++) {
#pragma GCC unroll 32
            for (int p = 0; p < P; p++)
#pragma GCC unroll 4
                for (int v = 0; v < V; v++) sum[p][v] = Sum{};
            add_columns<HALF, V, P>(sum, line, place, step, offset, from + c * columns / chains,
                                    from + (c + 1) * columns / chains, w, lanes, ahead);
#pragma GCC unroll 32
            for (int p = 0; p < P; p++)
#pragma GCC unroll 4
                for (int v = 0; v < V; v++) sum[p][v] = total[p][v] = total[p][v] + sum[p][v];
        }
    }
    Vec whole[P][V];  // not `sum`: what `put` takes the address of would be kept in memory all along
#pragma GCC unroll 32
    for (int p = 0; p < P; p++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
            if constexpr (HALF) std::memcpy(&(whole[p][v] = Vec{}), &sum[p][v], sizeof(Sum));
            else whole[p][v] = sum[p][v];
        }
    put<T, V, P>(whole, sink);
}

template <typename T>
using Tile = void (*)(const Read<T>*, const int64_t*, int64_t, const int32_t*, int64_t, int64_t, const Read<T>*, int64_t,
                      const Ahead&, const Sink<T>&);

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

}  // namespace
