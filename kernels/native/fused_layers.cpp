// What stands between the matrix products of a transformer's layer: residual addition with dropout and normalisation,
// gated units, rotary positions. Arithmetic is float; memory is float or bfloat16. Nothing depends on the number of
// threads: a row is one thread's, and sums over rows are taken in blocks of rows that the shape alone decides.

#include "add_norm.h"
#include "gated_unit.h"
#include "rows.h"
#include "threads.h"

namespace {

// ---- rotary positions

struct Rotary {
    const void* x;  // (tokens, heads, head_dim), head_dim side by side
    void* out;
    const float *cos, *sin;  // (tokens, head_dim); null: x is copied
    index_t tokens, heads, head_dim;
    index_t token_stride, head_stride, out_token_stride, out_head_stride;
    bool transposed;  // for the gradient

    bool heads_are_neighbours() const { return head_stride == head_dim && out_head_stride == head_dim; }
};

// the tables at sixteen columns of the first half and at those of the second
template <class C>
struct Turn {
    C columns;
    index_t half;
    f32x16 cos_first, cos_second, to_first, to_second;

    ALWAYS_INLINE Turn(const Rotary& call, const float* cos, const float* sin, C c)
        : columns(c), half(call.head_dim / 2) {
        cos_first = load(cos, c);
        cos_second = load(cos + half, c);
        f32x16 sin_first = load(sin, c), sin_second = load(sin + half, c);
        to_first = call.transposed ? sin_second : -sin_first;
        to_second = call.transposed ? -sin_first : sin_second;
    }
    template <class T>
    ALWAYS_INLINE void operator()(const T* x, T* out) const {
        f32x16 first = load(x, columns), second = load(x + half, columns);
        store(out, columns, fma(first, cos_first, second * to_first));
        store(out + half, columns, fma(second, cos_second, first * to_second));
    }
};

// the heads of one token, which share a row of the tables; out may be x
template <class T>
INLINE void rotate_token(const Rotary& call, const T* x, T* out, const float* cos, const float* sin) {
    auto for_heads = [&](const auto& turn) ALWAYS_INLINE {
        const T* from = x;
        T* to = out;
        for (index_t head = 0; head < call.heads; ++head, from += call.head_stride, to += call.out_head_stride)
            turn(from, to);
    };
    index_t half = call.head_dim / 2, at = 0;
    // whole lines of bfloat16 at a time
    for (; LANES_ARE_ONE_REGISTER && at + 2 * LANES <= half; at += 2 * LANES) {
        Turn<Whole> left(call, cos, sin, Whole{at}), right(call, cos, sin, Whole{at + LANES});
        for_heads([&](const T* from, T* to) ALWAYS_INLINE {
            left(from, to);
            right(from, to);
        });
    }
    for (; at + LANES <= half; at += LANES) for_heads(Turn<Whole>(call, cos, sin, Whole{at}));
    if (at < half) for_heads(Turn<Part>(call, cos, sin, Part{at, (int)(half - at)}));
}

template <class T>
INLINE void copy_token(const Rotary& call, const T* x, T* out) {
    bool whole = call.heads_are_neighbours();
    index_t pieces = whole ? 1 : call.heads, size = whole ? call.heads * call.head_dim : call.head_dim;
    for (index_t piece = 0; piece < pieces; ++piece)
        std::memcpy(out + piece * call.out_head_stride, x + piece * call.head_stride, size * sizeof(T));
}

template <class T>
void rotary(const Rotary& call, int threads) {
    constexpr index_t grain = 16;
    // a token is a short piece of a long row: too short for the processor to see where the next one lies
    constexpr index_t ahead = 8, line = 64 / sizeof(T);
    parallel_ranges(call.tokens, grain, threads, [&](index_t first, index_t end) {
        for (index_t token = first; token < end; ++token) {
            const T* x = (const T*)call.x + token * call.token_stride;
            T* out = (T*)call.out + token * call.out_token_stride;
            index_t row = token * call.head_dim;
            if (call.heads_are_neighbours())
                for (index_t at = 0; at < call.heads * call.head_dim; at += line) {
                    will_read(x, Whole{at}, ahead * call.token_stride);
                    if (out != x) will_write(out, Whole{at}, ahead * call.out_token_stride);
                }
            if (call.cos)
                rotate_token(call, x, out, call.cos + row, call.sin + row);
            else
                copy_token(call, x, out);
        }
    });
}

}  // namespace

// the dtypes are those of x, of total and residual, and of normed
EXPORT(add_norm_forward)(const void* x, const void* residual, const void* weight, const void* bias, void* total,
                         void* normed, void* stats, index_t rows, index_t columns, index_t x_is_bf16,
                         index_t total_is_bf16, index_t normed_is_bf16, index_t is_layer_norm, double eps,
                         index_t drops, index_t seed, index_t threshold, double scale, index_t threads) {
    Dropout dropout = dropout_of(drops, seed, threshold, scale);
    Norm norm{is_layer_norm != 0, (float)eps};
    AddNorm call{
        x,       residual, (const float*)weight, (const float*)bias, total, normed, (float*)stats, rows, columns,
        dropout, norm};
    by_type(x_is_bf16, [&](auto a) {
        by_type(total_is_bf16, [&](auto b) {
            by_type(normed_is_bf16, [&](auto c) {
                // the sum is never narrower than what is added to it
                if constexpr (sizeof a <= sizeof b) add_norm<decltype(a), decltype(b), decltype(c)>(call, (int)threads);
            });
        });
    });
}

// partials: float (blocks, 2, columns), needed where d_weight or d_bias is
EXPORT(add_norm_backward)(const void* d_total, const void* d_normed, const void* total, const void* stats,
                          const void* weight, void* d_x, void* d_residual, void* d_weight, void* d_bias, void* partials,
                          index_t rows, index_t columns, index_t blocks, index_t x_is_bf16, index_t total_is_bf16,
                          index_t normed_is_bf16, index_t is_layer_norm, index_t drops, index_t seed, index_t threshold,
                          double scale, index_t threads) {
    Dropout dropout = dropout_of(drops, seed, threshold, scale);
    AddNormGradient call{d_total,
                         d_normed,
                         total,
                         (const float*)stats,
                         (const float*)weight,
                         d_x,
                         d_residual,
                         (float*)d_weight,
                         (float*)d_bias,
                         (float*)partials,
                         rows,
                         columns,
                         blocks,
                         dropout,
                         is_layer_norm != 0};
    by_type(x_is_bf16, [&](auto a) {
        by_type(total_is_bf16, [&](auto b) {
            by_type(normed_is_bf16, [&](auto c) {
                if constexpr (sizeof a <= sizeof b)
                    add_norm_gradient<decltype(a), decltype(b), decltype(c)>(call, (int)threads);
            });
        });
    });
}

// activation: 0 silu, 1 gelu by tanh, 2 gelu; stats null: no norm
EXPORT(gated_unit_forward)(const void* gate, const void* value, void* out, void* stats, index_t rows, index_t columns,
                           index_t stride, index_t activation, index_t x_is_bf16, index_t out_is_bf16, double eps,
                           index_t threads) {
    GatedUnit call{gate, value, out, (float*)stats, rows, columns, stride, {true, (float)eps}};
    by_activation(activation, [&](auto a) {
        by_type(x_is_bf16, [&](auto b) {
            by_type(out_is_bf16,
                    [&](auto c) { gated_unit<decltype(a), decltype(b), decltype(c)>(call, (int)threads); });
        });
    });
}

EXPORT(gated_unit_backward)(const void* gate, const void* value, const void* d_out, const void* stats, void* d_gate,
                            void* d_value, index_t rows, index_t columns, index_t stride, index_t d_stride,
                            index_t activation, index_t x_is_bf16, index_t out_is_bf16, index_t threads) {
    GatedUnitGradient call{gate, value, d_out, (const float*)stats, d_gate, d_value, rows, columns, stride, d_stride};
    by_activation(activation, [&](auto a) {
        by_type(x_is_bf16, [&](auto b) {
            by_type(out_is_bf16,
                    [&](auto c) { gated_unit_gradient<decltype(a), decltype(b), decltype(c)>(call, (int)threads); });
        });
    });
}

// strides in elements
EXPORT(rotary)(const void* x, void* out, const void* cos, const void* sin, index_t tokens, index_t heads,
               index_t head_dim, index_t token_stride, index_t head_stride, index_t out_token_stride,
               index_t out_head_stride, index_t is_bf16, index_t transposed, index_t threads) {
    Rotary call{x,        out,          (const float*)cos, (const float*)sin, tokens,          heads,
                head_dim, token_stride, head_stride,       out_token_stride,  out_head_stride, transposed != 0};
    by_type(is_bf16, [&](auto a) { rotary<decltype(a)>(call, (int)threads); });
}
