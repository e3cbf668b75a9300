// What forward and backward of attention share: the call, visibility, dropout, relative terms.
//
// Scores are held with a key a row and a query a lane: S^T = K Q^T. So all of softmax is vertical (no sum across
// lanes), a query's limit is a lane's number, and the weights are born in the layout that the next product reads.
#pragma once

#include "philox.h"
#include "product.h"
#include "threads.h"

namespace {

constexpr index_t BLOCK = 32;  // keys and queries of a block

struct Strided {
    const void* data;
    index_t row, head;  // numbers from one to the next
};

struct Attention {
    Strided q, k, v, q_rel, k_rel;                // (rows, heads, head_dim); no table: null
    const std::int32_t *cu_q, *cu_k;              // (num_seqs + 1)
    const std::int32_t* prefix;                   // (num_seqs)
    const std::int32_t* positions;                // (total_q): a query's place among its keys; null: the last ones
    const std::uint16_t *buckets, *buckets_back;  // of distance d at [d + span], of -d at [d + span]
    index_t span, table_rows;
    index_t num_seqs, total_q, total_k, heads, kv_heads, head_dim;
    float scale;
    bool drops;
    std::uint64_t seed;
    std::uint32_t threshold;
    float keep_scale;

    bool relative() const { return q_rel.data != nullptr || k_rel.data != nullptr; }
};

// one sequence and its rows
struct Sequence {
    index_t first_q, len_q, first_k, len_k, padded_q, padded_k;
    std::int32_t prefix;

    Sequence(const Attention& call, index_t s)
        : first_q(call.cu_q[s]),
          len_q(call.cu_q[s + 1] - call.cu_q[s]),
          first_k(call.cu_k[s]),
          len_k(call.cu_k[s + 1] - call.cu_k[s]),
          padded_q(round_up(len_q, BLOCK)),
          padded_k(round_up(len_k, BLOCK)),
          prefix(call.prefix[s]) {}
};

// sizes in words of one head's matrices
template <class E>
struct Sizes {
    index_t depth, depth_words;  // head_dim, padded
    index_t table, table_words;  // rows of a relative table, padded

    explicit Sizes(const Attention& call)
        : depth(round_up(call.head_dim, 16 * E::PER_WORD)),
          depth_words(depth / E::PER_WORD),
          table(call.relative() ? round_up(call.table_rows, 32) : 0),
          table_words(table / E::PER_WORD) {}
};

template <class In>
const In* start_of(const Strided& x, index_t row, index_t head) {
    return (const In*)x.data + row * x.row + head * x.head;
}

// ---- visibility: query i sees the keys [0, limits[i]), which never decrease; padding repeats the last query

INLINE void place_queries(const Attention& call, const Sequence& seq, std::int32_t* places, std::int32_t* limits,
                          std::uint32_t* dropout_rows) {
    const index_t shift = seq.len_k - seq.len_q;
    for (index_t i = 0; i < seq.padded_q; ++i) {
        index_t own = i < seq.len_q ? i : seq.len_q - 1;
        index_t place = call.positions ? call.positions[seq.first_q + own] : own + shift;
        index_t limit = place + 1 > seq.prefix ? place + 1 : seq.prefix;
        places[i] = (std::int32_t)place;
        limits[i] = (std::int32_t)(limit < 0 ? 0 : limit > seq.len_k ? seq.len_k : limit);
        dropout_rows[i] = (std::uint32_t)(call.positions ? seq.first_k + place : seq.first_q + own);
    }
}

// ---- weights: exp((product - largest) * scale), scale above 0: the largest product's is 1 however large it is, where
// a difference of scores, rounded apart, may be any number

template <class E>
class Exponent;

template <>
class Exponent<Float> {
  public:
    explicit Exponent(float scale) : scale_(splat(scale * LOG2E)) {}
    f32x16 weight(f32x16 product, f32x16 largest) const { return exp2((product - largest) * scale_); }
    // over the sum of a lane's weights, of which the factor is made
    static float factor(float sum) { return 1.0f / sum; }
    f32x16 probability(f32x16 product, f32x16 largest, f32x16 factor) const {
        return weight(product, largest) * factor;
    }

  private:
    f32x16 scale_;
};

// what is rounded to 8 bits needs no more (the polynomial's error is 2.9e-6)
template <>
class Exponent<Bf16> {
  public:
    explicit Exponent(float scale) : scale_(splat(scale * LOG2E)) {}
    f32x16 weight(f32x16 product, f32x16 largest) const { return exp2_coarse((product - largest) * scale_); }
    static float factor(float sum) { return log_of(sum) * LOG2E; }
    f32x16 probability(f32x16 product, f32x16 largest, f32x16 factor) const {
        return exp2_coarse(fma(product - largest, scale_, -factor));
    }

  private:
    f32x16 scale_;
};

// a matrix with a query a column (up to 32 of them), times each lane's factor, as rows of a result
template <class In>
void write_rows(const float* columns, index_t ld, index_t head_dim, const f32x16 (&factor)[2], index_t count, In* to,
                index_t stride) {
    for (int half = 0; half < 2 && half * LANES < count; ++half)
        for (index_t d = 0; d < head_dim; d += LANES) {
            u32x16 block[16];
            for (int i = 0; i < 16; ++i)
                block[i] = (u32x16)(load(columns + (d + i) * ld + half * LANES) * factor[half]);
            transpose(block);
            index_t rows = count - half * LANES < LANES ? count - half * LANES : LANES;
            int n = (int)(head_dim - d < LANES ? head_dim - d : LANES);
            for (index_t i = 0; i < rows; ++i) store_first(to + (half * LANES + i) * stride + d, (f32x16)block[i], n);
        }
}

// ---- dropout: kernels/philox.py, 16 queries at a time, whose four words are four neighbouring keys

// kept[n]: whether key 4 * group + n of each of 16 query rows is kept, as a mask of all ones or zeros
INLINE void keep_masks(const Attention& call, index_t group, const std::uint32_t* rows, index_t head,
                       i32x16 (&kept)[4]) {
    u32x16 words[4] = {u32x16{} + (std::uint32_t)group, load_as<u32x16>(rows), u32x16{} + (std::uint32_t)head,
                       u32x16{}};
    philox(call.seed, words);
    for (int n = 0; n < 4; ++n) kept[n] = (i32x16)(words[n] >= call.threshold);
}

// ---- relative terms: a row of products with the table is spread to where its buckets are

template <class E>
struct TermOf {
    using type = float;
};
template <>
struct TermOf<Bf16> {
    using type = bf16;
};

// table[index[l]] of 16 lanes
INLINE f32x16 spread(const float* table, index_t table_rows, const std::uint16_t* index) {
#if defined(__AVX512F__)
    __m512i places = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)index));
    if (table_rows == 64) {
        __m512 near = _mm512_permutex2var_ps(_mm512_loadu_ps(table), places, _mm512_loadu_ps(table + 16));
        __m512 far = _mm512_permutex2var_ps(_mm512_loadu_ps(table + 32), places, _mm512_loadu_ps(table + 48));
        return (f32x16)_mm512_mask_blend_ps(_mm512_test_epi32_mask(places, _mm512_set1_epi32(32)), near, far);
    }
    return (f32x16)_mm512_i32gather_ps(places, table, 4);
#else
    (void)table_rows;
    f32x16 v;
    for (int l = 0; l < LANES; ++l) v[l] = table[index[l]];
    return v;
#endif
}

// the same of 32 lanes of bfloat16, as their bits
INLINE u16x32 spread(const bf16* table, index_t table_rows, const std::uint16_t* index) {
#if defined(__AVX512BW__)
    if (table_rows == 64) {
        __m512i places = _mm512_loadu_si512(index);
        return (u16x32)_mm512_permutex2var_epi16(_mm512_loadu_si512(table), places, _mm512_loadu_si512(table + 32));
    }
#endif
    (void)table_rows;
    u16x32 v;
    for (int l = 0; l < 32; ++l) v[l] = table[index[l]];
    return v;
}

INLINE f32x16 half_of(u16x32 v, int which) {
    u16x16 half;
    std::memcpy(&half, (const char*)&v + 32 * which, 32);
    return widen(half);
}

// floats to the words of one element type: rows, or pairs of rows
template <class E>
void narrow_rows(const float* from, index_t from_ld, index_t rows, index_t columns, word* to, index_t ld) {
    for (index_t r = 0; r < rows; ++r)
        for (index_t c = 0; c < columns; c += 2 * LANES)
            store_row<E>(to + r * ld + c / E::PER_WORD, load(from + r * from_ld + c),
                         load(from + r * from_ld + c + LANES));
}
template <class E>
void narrow_pairs(const float* from, index_t from_ld, index_t rows, index_t columns, word* to, index_t ld) {
    for (index_t r = 0; r < rows; r += 2)
        for (index_t c = 0; c < columns; c += LANES)
            store_row_pair<E>(to + r / E::PER_WORD * ld + c, ld, load(from + r * from_ld + c),
                              load(from + (r + 1) * from_ld + c));
}

// the products of rows with a table (all packed), as rows of terms
template <class E>
void relative_terms(const Sizes<E>& size, const word* rows, index_t count, const word* table_columns, float* space,
                    word* terms) {
    for (index_t r = 0; r < count; r += BLOCK) {
        product<E>(BLOCK, size.table, size.depth_words, rows + r * size.depth_words, size.depth_words, table_columns,
                   size.table, space, size.table, false);
        narrow_rows<E>(space, size.table, BLOCK, size.table, terms + r * size.table_words, size.table_words);
    }
}

// adds both terms to the scores of 32 keys (rows, `ld` apart) and 32 queries (lanes); a term that is null is not there
template <class E>
void add_relative_terms(const Attention& call, const Sizes<E>& size, const word* query_terms, const word* key_terms,
                        const std::int32_t* places, index_t first_key, float* scores, index_t ld) {
    using Term = typename TermOf<E>::type;
    if (key_terms != nullptr) {  // k_j . q_rel[bucket(i - j)]: a key's row, its index runs along the lanes
        for (index_t j = 0; j < BLOCK; ++j) {
            const Term* row = (const Term*)(key_terms + j * size.table_words);
            std::uint16_t gathered[BLOCK];
            const std::uint16_t* index = call.buckets + (places[0] - (first_key + j)) + call.span;
            if (call.positions != nullptr) {
                for (index_t i = 0; i < BLOCK; ++i) gathered[i] = call.buckets[places[i] - (first_key + j) + call.span];
                index = gathered;
            }
            float* out = scores + j * ld;
            if constexpr (E::PER_WORD == 2) {
                u16x32 bits = spread(row, size.table, index);
                store(out, load(out) + half_of(bits, 0));
                store(out + LANES, load(out + LANES) + half_of(bits, 1));
            } else {
                for (int half = 0; half < 2; ++half)
                    store(out + half * LANES, load(out + half * LANES) + spread(row, size.table, index + half * LANES));
            }
        }
    }
    if (query_terms != nullptr) {  // q_i . k_rel[bucket(i - j)]: a query's row runs along the keys, so it is turned
        for (index_t i = 0; i < BLOCK; i += LANES) {
            for (index_t j = 0; j < BLOCK; j += 16 * E::PER_WORD) {
                u32x16 turned[16];
                for (int l = 0; l < LANES; ++l) {
                    const Term* row = (const Term*)(query_terms + (i + l) * size.table_words);
                    const std::uint16_t* index = call.buckets_back + (first_key + j - places[i + l]) + call.span;
                    turned[l] = (u32x16)spread(row, size.table, index);
                }
                transpose(turned);
                for (int n = 0; n < 16; ++n) {
                    float* out = scores + (j + n * E::PER_WORD) * ld + i;
                    if constexpr (E::PER_WORD == 2) {
                        store(out, load(out) + lower_half(turned[n]));
                        store(out + ld, load(out + ld) + upper_half(turned[n]));
                    } else {
                        store(out, load(out) + (f32x16)turned[n]);
                    }
                }
            }
        }
    }
}

// a table of one head, as the right side of the products with its rows: depth_words x table words
template <class E, class In>
void pack_table(const Attention& call, const Sizes<E>& size, const Strided& table, index_t head, word* space,
                word* columns) {
    pack_rows<E>(start_of<In>(table, 0, head), table.row, call.table_rows, call.head_dim, space, size.table,
                 size.depth_words);
    transpose_words(space, size.depth_words, size.table, size.depth_words, columns, size.table);
}

}  // namespace
