// A thin vector type: 16 floats, whatever the machine. GCC lowers it to one AVX-512 register, two of AVX2, four of SSE
// or NEON. Only what the compiler cannot find by itself is written with intrinsics.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 says it of its own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

// every source is compiled once for each instruction set; an exported name ends in it
#define ANTLM_JOIN2(a, b) a##_##b
#define ANTLM_JOIN(a, b) ANTLM_JOIN2(a, b)
#define EXPORT(name) extern "C" __attribute__((visibility("default"))) void ANTLM_JOIN(antlm_##name, ANTLM_ISA)
#define INLINE static inline __attribute__((always_inline))

namespace {

using index_t = std::int64_t;
using bf16 = std::uint16_t;  // bits of a bfloat16

constexpr int LANES = 16;

typedef float f32x16 __attribute__((vector_size(64)));
typedef std::int32_t i32x16 __attribute__((vector_size(64)));
typedef std::uint32_t u32x16 __attribute__((vector_size(64)));
typedef std::uint16_t u16x16 __attribute__((vector_size(32)));
typedef std::uint16_t u16x32 __attribute__((vector_size(64)));

INLINE f32x16 splat(float x) { return f32x16{} + x; }
INLINE i32x16 splat_int(std::int32_t x) { return i32x16{} + x; }

INLINE i32x16 lane_numbers() { return i32x16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

template <class V, class T>
INLINE V load_as(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <class V, class T>
INLINE void store_as(T* p, V v) {
    std::memcpy(p, &v, sizeof v);
}

// the bits of a bfloat16 are the upper half of a float's
INLINE f32x16 widen(u16x16 v) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)v), 16);  // g++ 12 makes two halves of it
#else
    return (f32x16)(__builtin_convertvector(v, u32x16) << 16);
#endif
}

// round to nearest even; NaN stays NaN
INLINE u16x16 narrow(f32x16 v) {
#if defined(__AVX512BF16__)
    return (u16x16)_mm512_cvtneps_pbh((__m512)v);
#else
    u32x16 bits = (u32x16)v;
    u32x16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    u32x16 quiet = (bits >> 16) | 0x40u;
    u32x16 is_nan = (u32x16)(v != v);
    return __builtin_convertvector((rounded & ~is_nan) | (quiet & is_nan), u16x16);
#endif
}

// memory of floats or bfloat16s, 16 at a time or the first n of them (the rest are 0)
INLINE f32x16 load(const float* p) { return load_as<f32x16>(p); }
INLINE f32x16 load(const bf16* p) { return widen(load_as<u16x16>(p)); }
INLINE void store(float* p, f32x16 v) { store_as(p, v); }
INLINE void store(bf16* p, f32x16 v) { store_as(p, narrow(v)); }

INLINE f32x16 load_first(const float* p, int n) {
    if (n == LANES) return load(p);
#if defined(__AVX512F__)
    return (f32x16)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
    f32x16 v{};
    std::memcpy(&v, p, n * sizeof(float));
    return v;
#endif
}
INLINE f32x16 load_first(const bf16* p, int n) {
    if (n == LANES) return load(p);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    return widen((u16x16)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p));
#else
    u16x16 v{};
    std::memcpy(&v, p, n * sizeof(bf16));
    return widen(v);
#endif
}
INLINE void store_first(float* p, f32x16 v, int n) {
    if (n == LANES) return store(p, v);
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#else
    std::memcpy(p, &v, n * sizeof(float));
#endif
}
INLINE void store_first(bf16* p, f32x16 v, int n) {
    if (n == LANES) return store(p, v);
    u16x16 narrowed = narrow(v);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)narrowed);
#else
    std::memcpy(p, &narrowed, n * sizeof(bf16));
#endif
}

INLINE float widen_one(bf16 x) {
    std::uint32_t bits = (std::uint32_t)x << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
INLINE float read(const float* p) { return *p; }
INLINE float read(const bf16* p) { return widen_one(*p); }
INLINE void write(float* p, float x) { *p = x; }
INLINE void write(bf16* p, float x) {
    u16x16 v = narrow(splat(x));
    *p = v[0];
}

INLINE f32x16 select(i32x16 condition, f32x16 yes, f32x16 no) { return condition ? yes : no; }

// a * b + c with one rounding (-ffp-contract=fast)
INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return a * b + c; }

INLINE f32x16 maximum(f32x16 a, f32x16 b) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return select(a > b, a, b);
#endif
}
INLINE f32x16 minimum(f32x16 a, f32x16 b) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_min_ps((__m512)a, (__m512)b);
#else
    return select(a < b, a, b);
#endif
}

INLINE float sum_of(f32x16 v) {
    typedef float f32x8 __attribute__((vector_size(32)));
    typedef float f32x4 __attribute__((vector_size(16)));
    f32x8 low, high;
    std::memcpy(&low, &v, 32);
    std::memcpy(&high, (const char*)&v + 32, 32);
    low += high;
    f32x4 a, b;
    std::memcpy(&a, &low, 16);
    std::memcpy(&b, (const char*)&low + 16, 16);
    a += b;
    return (a[0] + a[2]) + (a[1] + a[3]);
}
INLINE float largest_of(f32x16 v) {
    float largest = v[0];
    for (int i = 1; i < LANES; ++i) largest = v[i] > largest ? v[i] : largest;
    return largest;
}

INLINE f32x16 round_to_whole(f32x16 x) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    // adding 1.5 * 2^23 leaves no bits for a fraction; |x| is below 2^22 here
    const f32x16 magic = splat(12582912.0f);
    f32x16 shifted = x + magic;
    asm volatile("" : "+m"(shifted));  // the compiler must not cancel the two
    return shifted - magic;
#endif
}

// the scaling of exp2: p * 2^n, 0 where x is below -126.5
INLINE f32x16 times_power_of_two(f32x16 p, f32x16 n, f32x16 x) {
#if defined(__AVX512F__)
    const __mmask16 is_there = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.5f), _CMP_NLT_UQ);
    return (f32x16)_mm512_maskz_scalef_ps(is_there, (__m512)p, (__m512)n);
#else
    const i32x16 exponent = __builtin_convertvector(n, i32x16);
    f32x16 result = (f32x16)((u32x16)p + ((u32x16)exponent << 23));  // of a NaN any number
    result = select(exponent > 127, splat(__builtin_inff()), result);
    result = select(exponent < -126, f32x16{}, result);
    return select(x != x, x, result);
#endif
}

INLINE f32x16 clamped_exponent(f32x16 x) {
#if defined(__AVX512F__)
    return minimum(splat(200.0f), x);  // a NaN in the second place is kept
#else
    x = select(x < -150.0f, splat(-150.0f), x);
    return select(x > 150.0f, splat(150.0f), x);
#endif
}

// 2^x: relative error below 3e-7 in [-126, 127], 0 below -126.5 (also for -inf), +inf above 128; NaN stays NaN.
// 2^f for |f| <= 1/2 is a polynomial of degree 5 (fitted for the least relative error: 9.2e-8 before rounding).
INLINE f32x16 exp2(f32x16 x) {
    x = clamped_exponent(x);
    const f32x16 n = round_to_whole(x), f = x - n;
    f32x16 p = splat(1.3264726899e-3f);
    p = fma(p, f, splat(9.6715126606e-3f));
    p = fma(p, f, splat(5.5507337442e-2f));
    p = fma(p, f, splat(2.4022242085e-1f));
    p = fma(p, f, splat(6.9314697760e-1f));
    p = fma(p, f, splat(1.0f));
    return times_power_of_two(p, n, x);
}
// the same with a polynomial of degree 4 (relative error 2.9e-6)
INLINE f32x16 exp2_coarse(f32x16 x) {
    x = clamped_exponent(x);
    const f32x16 n = round_to_whole(x), f = x - n;
    f32x16 p = splat(9.5828529938e-3f);
    p = fma(p, f, splat(5.5906424742e-2f));
    p = fma(p, f, splat(2.4024098613e-1f));
    p = fma(p, f, splat(6.9312419339e-1f));
    p = fma(p, f, splat(1.0f));
    return times_power_of_two(p, n, x);
}
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;
INLINE f32x16 exp(f32x16 x) { return exp2(x * LOG2E); }

// the natural logarithm is taken of few numbers: libm's
INLINE float log_of(float x) { return __builtin_logf(x); }

// rows of a 16 x 16 matrix of 32-bit words become its columns
INLINE void transpose(u32x16 (&r)[16]) {
#if defined(__AVX512F__)
    __m512i t[16], *x = (__m512i*)r;
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
    }
    __m512i s[16];
    for (int i = 0; i < 4; ++i) {
        s[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        s[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        s[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        s[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(s[i], s[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(s[i], s[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(s[i + 8], s[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(s[i + 8], s[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
        x[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        x[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
#else
    std::uint32_t from[16][16], to[16][16];
    std::memcpy(from, r, sizeof from);
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 16; ++j) to[j][i] = from[i][j];
    std::memcpy(r, to, sizeof to);
#endif
}

}  // namespace
