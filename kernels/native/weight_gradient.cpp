// The gradient of a linear layer's weight, out = dy^T x, by tiles (AMX). General libraries multiply a transposed left
// factor at half of their speed: both factors have their reduction along rows, while tiles want pairs of neighbours
// along it. Here they are brought into that order once, in pieces that stay in the second-level cache.
//
//   x   (rows, columns)        -> panels of 32 columns: words of two rows, the whole of it before anything else
//   dy  (rows, out_rows)       -> for a group of out_rows at a time, transposed: words of two rows again
//   out (out_rows, columns)    float sums of a group, BLOCK rows of dy and x at a time, written when all are in
//
// A group is one thread's from start to end, and the order of its sums is that of the rows: the number of threads does
// not matter.

#include "product.h"
#include "threads.h"

#if defined(ANTLM_AMX) && defined(__AVX512BF16__)

namespace {

constexpr index_t PANEL = 32;           // rows and columns of out that two by two tiles hold
constexpr index_t BLOCK = 256;          // rows of dy and x that are multiplied at a time
constexpr index_t WORDS = BLOCK / 2;    // of a column of them
constexpr index_t LD = WORDS + 16;      // between rows of dy^T; a power of two would meet in few sets of the cache
constexpr index_t LARGEST_GROUP = 256;  // of out's rows, whose sums a thread keeps

// a matrix of bfloat16; WHOLE: the 32 rows and columns that are asked for are all there, else zeros take their place
struct Matrix {
    const bf16* data;
    index_t stride, rows, columns;

    bool has(index_t r, index_t c) const { return r + PANEL <= rows && c + PANEL <= columns; }

    template <bool WHOLE>
    u16x32 at(index_t r, index_t c) const {
        const bf16* p = data + r * stride + c;
        if (WHOLE || (r < rows && c + PANEL <= columns)) return load_as<u16x32>(p);
        if (r >= rows) return u16x32{};
        return (u16x32)_mm512_maskz_loadu_epi16((__mmask32)((1ull << (columns - c)) - 1), p);
    }
};

// 32 columns of two rows, as words of a number and the one below it
struct Words {
    u32x16 low, high;  // columns 0 to 15, and 16 to 31
};
template <bool WHOLE>
INLINE Words words_of(const Matrix& matrix, index_t r, index_t c) {
    const u16x32 first = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                          8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const u16x32 second = first + (std::uint16_t)16;
    __m512i upper = (__m512i)matrix.at<WHOLE>(r, c), lower = (__m512i)matrix.at<WHOLE>(r + 1, c);
    return {(u32x16)_mm512_permutex2var_epi16(upper, (__m512i)first, lower),
            (u32x16)_mm512_permutex2var_epi16(upper, (__m512i)second, lower)};
}

// 32 rows of a panel of x: 16 rows of 32 words
template <bool WHOLE>
INLINE void pack_right(const Matrix& x, index_t r, index_t c, word* to) {
    for (index_t i = 0; i < 16; ++i) {
        Words words = words_of<WHOLE>(x, r + 2 * i, c);
        store_as(to + i * PANEL, words.low);
        store_as(to + i * PANEL + 16, words.high);
    }
}

// 32 rows of 32 columns of dy, transposed: 32 rows of 16 words; the columns' sums are added to `sums`, if there are any
template <bool WHOLE>
INLINE void pack_left(const Matrix& dy, index_t r, index_t c, word* to, float* sums) {
    u32x16 low[16], high[16];
    for (index_t i = 0; i < 16; ++i) {
        Words words = words_of<WHOLE>(dy, r + 2 * i, c);
        low[i] = words.low;
        high[i] = words.high;
    }
    if (sums) {
        f32x16 low_sum = load(sums), high_sum = load(sums + 16);
        for (index_t i = 0; i < 16; ++i) {
            low_sum += lower_half(low[i]) + upper_half(low[i]);
            high_sum += lower_half(high[i]) + upper_half(high[i]);
        }
        store(sums, low_sum);
        store(sums + 16, high_sum);
    }
    transpose(low);
    transpose(high);
    for (index_t i = 0; i < 16; ++i) {
        store_as(to + i * LD, low[i]);
        store_as(to + (i + 16) * LD, high[i]);
    }
}

// what a group's sums become
struct Out {
    void* data;
    index_t stride, columns;
    bool is_bf16, add;

    // 32 columns from c on of `count` rows
    template <class T>
    void write(T* to, index_t first, index_t count, index_t c, const float* sums) const {
        const index_t width = columns - c < PANEL ? columns - c : PANEL;
        for (index_t r = 0; r < count; ++r, sums += PANEL) {
            T* row = to + (first + r) * stride + c;
            for (index_t i = 0; i < width; i += LANES) {
                const int n = (int)(width - i < LANES ? width - i : LANES);
                f32x16 v = load(sums + i);
                if (add) v += n == LANES ? load(row + i) : load_first(row + i, n);
                n == LANES ? store(row + i, v) : store_first(row + i, v, n);
            }
        }
    }
};

struct GroupMemory {
    word* left;      // height x LD: dy^T
    float* product;  // columns / PANEL x height x PANEL
    float* sums;     // height

    GroupMemory(Carver& carver, index_t height, index_t columns) {
        left = carver.take<word>(height * LD);
        product = carver.take<float>(height * columns);
        sums = carver.take<float>(height);
    }
};

thread_local Scratch of_call, of_group;

// rows [first, first + count) of out
void group_gradient(const Matrix& dy, const word* right, const Out& out, float* column_sums, index_t first,
                    index_t count) {
    const index_t height = round_up(count, PANEL), columns = round_up(out.columns, PANEL);
    Carver counted;
    GroupMemory(counted, height, columns);
    Carver carver(of_group.bytes(counted.used()));
    GroupMemory memory(carver, height, columns);
    std::memset(memory.sums, 0, height * sizeof(float));
    if (dy.rows == 0) std::memset(memory.product, 0, height * columns * sizeof(float));
    Tiles tiles;
    for (index_t block = 0; block < dy.rows; block += BLOCK) {
        const index_t left_over = round_up(dy.rows - block, PANEL), block_rows = left_over < BLOCK ? left_over : BLOCK;
        for (index_t r = 0; r < block_rows; r += PANEL)
            for (index_t c = 0; c < height; c += PANEL) {
                word* to = memory.left + c * LD + r / 2;
                float* sums = column_sums ? memory.sums + c : nullptr;
                if (dy.has(block + r, first + c))
                    pack_left<true>(dy, block + r, first + c, to, sums);
                else
                    pack_left<false>(dy, block + r, first + c, to, sums);
            }
        const word* panel = right + block / 2 * columns;
        for (index_t c = 0; c < columns; c += PANEL, panel += WORDS * PANEL)
            product_by_tiles(height, PANEL, block_rows / 2, memory.left, LD, panel, PANEL, memory.product + c * height,
                             PANEL, block > 0);
    }
    for (index_t c = 0; c < columns; c += PANEL) {
        const float* product = memory.product + c * height;
        out.is_bf16 ? out.write((bf16*)out.data, first, count, c, product)
                    : out.write((float*)out.data, first, count, c, product);
    }
    if (column_sums) std::memcpy(column_sums + first, memory.sums, count * sizeof(float));
}

}  // namespace

// out (+)= dy^T x; dy (rows, out_rows), x (rows, columns), bfloat16, rows in one piece each;
// column_sums: of dy, (out_rows,) float, or null
EXPORT(weight_gradient)(const void* dy_data, const void* x_data, void* out_data, void* column_sums, index_t rows,
                        index_t out_rows, index_t columns, index_t dy_stride, index_t x_stride, index_t out_stride,
                        index_t out_is_bf16, index_t add, index_t threads) {
    const Matrix dy{(const bf16*)dy_data, dy_stride, rows, out_rows}, x{(const bf16*)x_data, x_stride, rows, columns};
    const Out out{out_data, out_stride, columns, out_is_bf16 != 0, add != 0};
    const index_t padded = round_up(columns, PANEL);
    word* right = (word*)of_call.bytes((std::size_t)(round_up(rows, BLOCK) / 2 * padded) * sizeof(word));
    parallel_for(round_up(rows, PANEL) / PANEL, (int)threads, [&](index_t item) {
        const index_t r = item * PANEL;
        word* to = right + r / BLOCK * WORDS * padded + r % BLOCK / 2 * PANEL;
        for (index_t c = 0; c < padded; c += PANEL, to += WORDS * PANEL)
            x.has(r, c) ? pack_right<true>(x, r, c, to) : pack_right<false>(x, r, c, to);
    });

    // in each of the fewest rounds that the largest group allows, every thread has a group
    const index_t rounds = (out_rows + LARGEST_GROUP * threads - 1) / (LARGEST_GROUP * threads);
    const index_t groups = rounds * threads;
    const index_t group = groups ? round_up((out_rows + groups - 1) / groups, PANEL) : PANEL;
    parallel_for((out_rows + group - 1) / group, (int)threads, [&](index_t item) {
        const index_t first = item * group, count = out_rows - first < group ? out_rows - first : group;
        group_gradient(dy, right, out, (float*)column_sums, first, count);
    });
}

#endif
