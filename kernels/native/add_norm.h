// The sum of a residual stream with dropout(x), its norm, and the gradient of both.
#pragma once

#include "philox.h"
#include "rows.h"
#include "threads.h"

namespace {

// ---- dropout

struct Dropout {
    std::uint64_t seed;
    std::uint32_t threshold;  // words below it are dropped
    float scale;              // of what is kept
    bool active;
};

// the mask of one row: column c is word (c / 16) % 4 of the counter (c / 64 * 16 + c % 16, row, row >> 32, 1)
class RowMask {
  public:
    RowMask(const Dropout& dropout, index_t row) : dropout_(dropout), row_(row) {}

    // v at columns [at, at + 16); to be asked for from column 0 on, in order
    LANES_INLINE f32x16 apply(index_t at, f32x16 v) {
        index_t word = at / LANES % 4;
        if (word == 0) draw(at / (4 * LANES));
        return select((i32x16)(words_[word] >= dropout_.threshold), v * dropout_.scale, splat(0.0f));
    }

  private:
    __attribute__((noinline)) void draw(index_t group) {
        words_[0] = (u32x16)lane_numbers() + (std::uint32_t)(group * LANES);
        words_[1] = u32x16{} + (std::uint32_t)row_;
        words_[2] = u32x16{} + (std::uint32_t)(row_ >> 32);
        words_[3] = u32x16{} + 1u;
        philox(dropout_.seed, words_);
    }

    const Dropout& dropout_;
    index_t row_;
    u32x16 words_[4];
};

Dropout dropout_of(index_t active, index_t seed, index_t threshold, double scale) {
    return {(std::uint64_t)seed, (std::uint32_t)threshold, (float)scale, active != 0};
}

// ---- residual + dropout(x), and its norm

struct AddNorm {
    const void *x, *residual;    // residual may be null
    const float *weight, *bias;  // may be null
    void *total, *normed;        // either may be null; without total, x itself is what is normalised
    float* stats;                // (rows, 2): mean, inverse
    index_t rows, columns;
    Dropout dropout;
    Norm norm;
};

template <class X, class R>
INLINE Sums add_row(const AddNorm& call, index_t row) {
    const X* x = (const X*)call.x + row * call.columns;
    const R* residual = call.residual ? (const R*)call.residual + row * call.columns : nullptr;
    R* total = (R*)call.total + row * call.columns;
    RowMask mask(call.dropout, row);
    bool drops = call.dropout.active;
    return fold_columns<Sums>(call.columns, [&](Sums sums, auto c) ALWAYS_INLINE {
        will_read(x, c, call.columns);
        will_write(total, c, call.columns);
        f32x16 v = load(x, c);
        if (drops) v = mask.apply(c.at, v);
        if (residual) {
            will_read(residual, c, call.columns);
            v += load(residual, c);
        }
        v = only(c, as_stored(total, v));
        store(total, c, v);
        return with(sums, v);
    });
}

template <class R, class O>
INLINE void norm_row(const AddNorm& call, const R* row, Sums sums, O* out, float* stats) {
    RowStatistics s = statistics(row, call.columns, call.norm, sums);
    stats[0] = s.mean;
    stats[1] = s.inverse;
    const float *weight = call.weight, *bias = call.bias;
    for_columns(call.columns, [&](auto c) ALWAYS_INLINE {
        will_write(out, c, call.columns);
        f32x16 v = (load(row, c) - s.mean) * s.inverse;
        if (weight) v *= load(weight, c);
        if (bias) v += load(bias, c);
        store(out, c, v);
    });
}

template <class X, class R, class O>
void add_norm(const AddNorm& call, int threads) {
    constexpr index_t grain = 8;
    parallel_ranges(call.rows, grain, threads, [&](index_t first, index_t end) {
        for (index_t row = first; row < end; ++row) {
            const R* source = (const R*)(call.total ? call.total : call.x) + row * call.columns;
            Sums sums{};
            if (call.total)
                sums = add_row<X, R>(call, row);
            else
                sums = fold_columns<Sums>(call.columns, [&](Sums found, auto c) ALWAYS_INLINE {
                    will_read(source, c, call.columns);
                    return with(found, load(source, c));
                });
            if (call.normed) norm_row(call, source, sums, (O*)call.normed + row * call.columns, call.stats + 2 * row);
        }
    });
}

struct AddNormGradient {
    const void *d_total, *d_normed;  // either may be null: nothing came back that way
    const void* total;
    const float *stats, *weight;
    void *d_x, *d_residual;  // either may be null
    float *d_weight, *d_bias;
    float* partials;  // (blocks, 2, columns): sums over a block's rows for d_weight and d_bias
    index_t rows, columns, blocks;
    Dropout dropout;
    bool layer;
};

// the means over a row that a norm's gradient needs: of the gradient, and of its product with the normalised row
struct RowMeans {
    float gradient, product;
};

// adds to the sums over rows in passing
template <class R, class O>
INLINE RowMeans gradient_means(const AddNormGradient& call, const R* total, const O* d_normed, RowStatistics s,
                               float* weight_sum, float* bias_sum) {
    const float* weight = call.weight;
    Sums sums = fold_columns<Sums>(call.columns, [&](Sums found, auto c) ALWAYS_INLINE {
        will_read(d_normed, c, call.columns);
        will_read(total, c, call.columns);
        f32x16 g = load(d_normed, c), unit = (load(total, c) - s.mean) * s.inverse;
        if (weight_sum) store(weight_sum, c, fma(g, unit, load(weight_sum, c)));
        if (bias_sum) store(bias_sum, c, g + load(bias_sum, c));
        if (weight) g *= load(weight, c);
        return Sums{found.first + g, fma(g, unit, found.second)};  // g is 0 past the last column
    });
    float columns = (float)call.columns;
    return {call.layer ? sum_of(sums.first) / columns : 0.0f, sum_of(sums.second) / columns};
}

template <class X, class R, class O>
INLINE void gradient_row(const AddNormGradient& call, index_t row, float* weight_sum, float* bias_sum) {
    index_t start = row * call.columns;
    const R* d_total = call.d_total ? (const R*)call.d_total + start : nullptr;
    const O* d_normed = call.d_normed ? (const O*)call.d_normed + start : nullptr;
    const R* total = (const R*)call.total + start;
    X* d_x = call.d_x ? (X*)call.d_x + start : nullptr;
    R* d_residual = call.d_residual ? (R*)call.d_residual + start : nullptr;
    const float* weight = call.weight;
    RowStatistics s{};
    RowMeans means{};
    if (d_normed) {
        s = {call.stats[2 * row], call.stats[2 * row + 1]};
        means = gradient_means(call, total, d_normed, s, weight_sum, bias_sum);
    }
    RowMask mask(call.dropout, row);
    bool drops = call.dropout.active;
    for_columns(call.columns, [&](auto c) ALWAYS_INLINE {
        f32x16 v{};
        if (d_total) {
            will_read(d_total, c, call.columns);
            v = load(d_total, c);
        }
        if (d_normed) {
            f32x16 g = load(d_normed, c), unit = (load(total, c) - s.mean) * s.inverse;
            if (weight) g *= load(weight, c);
            v = fma(g - means.gradient - unit * means.product, splat(s.inverse), v);
        }
        if (d_residual) {
            will_write(d_residual, c, call.columns);
            store(d_residual, c, v);
        }
        if (d_x) {
            will_write(d_x, c, call.columns);
            store(d_x, c, drops ? mask.apply(c.at, v) : v);
        }
    });
}

// sums over blocks, in their order
void sum_partials(const float* partials, index_t blocks, index_t stride, float* out, index_t columns, int threads) {
    constexpr index_t grain = 256;
    parallel_ranges(columns, grain, threads, [&](index_t first, index_t end) {
        for_columns(end - first, [&](auto c) ALWAYS_INLINE {
            f32x16 sum{};
            for (index_t block = 0; block < blocks; ++block) sum += load(partials + block * stride + first, c);
            store(out + first, c, sum);
        });
    });
}

template <class X, class R, class O>
void add_norm_gradient(const AddNormGradient& call, int threads) {
    bool sums = call.d_weight || call.d_bias;
    parallel_for(call.blocks, threads, [&](index_t block) {
        float* weight_sum = call.d_weight ? call.partials + 2 * block * call.columns : nullptr;
        float* bias_sum = call.d_bias ? call.partials + (2 * block + 1) * call.columns : nullptr;
        if (sums) std::memset(call.partials + 2 * block * call.columns, 0, 2 * call.columns * sizeof(float));
        index_t end = call.rows * (block + 1) / call.blocks;
        for (index_t row = call.rows * block / call.blocks; row < end; ++row)
            gradient_row<X, R, O>(call, row, weight_sum, bias_sum);
    });
    index_t stride = 2 * call.columns;
    if (call.d_weight) sum_partials(call.partials, call.blocks, stride, call.d_weight, call.columns, threads);
    if (call.d_bias)
        sum_partials(call.partials + call.columns, call.blocks, stride, call.d_bias, call.columns, threads);
}

}  // namespace
