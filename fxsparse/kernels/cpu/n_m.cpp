// Product with an N:M weight, M = 4: of every four columns of a row at most N hold a weight.
//
//   y[token, row] = bias[row] + sum over quads q and i < N of value[q][i][row] * x[token, 4 q + code[q][i][row]]
//
// Sixteen rows lie in vector lanes. The four inputs of a quad are repeated through a register, and a permute inside
// each 128 bits picks for every lane the one its weight belongs to: the two low bits of a lane's code are the index,
// so the codes of a few quads lie in one register and are shifted through. No gather, no expansion: the weights are
// read as they are stored, N / 4 of the dense bytes and two bits each, which is what counts when few tokens share them.
//
// Compiled once for the machine's widest vectors (16 or 8 floats; without them by plain loops) by fxsparse/kernels/build.py.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "bfloat16.h"
#include "n_m.h"

using n_m::Problem;

namespace {

constexpr int ROWS = 16;        // of a group: what is stored together, whatever the machine
constexpr int64_t AHEAD_BYTES = 4096;  // values are fetched so far ahead: the processor itself stops at a page's end
constexpr int64_t CHAIN = 160;  // products summed up in one go: rounding errors grow with the length

// Vectors of rows: a register of weights or sums, one of codes, and the four inputs of a quad ready to be picked from.
#if defined(__AVX512F__)
struct Float {
    static constexpr int LANES = 16, TOKENS = 8;
    using Numbers = __m512;
    using Codes = __m512i;
    using Quad = __m512;
    static Numbers zero() { return _mm512_setzero_ps(); }
    static Numbers load(const float* from) { return _mm512_loadu_ps(from); }
    static Numbers load(const BFloat16* from) {
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
    static Codes codes(const uint32_t* from) { return _mm512_loadu_si512(from); }
    static void next(Codes& c) { c = _mm512_srli_epi32(c, 2); }
    static Quad quad(const float* x) { return _mm512_broadcast_f32x4(_mm_loadu_ps(x)); }
    static Numbers pick(Quad x, Codes c) { return _mm512_permutevar_ps(x, c); }
    static Numbers add(Numbers a, Numbers b) { return _mm512_add_ps(a, b); }
    static Numbers multiply_add(Numbers a, Numbers b, Numbers sum) { return _mm512_fmadd_ps(a, b, sum); }
    static void store(float* to, Numbers v) { _mm512_storeu_ps(to, v); }
};
#elif defined(__AVX2__)
struct Float {
    static constexpr int LANES = 8, TOKENS = 4;
    using Numbers = __m256;
    using Codes = __m256i;
    using Quad = __m256;
    static Numbers zero() { return _mm256_setzero_ps(); }
    static Numbers load(const float* from) { return _mm256_loadu_ps(from); }
    static Numbers load(const BFloat16* from) {
        const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    }
    static Codes codes(const uint32_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
    static void next(Codes& c) { c = _mm256_srli_epi32(c, 2); }
    static Quad quad(const float* x) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(x)); }
    static Numbers pick(Quad x, Codes c) { return _mm256_permutevar_ps(x, c); }
    static Numbers add(Numbers a, Numbers b) { return _mm256_add_ps(a, b); }
    static Numbers multiply_add(Numbers a, Numbers b, Numbers sum) { return _mm256_fmadd_ps(a, b, sum); }
    static void store(float* to, Numbers v) { _mm256_storeu_ps(to, v); }
};
#endif

// One group of rows times one token, without vector instructions of our own. F: what is multiplied in; W: what is stored.
//   values  W [quads, N, 16];  codes  [ceil(quads / (16 / N)), 16], 2 N bits for every quad;  x  F [4 quads]
template <typename F, typename W, int N>
void rows_times_one(const W* values, const uint32_t* codes, int64_t quads, const F* x, F* y) {
    constexpr int PER = 16 / N;
    std::fill(y, y + ROWS, F(0));
    for (int64_t first = 0; first < quads; first += CHAIN / N) {
        F sum[ROWS] = {};
        for (int64_t q = first; q < std::min(first + CHAIN / N, quads); q++)
            for (int i = 0; i < N; i++)
                for (int r = 0; r < ROWS; r++) {
                    const uint32_t code = codes[q / PER * ROWS + r] >> (2 * (q % PER * N + i)) & 3;
                    sum[r] += widen(values[(q * N + i) * ROWS + r]) * x[4 * q + code];
                }
        for (int r = 0; r < ROWS; r++) y[r] += sum[r];
    }
}

#if defined(__AVX2__)
// The same for T tokens at once, in vectors S.
template <typename S, typename W, int N, int T>
void rows_times(const W* values, const uint32_t* codes, int64_t quads, const float* x, int64_t step, float* y) {
    constexpr int V = ROWS / S::LANES, PER = 16 / N;         // registers for the rows; quads whose codes lie together
    constexpr int CHAINS = T == 1 ? 4 : T == 2 ? 2 : 1;      // sums that do not wait for each other
    constexpr int64_t BLOCK = CHAIN * CHAINS / N / PER * PER;  // quads between two additions to the total
    typename S::Numbers sum[T][V][CHAINS], total[T][V];
    for (int t = 0; t < T; t++)
        for (int v = 0; v < V; v++) total[t][v] = S::zero();
    for (int64_t first = 0; first < quads; first += BLOCK) {
        const int64_t last = std::min(first + BLOCK, quads);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++)
#pragma GCC unroll 2
            for (int v = 0; v < V; v++)
#pragma GCC unroll 4
                for (int c = 0; c < CHAINS; c++) sum[t][v][c] = S::zero();
        for (int64_t q = first; q < last; q += PER) {
            typename S::Codes code[V];
#pragma GCC unroll 2
            for (int v = 0; v < V; v++) code[v] = S::codes(codes + q / PER * ROWS + v * S::LANES);
            auto add_quad = [&](int64_t k, int chain) __attribute__((always_inline)) {
                typename S::Quad input[T];
#pragma GCC unroll 8
                for (int t = 0; t < T; t++) input[t] = S::quad(x + t * step + 4 * (q + k));
#pragma GCC unroll 2
                for (int i = 0; i < N; i++) {
                    const W* at = values + ((q + k) * N + i) * ROWS;
                    __builtin_prefetch(reinterpret_cast<const char*>(at) + AHEAD_BYTES);
#pragma GCC unroll 2
                    for (int v = 0; v < V; v++) {
                        const auto weight = S::load(at + v * S::LANES);
#pragma GCC unroll 8
                        for (int t = 0; t < T; t++) {
                            auto& to = sum[t][v][(chain * N + i) % CHAINS];
                            to = S::multiply_add(weight, S::pick(input[t], code[v]), to);
                        }
                        S::next(code[v]);
                    }
                }
            };
            const int64_t together = std::min<int64_t>(PER, last - q);
            int64_t k = 0;
            for (; k + 4 <= together; k += 4) {
#pragma GCC unroll 4
                for (int c = 0; c < 4; c++) add_quad(k + c, c);
            }
            for (; k < together; k++) add_quad(k, 0);
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; t++)
#pragma GCC unroll 2
            for (int v = 0; v < V; v++) {
                auto part = sum[t][v][0];
#pragma GCC unroll 4
                for (int c = 1; c < CHAINS; c++) part = S::add(part, sum[t][v][c]);
                total[t][v] = S::add(total[t][v], part);
            }
    }
    for (int t = 0; t < T; t++)
        for (int v = 0; v < V; v++) S::store(y + t * ROWS + v * S::LANES, total[t][v]);
}
#endif

// One group of rows times up to TOKENS tokens: y [tokens, 16].
#if defined(__AVX2__)
constexpr int TOKENS = Float::TOKENS;

template <typename W, int N, int T = 1>
void group_times(int64_t tokens, const W* values, const uint32_t* codes, int64_t quads, const float* x, int64_t step,
                 float* y) {
    if (tokens == T) return rows_times<Float, W, N, T>(values, codes, quads, x, step, y);
    if constexpr (T < TOKENS) group_times<W, N, T + 1>(tokens, values, codes, quads, x, step, y);
}
#else
constexpr int TOKENS = 8;
#endif

#if defined(__AVX2__)
template <typename W, int N>
void group_times(int64_t tokens, const double* values, const uint32_t* codes, int64_t quads, const double* x,
                 int64_t step, double* y) {
#else
template <typename W, int N, typename F>
void group_times(int64_t tokens, const W* values, const uint32_t* codes, int64_t quads, const F* x, int64_t step,
                 F* y) {
#endif
    for (int64_t t = 0; t < tokens; t++)
        rows_times_one<std::remove_pointer_t<decltype(y)>, W, N>(values, codes, quads, x + t * step, y + t * ROWS);
}

template <typename F, typename W, int N>
void multiply(const Problem& p, const W* x, W* y, const W* values, const uint32_t* codes, const W* bias) {
    const int64_t quads = p.columns / 4, groups = (p.rows + ROWS - 1) / ROWS;
    const int64_t values_of = quads * N * ROWS, codes_of = (quads * N + 15) / 16 * ROWS;
    std::vector<F> wide;
    const F* input;
    if constexpr (std::is_same_v<F, W>) {
        input = x;
    } else {
        wide.resize(p.tokens * p.columns);
        for (size_t i = 0; i < wide.size(); i++) wide[i] = widen(x[i]);
        input = wide.data();
    }
#pragma omp parallel for schedule(static) num_threads(p.threads)
    for (int64_t g = 0; g < groups; g++)
        for (int64_t first = 0; first < p.tokens; first += TOKENS) {
            const int64_t tokens = std::min<int64_t>(TOKENS, p.tokens - first), row = g * ROWS;
            F sums[TOKENS * ROWS];
            group_times<W, N>(tokens, values + g * values_of, codes + g * codes_of, quads, input + first * p.columns,
                              p.columns, sums);
            for (int64_t t = 0; t < tokens; t++)
                for (int64_t r = 0; r < std::min<int64_t>(ROWS, p.rows - row); r++)
                    narrow(sums[t * ROWS + r] + (bias ? widen(bias[row + r]) : F(0)), &y[(first + t) * p.rows + row + r]);
        }
}

template <typename F, typename W>
void multiply(const Problem* p, const void* x, void* y, const void* values, const uint32_t* codes, const void* bias) {
    auto run = p->n == 1 ? multiply<F, W, 1> : multiply<F, W, 2>;
    run(*p, static_cast<const W*>(x), static_cast<W*>(y), static_cast<const W*>(values), codes,
        static_cast<const W*>(bias));
}

}  // namespace

extern "C" {

void fxsparse_n_m_f32(const Problem* p, const void* x, void* y, const void* values, const uint32_t* codes,
                      const void* bias) {
    multiply<float, float>(p, x, y, values, codes, bias);
}

void fxsparse_n_m_bf16(const Problem* p, const void* x, void* y, const void* values, const uint32_t* codes,
                       const void* bias) {
    multiply<float, BFloat16>(p, x, y, values, codes, bias);
}

void fxsparse_n_m_f64(const Problem* p, const void* x, void* y, const void* values, const uint32_t* codes,
                      const void* bias) {
    multiply<double, double>(p, x, y, values, codes, bias);
}
}
