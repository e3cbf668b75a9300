// activation(gate) * value, its norm, and the gradient of both.
#pragma once

#include "rows.h"
#include "threads.h"

namespace {

// ---- activations: their value and derivative

// s = 1 / (1 + 2^x), to about two units in the last place, and 1 - s without cancellation. 2^x is kept below 2^100,
// whose reciprocal still is a normal number.
struct Sigmoid {
    f32x16 value, rest;
};
INLINE Sigmoid sigmoid_of_exp2(f32x16 x) {
    f32x16 power = exp2(minimum(splat(100.0f), x)), y = power + 1.0f;
#if defined(__AVX512F__)
    f32x16 guess = (f32x16)_mm512_rcp14_ps((__m512)y);
    f32x16 value = guess * fma(-y, guess, splat(2.0f));
#else
    f32x16 value = 1.0f / y;
#endif
    return {value, power * value};
}

struct Activated {
    f32x16 value, slope;
};

// x s(x), s(x) = 1 / (1 + e^-x)
struct Silu {
    static LANES_INLINE Activated at(f32x16 x) {
        Sigmoid s = sigmoid_of_exp2(x * -LOG2E);
        return {x * s.value, s.value * fma(x, s.rest, splat(1.0f))};
    }
};

// x (1 + tanh(u)) / 2 = x s(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
struct GeluTanh {
    static LANES_INLINE Activated at(f32x16 x) {
        constexpr float twice_root = 1.5957691216057308f, cubic = 0.044715f;
        f32x16 square = x * x;
        Sigmoid s = sigmoid_of_exp2(x * fma(square, splat(cubic), splat(1.0f)) * (-LOG2E * twice_root));
        f32x16 inner = fma(square, splat(3.0f * cubic), splat(1.0f)) * twice_root;
        return {x * s.value, s.value * fma(x * s.rest, inner, splat(1.0f))};
    }
};

// x P(x), P the normal distribution. P(-|x|) = e^(-x^2 / 2) q(t), t = 1 / (1 + 0.3 |x|); q is a polynomial fitted to
// erfcx(|x| / sqrt 2) / 2 for the least relative error in |x| <= 14 (1.5e-7 before rounding, 5e-7 after).
struct Gelu {
    static LANES_INLINE Activated at(f32x16 x) {
        constexpr float q[8] = {1.1962929778e-1f,  1.2075397394e-1f, 9.9913368069e-2f,  1.2856207740e-1f,
                                -5.3684574097e-2f, 2.0635459814e-1f, -1.5720376080e-1f, 3.5674946670e-2f};
        constexpr float inverse_root = 0.3989422804014327f;  // 1 / sqrt(2 pi)
        f32x16 magnitude = select(x < 0.0f, -x, x);
        f32x16 t = 1.0f / fma(magnitude, splat(0.3f), splat(1.0f));
        f32x16 bell = exp2(x * x * (-0.5f * LOG2E));
        f32x16 sum = splat(q[7]);
        for (int i = 6; i >= 0; --i) sum = fma(sum, t, splat(q[i]));
        f32x16 tail = sum * t * bell;
        f32x16 p = select(x < 0.0f, tail, 1.0f - tail);
        return {x * p, fma(x * bell, splat(inverse_root), p)};
    }
};

template <class Body>
void by_activation(index_t activation, const Body& body) {
    if (activation == 0)
        body(Silu{});
    else if (activation == 1)
        body(GeluTanh{});
    else
        body(Gelu{});
}

// ---- activation(gate) * value, and its norm

struct GatedUnit {
    const void *gate, *value;  // rows of `columns` numbers, `stride` apart
    void* out;
    float* stats;  // (rows, 2), of the product; null: it is not normalised
    index_t rows, columns, stride;
    Norm norm;
};

template <class A, class X, class O>
void gated_unit(const GatedUnit& call, int threads) {
    constexpr index_t grain = 4;
    parallel_ranges(call.rows, grain, threads, [&](index_t first, index_t end) {
        static thread_local Scratch scratch;
        float* product = call.stats ? (float*)scratch.bytes(call.columns * sizeof(float)) : nullptr;
        for (index_t row = first; row < end; ++row) {
            const X *gate = (const X*)call.gate + row * call.stride, *value = (const X*)call.value + row * call.stride;
            O* out = (O*)call.out + row * call.columns;
            auto gated = [&](auto c) ALWAYS_INLINE {
                will_read(gate, c, call.stride);
                will_read(value, c, call.stride);
                will_write(out, c, call.columns);
                return A::at(load(gate, c)).value * load(value, c);
            };
            if (!product) {
                for_columns(call.columns, [&](auto c) ALWAYS_INLINE { store(out, c, gated(c)); });
                continue;
            }
            Sums sums = fold_columns<Sums>(call.columns, [&](Sums found, auto c) ALWAYS_INLINE {
                f32x16 v = gated(c);
                store(product, c, v);
                return with(found, v);
            });
            RowStatistics s = statistics(product, call.columns, call.norm, sums);
            call.stats[2 * row] = s.mean;
            call.stats[2 * row + 1] = s.inverse;
            for_columns(call.columns,
                        [&](auto c) ALWAYS_INLINE { store(out, c, (load(product, c) - s.mean) * s.inverse); });
        }
    });
}

struct GatedUnitGradient {
    const void *gate, *value, *d_out;
    const float* stats;
    void *d_gate, *d_value;
    index_t rows, columns, stride, d_stride;
};

// from the product's gradient to gate's and value's
template <class X, class C>
INLINE void gated_gradient(C c, Activated a, f32x16 value, f32x16 d_product, X* d_gate, X* d_value) {
    store(d_gate, c, d_product * value * a.slope);
    store(d_value, c, d_product * a.value);
}

// the product is formed once more; its activations and slopes are kept for the second pass over the row
template <class A, class X, class O, class Prepare>
INLINE void normed_gradient_row(index_t columns, const X* gate, const X* value, const O* d_out, RowStatistics s,
                                X* d_gate, X* d_value, float* activated, float* slopes, const Prepare& prepare) {
    Sums sums = fold_columns<Sums>(columns, [&](Sums found, auto c) ALWAYS_INLINE {
        prepare(c);
        Activated a = A::at(load(gate, c));
        f32x16 g = load(d_out, c), unit = (a.value * load(value, c) - s.mean) * s.inverse;
        store(activated, c, a.value);
        store(slopes, c, a.slope);
        return Sums{found.first + g, fma(g, unit, found.second)};
    });
    float mean_gradient = sum_of(sums.first) / (float)columns, mean_product = sum_of(sums.second) / (float)columns;
    for_columns(columns, [&](auto c) ALWAYS_INLINE {
        Activated a{load(activated, c), load(slopes, c)};
        f32x16 v = load(value, c), unit = (a.value * v - s.mean) * s.inverse;
        gated_gradient(c, a, v, (load(d_out, c) - mean_gradient - unit * mean_product) * s.inverse, d_gate, d_value);
    });
}

template <class A, class X, class O>
void gated_unit_gradient(const GatedUnitGradient& call, int threads) {
    constexpr index_t grain = 4;
    parallel_ranges(call.rows, grain, threads, [&](index_t first, index_t end) {
        static thread_local Scratch scratch;
        float* memory = call.stats ? (float*)scratch.bytes(2 * call.columns * sizeof(float)) : nullptr;
        for (index_t row = first; row < end; ++row) {
            const X *gate = (const X*)call.gate + row * call.stride, *value = (const X*)call.value + row * call.stride;
            const O* d_out = (const O*)call.d_out + row * call.columns;
            X *d_gate = (X*)call.d_gate + row * call.d_stride, *d_value = (X*)call.d_value + row * call.d_stride;
            auto prepare = [&](auto c) ALWAYS_INLINE {
                will_read(gate, c, call.stride);
                will_read(value, c, call.stride);
                will_read(d_out, c, call.columns);
                will_write(d_gate, c, call.d_stride);
                will_write(d_value, c, call.d_stride);
            };
            if (memory) {
                RowStatistics s{call.stats[2 * row], call.stats[2 * row + 1]};
                normed_gradient_row<A>(call.columns, gate, value, d_out, s, d_gate, d_value, memory,
                                       memory + call.columns, prepare);
                continue;
            }
            for_columns(call.columns, [&](auto c) ALWAYS_INLINE {
                prepare(c);
                gated_gradient(c, A::at(load(gate, c)), load(value, c), load(d_out, c), d_gate, d_value);
            });
        }
    });
}

}  // namespace
