// A row of floats or bfloat16s, sixteen columns at a time, and what norms need to know of one.
#pragma once

#include <cmath>

#include "simd.h"

#define ALWAYS_INLINE __attribute__((always_inline))

// sixteen lanes are many instructions where no register holds them: a call costs little then, and compiling far less
#if defined(__AVX512F__)
#define LANES_INLINE ALWAYS_INLINE
constexpr bool LANES_ARE_ONE_REGISTER = true;
#else
#define LANES_INLINE __attribute__((noinline))
constexpr bool LANES_ARE_ONE_REGISTER = false;
#endif

namespace {

// ---- a row, sixteen columns at a time

struct Whole {
    index_t at;
};
struct Part {  // the last columns, fewer than sixteen
    index_t at;
    int count;
};

template <class Body>
INLINE void for_columns(index_t columns, const Body& body) {
    index_t at = 0;
    for (; at + LANES <= columns; at += LANES) body(Whole{at});
    if (at < columns) body(Part{at, (int)(columns - at)});
}

// body(what was found so far, columns) -> the same with these columns. By value, so that it stays in registers; four at
// a time, so that none waits for the one before it.
template <class Found, class Body>
INLINE Found fold_columns(index_t columns, const Body& body) {
    Found a{}, b{}, c{}, d{};
    index_t at = 0;
    for (; LANES_ARE_ONE_REGISTER && at + 4 * LANES <= columns; at += 4 * LANES) {
        a = body(a, Whole{at});
        b = body(b, Whole{at + LANES});
        c = body(c, Whole{at + 2 * LANES});
        d = body(d, Whole{at + 3 * LANES});
    }
    for (; at + LANES <= columns; at += LANES) a = body(a, Whole{at});
    if (at < columns) b = body(b, Part{at, (int)(columns - at)});
    return (a + b) + (c + d);
}

template <class T>
INLINE f32x16 load(const T* row, Whole c) {
    return load(row + c.at);
}
template <class T>
LANES_INLINE inline f32x16 load(const T* row, Part c) {
    return load_first(row + c.at, c.count);
}
template <class T>
LANES_INLINE inline void store(T* row, Whole c, f32x16 v) {
    store(row + c.at, v);
}
template <class T>
LANES_INLINE inline void store(T* row, Part c, f32x16 v) {
    store_first(row + c.at, v, c.count);
}
// asks for the same columns `distance` numbers further on, which are read (written) soon; past the end nothing happens
template <class T, class C>
INLINE void will_read(const T* row, C c, index_t distance) {
    __builtin_prefetch((const void*)((std::uintptr_t)(row + c.at) + distance * sizeof(T)));
}
template <class T, class C>
INLINE void will_write(const T* row, C c, index_t distance) {
    __builtin_prefetch((const void*)((std::uintptr_t)(row + c.at) + distance * sizeof(T)), 1);
}

// 0 past the last column
INLINE f32x16 only(Whole, f32x16 v) { return v; }
INLINE f32x16 only(Part c, f32x16 v) { return select(lane_numbers() < c.count, v, splat(0.0f)); }

// what a number is once it lies in memory
INLINE f32x16 as_stored(const float*, f32x16 v) { return v; }
INLINE f32x16 as_stored(const bf16*, f32x16 v) { return widen(narrow(v)); }

// body(number of the type)
template <class Body>
void by_type(index_t is_bf16, const Body& body) {
    if (is_bf16)
        body(bf16{});
    else
        body(float{});
}

// ---- normalisation

struct Norm {
    bool layer;  // subtracts the mean; else the root mean square alone
    float eps;
};

struct RowStatistics {
    float mean, inverse;  // 1 / standard deviation
};

// two sums over a row
struct Sums {
    f32x16 first, second;
};
INLINE Sums operator+(Sums a, Sums b) { return {a.first + b.first, a.second + b.second}; }

// of a row's numbers and of their squares, which are formed in passing
INLINE Sums with(Sums sums, f32x16 v) { return {sums.first + v, fma(v, v, sums.second)}; }

template <class T>
INLINE RowStatistics statistics(const T* row, index_t columns, Norm norm, Sums sums) {
    float mean = 0.0f, square = sum_of(sums.second);
    if (norm.layer) {
        mean = sum_of(sums.first) / (float)columns;
        // a second pass: the difference of two large sums would be inexact
        square = sum_of(fold_columns<f32x16>(columns, [&](f32x16 squares, auto c) ALWAYS_INLINE {
            f32x16 v = only(c, load(row, c) - mean);
            return fma(v, v, squares);
        }));
    }
    return {mean, 1.0f / std::sqrt(square / (float)columns + norm.eps)};
}

}  // namespace
