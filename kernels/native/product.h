// Products of small packed matrices: C (M x N, float) = or += A (M x K) B (K x N).
//
// Both operands are matrices of 32-bit words. A word holds one float, or two neighbours along K of bfloat16 (the lower
// half is the first). A is row by row, M x KW words, and B is KW x N words, so that both element types have one layout,
// one transposition and one loop. M, N and KW are multiples of 16; zeros fill what a matrix does not have.
#pragma once

#include "simd.h"

namespace {

using word = std::uint32_t;

struct Float {
    static constexpr int PER_WORD = 1;
};
struct Bf16 {
    static constexpr int PER_WORD = 2;
};

INLINE index_t round_up(index_t n, index_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// a row's length in memory, n words or a cache line more: rows that lie a power of two apart would share few sets of it
INLINE index_t pitch(index_t n) { return n % 128 == 0 ? n + 16 : n; }

INLINE void clear(void* memory, std::size_t bytes) {
    if (bytes > 0) std::memset(memory, 0, bytes);  // of no bytes the address may be null
}

// ---- the step along K: c += a word of A times 16 words of B

template <class E>
INLINE f32x16 multiply_add(word a, u32x16 b, f32x16 c) {
    if constexpr (E::PER_WORD == 1) {
        float x;
        std::memcpy(&x, &a, 4);
        return x * (f32x16)b + c;
    } else {
#if defined(__AVX512BF16__)
        return (f32x16)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
#endif
    }
}

#if defined(__AVX512F__)
constexpr int ROWS_AT_ONCE = 8, VECTORS_AT_ONCE = 2;
#else
constexpr int ROWS_AT_ONCE = 4, VECTORS_AT_ONCE = 1;
#endif

template <class E, int VECTORS>
INLINE void product_block(index_t KW, const word* A, index_t lda, const word* B, index_t ldb, float* C, index_t ldc,
                          bool add) {
    f32x16 sum[ROWS_AT_ONCE][VECTORS];
    for (int m = 0; m < ROWS_AT_ONCE; ++m)
        for (int n = 0; n < VECTORS; ++n) sum[m][n] = add ? load(C + m * ldc + n * LANES) : f32x16{};
    for (index_t k = 0; k < KW; ++k) {
        u32x16 b[VECTORS];
        for (int n = 0; n < VECTORS; ++n) b[n] = load_as<u32x16>(B + k * ldb + n * LANES);
        for (int m = 0; m < ROWS_AT_ONCE; ++m)
            for (int n = 0; n < VECTORS; ++n) sum[m][n] = multiply_add<E>(A[m * lda + k], b[n], sum[m][n]);
    }
    for (int m = 0; m < ROWS_AT_ONCE; ++m)
        for (int n = 0; n < VECTORS; ++n) store(C + m * ldc + n * LANES, sum[m][n]);
}

template <class E>
void product_by_vectors(index_t M, index_t N, index_t KW, const word* A, index_t lda, const word* B, index_t ldb,
                        float* C, index_t ldc, bool add) {
    // sums of at most 64 products, added up: the rounding of one long sum would grow with its length
    constexpr index_t PART = 64;
    index_t k = 0;
    do {
        const index_t words = KW - k < PART ? KW - k : PART;
        for (index_t m = 0; m < M; m += ROWS_AT_ONCE) {
            const word* a = A + m * lda + k;
            const word* b = B + k * ldb;
            float* c = C + m * ldc;
            index_t n = 0;
            for (; n + VECTORS_AT_ONCE * LANES <= N; n += VECTORS_AT_ONCE * LANES)
                product_block<E, VECTORS_AT_ONCE>(words, a, lda, b + n, ldb, c + n, ldc, add);
            for (; n < N; n += LANES) product_block<E, 1>(words, a, lda, b + n, ldb, c + n, ldc, add);
        }
        add = true;
        k += PART;
    } while (k < KW);
}

// ---- tiles: 16 rows of 16 words, whose product is 16 x 32 x 16 multiplications in 16 cycles

#if defined(ANTLM_AMX) && defined(__AVX512BF16__)
}  // namespace
extern int antlm_amx_in_use;
namespace {

// the shapes of the eight tiles: all 16 rows of 64 bytes
struct alignas(64) TileShapes {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t bytes_a_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// a thread's tiles are ours while this lives; other libraries set their own shapes when they begin
class Tiles {
  public:
    Tiles() {
        if (!antlm_amx_in_use) return;
        static const TileShapes shapes;
        _tile_loadconfig(&shapes);
    }
    ~Tiles() {
        if (antlm_amx_in_use) _tile_release();
    }
};

// one of four shapes: TALL and WIDE say whether there are two tiles of rows, two of columns
template <bool TALL, bool WIDE>
INLINE void product_of_tiles(index_t KW, const word* A, index_t lda, const word* B, index_t ldb, float* C, index_t ldc,
                             bool add) {
    const index_t a_bytes = lda * 4, b_bytes = ldb * 4, c_bytes = ldc * 4;
    float* C2 = C + 16 * ldc;
    if (add) {
        _tile_loadd(0, C, c_bytes);
        if constexpr (WIDE) _tile_loadd(1, C + 16, c_bytes);
        if constexpr (TALL) _tile_loadd(2, C2, c_bytes);
        if constexpr (TALL && WIDE) _tile_loadd(3, C2 + 16, c_bytes);
    } else {
        _tile_zero(0);
        if constexpr (WIDE) _tile_zero(1);
        if constexpr (TALL) _tile_zero(2);
        if constexpr (TALL && WIDE) _tile_zero(3);
    }
    for (index_t k = 0; k < KW; k += 16) {
        _tile_loadd(4, A + k, a_bytes);
        _tile_loadd(6, B + k * ldb, b_bytes);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (WIDE) {
            _tile_loadd(7, B + k * ldb + 16, b_bytes);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (TALL) {
            _tile_loadd(5, A + 16 * lda + k, a_bytes);
            _tile_dpbf16ps(2, 5, 6);
        }
        if constexpr (TALL && WIDE) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, C, c_bytes);
    if constexpr (WIDE) _tile_stored(1, C + 16, c_bytes);
    if constexpr (TALL) _tile_stored(2, C2, c_bytes);
    if constexpr (TALL && WIDE) _tile_stored(3, C2 + 16, c_bytes);
}

// K of two steps, which is a head of 64: one side's four tiles stay while the other side passes by, 16 rows or columns
// at a time, so that four products need two loads instead of four
INLINE void product_of_long_rows(index_t N, const word* A, index_t lda, const word* B, index_t ldb, float* C,
                                 index_t ldc) {
    const index_t a_bytes = lda * 4, b_bytes = ldb * 4, c_bytes = ldc * 4;
    _tile_loadd(4, A, a_bytes);
    _tile_loadd(5, A + 16, a_bytes);
    _tile_loadd(6, A + 16 * lda, a_bytes);
    _tile_loadd(7, A + 16 * lda + 16, a_bytes);
    for (index_t n = 0; n < N; n += 16) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_loadd(2, B + n, b_bytes);
        _tile_dpbf16ps(0, 4, 2);
        _tile_dpbf16ps(1, 6, 2);
        _tile_loadd(3, B + 16 * ldb + n, b_bytes);
        _tile_dpbf16ps(0, 5, 3);
        _tile_dpbf16ps(1, 7, 3);
        _tile_stored(0, C + n, c_bytes);
        _tile_stored(1, C + 16 * ldc + n, c_bytes);
    }
}
INLINE void product_of_long_columns(index_t M, const word* A, index_t lda, const word* B, index_t ldb, float* C,
                                    index_t ldc) {
    const index_t a_bytes = lda * 4, b_bytes = ldb * 4, c_bytes = ldc * 4;
    _tile_loadd(4, B, b_bytes);
    _tile_loadd(5, B + 16 * ldb, b_bytes);
    _tile_loadd(6, B + 16, b_bytes);
    _tile_loadd(7, B + 16 * ldb + 16, b_bytes);
    for (index_t m = 0; m < M; m += 16) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_loadd(2, A + m * lda, a_bytes);
        _tile_dpbf16ps(0, 2, 4);
        _tile_dpbf16ps(1, 2, 6);
        _tile_loadd(3, A + m * lda + 16, a_bytes);
        _tile_dpbf16ps(0, 3, 5);
        _tile_dpbf16ps(1, 3, 7);
        _tile_stored(0, C + m * ldc, c_bytes);
        _tile_stored(1, C + m * ldc + 16, c_bytes);
    }
}

INLINE void product_by_tiles(index_t M, index_t N, index_t KW, const word* A, index_t lda, const word* B, index_t ldb,
                             float* C, index_t ldc, bool add) {
    // the tile loads are assembly that does not name the memory it reads: what was stored before must be there
    asm volatile("" ::: "memory");
    if (KW == 32 && !add && M == 32) {
        product_of_long_rows(N, A, lda, B, ldb, C, ldc);
    } else if (KW == 32 && !add && N == 32) {
        product_of_long_columns(M, A, lda, B, ldb, C, ldc);
    } else {
        for (index_t m = 0; m < M; m += 32)
            for (index_t n = 0; n < N; n += 32) {
                const word *a = A + m * lda, *b = B + n;
                float* c = C + m * ldc + n;
                bool tall = m + 16 < M, wide = n + 16 < N;
                if (tall && wide)
                    product_of_tiles<true, true>(KW, a, lda, b, ldb, c, ldc, add);
                else if (tall)
                    product_of_tiles<true, false>(KW, a, lda, b, ldb, c, ldc, add);
                else if (wide)
                    product_of_tiles<false, true>(KW, a, lda, b, ldb, c, ldc, add);
                else
                    product_of_tiles<false, false>(KW, a, lda, b, ldb, c, ldc, add);
            }
    }
    asm volatile("" ::: "memory");
}
#else
class Tiles {};
#endif

template <class E>
INLINE void product(index_t M, index_t N, index_t KW, const word* A, index_t lda, const word* B, index_t ldb, float* C,
                    index_t ldc, bool add) {
#if defined(ANTLM_AMX) && defined(__AVX512BF16__)
    if (E::PER_WORD == 2 && antlm_amx_in_use) return product_by_tiles(M, N, KW, A, lda, B, ldb, C, ldc, add);
#endif
    product_by_vectors<E>(M, N, KW, A, lda, B, ldb, C, ldc, add);
}

// ---- packing

INLINE u32x16 pair_up(f32x16 first, f32x16 second) {
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
    const u16x32 interleaved = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    return (u32x16)_mm512_permutexvar_epi16((__m512i)interleaved, both);
#else
    return __builtin_convertvector(narrow(first), u32x16) | __builtin_convertvector(narrow(second), u32x16) << 16;
#endif
}

// the two halves of 16 words, as floats
INLINE f32x16 lower_half(u32x16 words) { return (f32x16)(words << 16); }
INLINE f32x16 upper_half(u32x16 words) { return (f32x16)(words & 0xffff0000u); }

// `rows` x `columns` numbers, a row every `stride` of them, as rows_padded x ld words; E::PER_WORD columns a word
template <class E, class In>
void pack_rows(const In* from, index_t stride, index_t rows, index_t columns, word* to, index_t rows_padded,
               index_t ld) {
    for (index_t r = 0; r < rows_padded; ++r) {
        word* row = to + r * ld;
        if (r >= rows) {
            std::memset(row, 0, ld * sizeof(word));
            continue;
        }
        const In* source = from + r * stride;
        if constexpr (E::PER_WORD == 2) {
            static_assert(sizeof(In) == 2, "words of pairs are made of bfloat16");
            for (index_t c = 0; c < 2 * ld; c += 2 * LANES) {
                u16x32 v{};
                if (c + 2 * LANES <= columns)
                    v = load_as<u16x32>(source + c);
                else if (c < columns)
                    std::memcpy(&v, source + c, (columns - c) * 2);
                store_as((In*)row + c, v);
            }
        } else {
            for (index_t c = 0; c < ld; c += LANES) {
                index_t left = columns - c;
                f32x16 v = left >= LANES ? load(source + c) : left > 0 ? load_first(source + c, (int)left) : f32x16{};
                store((float*)row + c, v);
            }
        }
    }
}

// the same numbers, E::PER_WORD rows a word: rows_padded / PER_WORD x ld words, what B is made of
template <class E, class In>
void pack_pairs(const In* from, index_t stride, index_t rows, index_t columns, word* to, index_t rows_padded,
                index_t ld) {
    if constexpr (E::PER_WORD == 1) {
        pack_rows<E>(from, stride, rows, columns, to, rows_padded, ld);
        return;
    } else {
        for (index_t r = 0; r < rows_padded; r += 2) {
            word* row = to + r / 2 * ld;
            const In *first = from + r * stride, *second = first + stride;
            for (index_t c = 0; c < ld; c += LANES) {
                int n = (int)(columns - c < LANES ? columns - c : LANES);
                u16x16 a{}, b{};
                if (n == LANES) {
                    if (r < rows) a = load_as<u16x16>(first + c);
                    if (r + 1 < rows) b = load_as<u16x16>(second + c);
                } else if (n > 0) {
                    if (r < rows) std::memcpy(&a, first + c, n * 2);
                    if (r + 1 < rows) std::memcpy(&b, second + c, n * 2);
                }
                store_as(row + c, __builtin_convertvector(a, u32x16) | __builtin_convertvector(b, u32x16) << 16);
            }
        }
    }
}

// pairs of rows out of packed rows (`columns` of them wide); floats need none: their rows are their own pairs
template <class E>
INLINE const word* pairs_of_rows(const word* rows, index_t count, index_t columns, word* space) {
    if constexpr (E::PER_WORD == 1) return rows;
    pack_pairs<E>((const bf16*)rows, columns, count, columns, space, count, columns);
    return space;
}

// words[r][c] becomes to[c][r]; both sides are multiples of 16
INLINE void transpose_words(const word* from, index_t from_ld, index_t rows, index_t columns, word* to, index_t to_ld) {
    for (index_t r = 0; r < rows; r += 16)
        for (index_t c = 0; c < columns; c += 16) {
            u32x16 block[16];
            for (int i = 0; i < 16; ++i) block[i] = load_as<u32x16>(from + (r + i) * from_ld + c);
            transpose(block);
            for (int i = 0; i < 16; ++i) store_as(to + (c + i) * to_ld + r, block[i]);
        }
}

// 16 floats each of two rows that are neighbours along K (bfloat16: one row of words; floats: two)
template <class E>
INLINE void store_row_pair(word* to, index_t ld, f32x16 first, f32x16 second) {
    if constexpr (E::PER_WORD == 2) {
        store_as(to, pair_up(first, second));
    } else {
        store((float*)to, first);
        store((float*)(to + ld), second);
    }
}

// 32 neighbours of one row, as words
template <class E>
INLINE void store_row(word* to, f32x16 first, f32x16 second) {
    if constexpr (E::PER_WORD == 2) {
#if defined(__AVX512BF16__)
        store_as(to, _mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
#else
        store((bf16*)to, first);
        store((bf16*)to + LANES, second);
#endif
    } else {
        store((float*)to, first);
        store((float*)to + LANES, second);
    }
}

}  // namespace
