// Philox4x32-7 of sixteen counters at a time, word for word what kernels/philox.py computes.
#pragma once

#include <cstdint>

#include "simd.h"

namespace {

// the two halves of v * factor in every lane
INLINE void multiply_wide(u32x16 v, std::uint32_t factor, u32x16& high, u32x16& low) {
#if defined(__AVX512F__)
    // products of the even lanes are 64 bits wide in place; those of the odd lanes come down for it
    const __m512i m = _mm512_set1_epi32((int)factor);
    __m512 even = (__m512)_mm512_mul_epu32((__m512i)v, m);
    __m512 odd = (__m512)_mm512_mul_epu32((__m512i)_mm512_movehdup_ps((__m512)v), m);
    high = (u32x16)_mm512_mask_movehdup_ps(odd, 0x5555, even);
    low = (u32x16)_mm512_mask_moveldup_ps(even, 0xaaaa, odd);
#elif defined(__AVX2__)
    const __m256i m = _mm256_set1_epi32((int)factor);
    __m256i halves[2], highs[2], lows[2];
    std::memcpy(halves, &v, sizeof v);
    for (int i = 0; i < 2; ++i) {
        __m256i even = _mm256_mul_epu32(halves[i], m);
        __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(halves[i], 32), m);
        highs[i] = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
        lows[i] = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
    }
    std::memcpy(&high, highs, sizeof high);
    std::memcpy(&low, lows, sizeof low);
#else
    typedef std::uint64_t u64x16 __attribute__((vector_size(128)));
    u64x16 product = __builtin_convertvector(v, u64x16) * (std::uint64_t)factor;
    high = __builtin_convertvector(product >> 32, u32x16);
    low = __builtin_convertvector(product, u32x16);
#endif
}

// in: the four words of each lane's counter; out: the four words that it makes under the seed
INLINE void philox(std::uint64_t seed, u32x16 (&c)[4]) {
    constexpr int rounds = 7;
    std::uint32_t key_a = (std::uint32_t)seed, key_b = (std::uint32_t)(seed >> 32);
    for (int round = 0; round < rounds; ++round) {
        u32x16 high_a, low_a, high_b, low_b;
        multiply_wide(c[0], 0xD2511F53u, high_a, low_a);
        multiply_wide(c[2], 0xCD9E8D57u, high_b, low_b);
        c[0] = high_b ^ c[1] ^ key_a;
        c[2] = high_a ^ c[3] ^ key_b;
        c[1] = low_b;
        c[3] = low_a;
        key_a += 0x9E3779B9u;
        key_b += 0xBB67AE85u;
    }
}

}  // namespace
