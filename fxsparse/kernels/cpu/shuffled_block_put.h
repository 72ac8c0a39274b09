// What shuffled_block.cpp does with sums: vectors of them, activations, and how they get to their place.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX__)
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

typedef float Vec __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));
typedef int32_t IntVec __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));
typedef uint32_t UnsignedVec __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));
typedef uint16_t ShortVec __attribute__((vector_size(LANES * sizeof(uint16_t)), aligned(sizeof(uint16_t))));

enum Activation { NONE, RELU, RELU6, SILU, GELU, HARDSWISH };

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
#else
inline Vec load_some(const BFloat16* from, int64_t n) {
    BFloat16 one[LANES] = {};
    std::memcpy(one, from, n * sizeof(BFloat16));
    return load(one);
}
inline void store_some(Vec v, BFloat16* to, int64_t n) {
    BFloat16 one[LANES];
    store(v, one);
    std::memcpy(to, one, n * sizeof(BFloat16));
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

// A vector of lanes that are channels one after the other, `n` of them; any activation.
template <typename T>
inline __attribute__((always_inline)) void put(Vec v, int64_t n, T* y, const T* residual, int activation) {
    if (residual) v += n < LANES ? load_some(residual, n) : load(residual);
    v = activate(v, activation);
    if (n < LANES) store_some(v, y, n);
    else store(v, y);
}

// Any lanes, `width` of each pixel.
template <typename T>
__attribute__((noinline)) void put_lanes(float* lane, int pixels, int64_t width, const Sink<T>& sink) {
    const int64_t n = std::min(width, sink.lanes);
    const int32_t* rows = sink.rows;
    alignas(64) T one[WIDEST * LANES] = {};  // of a pixel
    const T* residual = sink.residual;
    T* y = sink.y;
    for (int p = 0; p < pixels; p++, lane += width, y += sink.step, residual += residual ? sink.step : 0) {
        if (sink.in_order) {
            for (int64_t i = 0, row = rows[0]; i < n; i += LANES, row += LANES)
                put(load(lane + i), n - i, y + row, residual ? residual + row : nullptr, sink.activation);
            continue;
        }
        for (int64_t i = 0; i < n && residual; i++) one[i] = residual[rows[i]];
        for (int64_t i = 0; i < n; i += LANES)
            store(activate(residual ? load(lane + i) + load(one + i) : load(lane + i), sink.activation), one + i);
        for (int64_t i = 0; i < n; i++) y[rows[i]] = one[i];
    }
}

typedef float Four __attribute__((vector_size(16)));
inline Four gather_four(const float* from, const int32_t* at) {
    Four four{from[at[0]], from[at[1]], from[at[2]], from[at[3]]};
#if defined(__SSE__)
    asm("" : "+x"(four));  // or g++ would read more indices at once than there are registers for
#endif
    return four;
}

// from[at[0]], from[at[1]] and so on. Instructions that gather take longer.
inline Vec gather(const float* from, const int32_t* at) {
#if defined(__AVX512F__)
    __m512 v = _mm512_castps128_ps512(gather_four(from, at));
    v = _mm512_insertf32x4(v, gather_four(from, at + 4), 1);
    v = _mm512_insertf32x4(v, gather_four(from, at + 8), 2);
    return reinterpret_cast<Vec>(_mm512_insertf32x4(v, gather_four(from, at + 12), 3));
#elif defined(__AVX__)
    const __m256 v = _mm256_castps128_ps256(gather_four(from, at));
    return reinterpret_cast<Vec>(_mm256_insertf128_ps(v, gather_four(from, at + 4), 1));
#else
    return gather_four(from, at);
#endif
}

// The lanes of pixels in the order of `at`, `width` from one pixel to the next.
template <typename T>
__attribute__((noinline)) void put_gathered(const float* lane, const int32_t* at, int64_t pixels, int64_t width,
                                          const Sink<T>& sink) {
    const T* residual = sink.residual;
    T* y = sink.y;
    for (int64_t p = 0; p < pixels; p++, lane += width, y += sink.step, residual += residual ? sink.step : 0)
        for (int64_t i = 0; i < sink.lanes; i += LANES) {
            __builtin_prefetch(lane + width + i);
            if (!residual) __builtin_prefetch(y + sink.step + i, 1);
            put(gather(lane, at + i), sink.lanes - i, y + i, residual ? residual + i : nullptr, sink.activation);
        }
}

}  // namespace
