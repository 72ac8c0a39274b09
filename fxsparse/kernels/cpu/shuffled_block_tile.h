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
constexpr int64_t CACHE_LINE = 64;
constexpr int64_t CHAIN = 160;               // columns summed up in one go: rounding errors grow with the length

typedef float Vec __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));
typedef int32_t IntVec __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));
typedef uint32_t UnsignedVec __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));
typedef uint16_t ShortVec __attribute__((vector_size(LANES * sizeof(uint16_t)), aligned(sizeof(uint16_t))));

enum Activation { NONE, RELU, RELU6, SILU, GELU, HARDSWISH };

// What the tiles read: bfloat16 as it is where the processor multiplies pairs of them, else widened to float.
#if defined(__AVX512BF16__)
template <typename T>
using Read = T;
#else
template <typename T>
using Read = float;
#endif

inline Vec splat(float v) { return v - Vec{}; }  // a plain broadcast: adding 0 would turn -0 into 0
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

// x P(x^2) / Q(x^2) within 4 of zero, fitted by least squares weighted towards the largest error: |error| <= 4e-7 in float32.
inline Vec error_function(Vec v) {
    const Vec x = at_least(at_most(v, 4.0f), -4.0f), t = x * x;
    Vec p = splat(1.974911583602079e-06f);
    p = p * t + 2.8802757151424885e-04f;
    p = p * t + 4.003083799034357e-03f;
    p = p * t + 5.346573889255524e-02f;
    p = p * t + 0.19623596966266632f;
    p = p * t + 1.128378987312317f;
    Vec q = splat(3.748098970390856e-05f);
    q = q * t + 1.2162213679403067e-03f;
    q = q * t + 1.5443298034369946e-02f;
    q = q * t + 0.11647102981805801f;
    q = q * t + 0.5072407722473145f;
    q = q * t + 1.0f;
    const Vec e = x * p / q;
    return v > splat(3.9f) ? splat(1.0f) : v < splat(-3.9f) ? splat(-1.0f) : e;
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

inline Vec load(const float* from) { return *reinterpret_cast<const Vec*>(from); }
inline void store(Vec v, float* to) { *reinterpret_cast<Vec*>(to) = v; }
#if defined(__AVX512BF16__)
inline Vec load(const BFloat16* from) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return reinterpret_cast<Vec>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline void store(Vec v, BFloat16* to) {
    const __m256bh narrow = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(narrow));
}
#else  // `widen` and `narrow` of all lanes
inline Vec load(const BFloat16* from) {
    ShortVec bits;
    std::memcpy(&bits, from, sizeof(bits));
    return reinterpret_cast<Vec>(__builtin_convertvector(bits, UnsignedVec) << 16);
}
inline void store(Vec v, BFloat16* to) {
    const UnsignedVec bits = reinterpret_cast<UnsignedVec>(v), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const ShortVec narrow = __builtin_convertvector(v != v ? UnsignedVec{} + 0x7fc0 : rounded, ShortVec);
    std::memcpy(to, &narrow, sizeof(narrow));
}
#endif

// The first `n` lanes only: what lies behind them belongs to another group.
inline Vec load_some(const float* from, int64_t n) {
#if defined(__AVX512F__)
    return reinterpret_cast<Vec>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), from));
#else
    Vec v{};
    std::memcpy(&v, from, n * sizeof(float));
    return v;
#endif
}
inline void store_some(Vec v, float* to, int64_t n) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << n) - 1), reinterpret_cast<__m512>(v));
#else
    std::memcpy(to, &v, n * sizeof(float));
#endif
}
#if defined(__AVX512BF16__)
inline Vec load_some(const BFloat16* from, int64_t n) {
    const __m256i bits = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), from);
    return reinterpret_cast<Vec>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline void store_some(Vec v, BFloat16* to, int64_t n) {
    const __m256bh narrow = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
    _mm256_mask_storeu_epi16(to, static_cast<__mmask16>((1u << n) - 1), reinterpret_cast<__m256i>(narrow));
}
#endif

// Lanes that are channels one after the other, from registers: every index is a constant, or g++ would store them first.
// SOME: the last register is not full.
template <typename T, bool SOME, int V, int P>
inline __attribute__((always_inline)) void put_in_order(Vec (&sum)[P][V], const Sink<T>& sink) {
    [[maybe_unused]] const int64_t n = sink.lanes - (V - 1) * LANES;
    if (sink.residual) {
        const T* from = sink.residual + sink.rows[0];
#pragma GCC unroll 32
        for (int p = 0; p < P; p++, from += sink.step)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++)
                if constexpr (SOME) sum[p][v] += v + 1 < V ? load(from + v * LANES) : load_some(from + v * LANES, n);
                else sum[p][v] += load(from + v * LANES);
    }
    if (sink.activation == RELU) {
#pragma GCC unroll 32
        for (int p = 0; p < P; p++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) sum[p][v] = sum[p][v] < Vec{} ? Vec{} : sum[p][v];  // NaN stays NaN
    }
    T* to = sink.y + sink.rows[0];
#pragma GCC unroll 32
    for (int p = 0; p < P; p++, to += sink.step)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++)
            if constexpr (SOME) v + 1 < V ? store(sum[p][v], to + v * LANES) : store_some(sum[p][v], to + v * LANES, n);
            else store(sum[p][v], to + v * LANES);
}

// Any lanes, `width` of each pixel, some of which may be no rows; any activation.
template <typename T>
__attribute__((noinline)) void put_lanes(float* lane, int pixels, int64_t width, const Sink<T>& sink) {
    const int64_t n = std::min(width, sink.lanes);
    const int32_t* rows = sink.rows;
    alignas(64) T one[WIDEST * LANES] = {};  // of a pixel
    for (int p = 0; p < pixels; p++, lane += width) {
        T* y = sink.y + p * sink.step;
        if (const T* from = sink.residual ? sink.residual + p * sink.step : nullptr) {
            if (sink.in_order) std::memcpy(one, from + rows[0], n * sizeof(T));
            else for (int64_t i = 0; i < n; i++) one[i] = from[rows[i]];
            for (int64_t i = 0; i < n; i += LANES) store(load(lane + i) + load(one + i), lane + i);
        }
        for (int64_t i = 0; i < n; i += LANES) store(activate(load(lane + i), sink.activation), one + i);
        if (sink.in_order) std::memcpy(y + rows[0], one, n * sizeof(T));
        else for (int64_t i = 0; i < n; i++) y[rows[i]] = one[i];
    }
}

// What the next group will read, fetched a little with every column: `step` bytes of it, 0 for nothing.
struct Ahead {
    const char* from;
    int64_t step;
};

// The pixels of a tile, one after the other, in wide vectors: every fourth has an address of its own, and the three behind it
// are reached by an index. Else g++ makes each address from the one before, a chain that takes longer than the sums do.
struct Walk {
    int64_t step, three, four;
    explicit Walk(int64_t step) : step(step), three(3 * step), four(4 * step) { asm("" : "+r"(three), "+r"(four)); }

    template <typename T>
    inline __attribute__((always_inline)) T next(const T*& at, int p) const {
        if (p && p % 4 == 0) {
            at += four;
            asm("" : "+r"(at));
        }
        return p % 4 == 0 ? at[0] : p % 4 == 1 ? at[step] : p % 4 == 2 ? at[2 * step] : at[three];
    }
};

// Weights that find a register beside the sums and x.
constexpr int in_registers(int vectors, int pixels) {
    return LANES == 16 && pixels * vectors + vectors + 1 > 32 ? vectors - 1 : vectors;
}

// sum += the columns from `first` to `last`, P pixels x V vectors of rows. Pixel p lies at line + place[p]; in wide vectors
// `step` after the one before.
template <int V, int P>
inline __attribute__((always_inline)) void add_columns(Vec (&sum)[P][V], const float* line, const int64_t* place,
                                                       int64_t step, const int32_t* offset, int64_t first,
                                                       int64_t last, const float* w, int64_t lanes, const Ahead& ahead) {
    const float* pixel[P];
    for (int p = 0; p < P; p++) {
        pixel[p] = line + place[p];
        if (NARROW) asm("" : "+r"(pixel[p]));  // or g++ adds `line` and `place` up again for every column
    }
    const Walk walk(step);
    constexpr int HELD = in_registers(V, P);
    const auto add = [&](int64_t k) __attribute__((always_inline)) {
        const float* at = pixel[0] + offset[k];
        const Vec* column = reinterpret_cast<const Vec*>(w + k * lanes);
        Vec weight[V];
#pragma GCC unroll 4
        for (int v = 0; v < HELD; v++) weight[v] = column[v];
#pragma GCC unroll 32
        for (int p = 0; p < P; p++) {
            const Vec x = (NARROW ? pixel[p][offset[k]] : walk.next(at, p)) - Vec{};  // not +: -0 + 0 is another zero
#pragma GCC unroll 4
            for (int v = 0; v < HELD; v++) sum[p][v] += weight[v] * x;
#if defined(__AVX512F__)  // g++ would load it once, and keep a sum in memory instead
            if constexpr (HELD < V) asm("vfmadd231ps %2, %1, %0" : "+v"(sum[p][HELD]) : "v"(x), "m"(column[HELD]));
#endif
        }
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
    constexpr int HELD = in_registers(V, P);
    __m512bh weight[V];
#pragma GCC unroll 4
    for (int v = 0; v < HELD; v++) weight[v] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(w + v * 2 * LANES));
#pragma GCC unroll 32
    for (int p = 0; p < P; p++) {
        const __m512bh at = reinterpret_cast<__m512bh>(two(p));  // in the order of the pixels
#pragma GCC unroll 4
        for (int v = 0; v < HELD; v++)
            sum[p][v] = reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum[p][v]), at, weight[v]));
        if constexpr (HELD < V)
            asm("vdpbf16ps %2, %1, %0" : "+v"(sum[p][HELD]) : "v"(at), "m"(*reinterpret_cast<const Vec*>(w + HELD * 2 * LANES)));
    }
}

template <int V, int P>
inline __attribute__((always_inline)) void add_columns(Vec (&sum)[P][V], const BFloat16* line,
                                                       const int64_t* place, int64_t step, const int32_t* offset,
                                                       int64_t first, int64_t last, const BFloat16* w, int64_t lanes,
                                                       const Ahead& ahead) {
    constexpr __mmask32 ODD = 0xAAAAAAAAu;
    const BFloat16* x = line + place[0];
    const Walk walk(step);
    int64_t k = first;
    if (k % 2 && k < last) {
        const BFloat16* at = x + offset[k];
        add_pair<V, P>(sum, w + (k - 1) * lanes, [&](int p) { return _mm512_maskz_set1_epi16(ODD, walk.next(at, p).bits); });
        k++;
    }
    for (; k + 1 < last; k += 2) {
        const BFloat16 *at = x + offset[k], *other = x + offset[k + 1];
        __builtin_prefetch(ahead.from + k * ahead.step, 0, 2);
        add_pair<V, P>(sum, w + k * lanes, [&](int p) __attribute__((always_inline)) {
            return _mm512_mask_set1_epi16(_mm512_set1_epi16(walk.next(at, p).bits), ODD, walk.next(other, p).bits);
        });
    }
    if (k < last) {
        const BFloat16* at = x + offset[k];
        add_pair<V, P>(sum, w + k * lanes, [&](int p) { return _mm512_maskz_set1_epi16(~ODD, walk.next(at, p).bits); });
    }
}
#endif

// All columns, in chains of equal length that are summed up apart.
template <typename T, int V, int P>
void tile(const Read<T>* line, const int64_t* place, int64_t step, const int32_t* offset, int64_t from, int64_t to,
          const Read<T>* w, int64_t lanes, const Ahead& ahead, const Sink<T>& sink) {
    if (sink.in_order && sink.fetch) {
        const int64_t n = std::min<int64_t>(sink.lanes, V * LANES);
        for (int p = 0; p < P; p++)
            for (int64_t lane = 0; lane < n; lane += CACHE_LINE / int64_t{sizeof(T)}) {
                const int64_t at = p * sink.step + sink.rows[0] + lane;
                __builtin_prefetch(sink.y + at, 1, 2);
                if (sink.residual) __builtin_prefetch(sink.residual + at, 0, 2);
            }
    }
    Vec sum[P][V];
#pragma GCC unroll 32
    for (int p = 0; p < P; p++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sum[p][v] = load(sink.bias + v * LANES);
    const int64_t columns = to - from, chains = (columns + CHAIN - 1) / CHAIN;
    alignas(64) float kept[P][V * LANES];  // in memory: sums of earlier chains, and what `put_lanes` reads
    for (int64_t c = 0, first = from, last = to;; c++, first = last) {
        if (chains > 1) last = from + (c + 1) * columns / chains;
        add_columns<V, P>(sum, line, place, step, offset, first, last, w, lanes, ahead);
        if (c + 1 >= chains) break;
#pragma GCC unroll 32
        for (int p = 0; p < P; p++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) {
                store(c ? sum[p][v] + load(kept[p] + v * LANES) : sum[p][v], kept[p] + v * LANES);
                sum[p][v] = Vec{};
            }
    }
    if (chains > 1) {
#pragma GCC unroll 32
        for (int p = 0; p < P; p++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) sum[p][v] += load(kept[p] + v * LANES);
    }
    if constexpr (std::is_same_v<T, Read<T>>) {
        if (sink.in_order && (sink.activation == NONE || sink.activation == RELU)) {
            if (sink.lanes >= V * LANES) return put_in_order<T, false, V, P>(sum, sink);
            if constexpr (LANES == 16) return put_in_order<T, true, V, P>(sum, sink);
        }
    }
#pragma GCC unroll 32
    for (int p = 0; p < P; p++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) store(sum[p][v], kept[p] + v * LANES);
    put_lanes<T>(kept[0], P, V * LANES, sink);
}

template <typename T>
using Tile = void (*)(const Read<T>*, const int64_t*, int64_t, const int32_t*, int64_t, int64_t, const Read<T>*, int64_t,
                      const Ahead&, const Sink<T>&);

template <typename T, int V, int... P>
constexpr Tile<T> pick(int pixels, std::integer_sequence<int, P...>) {
    constexpr Tile<T> tiles[] = {tile<T, V, P + 1>...};
    return tiles[pixels - 1];
}

template <typename T>
Tile<T> tile_for(int vectors, int pixels) {
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
