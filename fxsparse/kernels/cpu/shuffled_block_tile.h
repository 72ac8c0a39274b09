// Register tiles of shuffled_block.cpp: some output pixels times some vectors of rows, summed up over columns.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "bfloat16.h"
#include "shuffled_block_put.h"

namespace {

constexpr bool NARROW = LANES < 16;  // few pixels are added up at once, so there is a pointer for each of them
#ifdef FXSPARSE_FEW_TILES  // under sanitizers every tile takes seconds to compile
constexpr int ACCUMULATORS = 4;
#else
constexpr int ACCUMULATORS = REGISTERS;  // of a tile: pixels x vectors of rows; the rest holds weights
#endif
constexpr int PADDED_TO = 16;               // lanes of a group are padded to this many, whatever the machine
constexpr int64_t CACHE_LINE = 64;
constexpr int64_t CHAIN = 160;               // columns summed up in one go: rounding errors grow with the length

// What the tiles read: bfloat16 as it is where the processor multiplies pairs of them, else widened to float.
#if defined(__AVX512BF16__)
template <typename T>
using Read = T;
#else
template <typename T>
using Read = float;
#endif

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
template <typename From, typename T, int V, int P>
void tile(const From* line, const int64_t* place, int64_t step, const int32_t* offset, int64_t from, int64_t to,
          const From* w, int64_t lanes, const Ahead& ahead, const Sink<T>& sink) {
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
    if constexpr (std::is_same_v<T, From> || std::is_same_v<T, float>) {
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

template <typename From, typename T>
using Tile = void (*)(const From*, const int64_t*, int64_t, const int32_t*, int64_t, int64_t, const From*, int64_t,
                      const Ahead&, const Sink<T>&);

template <typename From, typename T, int V, int... P>
constexpr Tile<From, T> pick(int pixels, std::integer_sequence<int, P...>) {
    constexpr Tile<From, T> tiles[] = {tile<From, T, V, P + 1>...};
    return tiles[pixels - 1];
}

template <typename From, typename T>
Tile<From, T> tile_for(int vectors, int pixels) {
    switch (vectors) {
        case 1: return pick<From, T, 1>(pixels, std::make_integer_sequence<int, ACCUMULATORS / 1>());
        case 2: return pick<From, T, 2>(pixels, std::make_integer_sequence<int, ACCUMULATORS / 2>());
#if defined(__AVX512F__)
        case 3: return pick<From, T, 3>(pixels, std::make_integer_sequence<int, ACCUMULATORS / 3>());
        case 4: return pick<From, T, 4>(pixels, std::make_integer_sequence<int, ACCUMULATORS / 4>());
#endif
        default: return nullptr;
    }
}

}  // namespace
