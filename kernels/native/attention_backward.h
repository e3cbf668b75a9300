// Softmax attention, backward: dV = P^T dO, dS = P (dO V^T - delta) scale, dK = dS^T Q, dQ = dS K, tables alike.
//
// 32 keys at a time over all queries that see them: a strip of P^T and dS^T, whose products with dO and Q are those
// keys' gradients, and a part of dQ^T = K^T dS^T. Scores are formed again, weights with the forward's sums. Each item
// (some sequences, one key head) writes what no other writes, in an order that does not depend on threads.
#pragma once

#include "attention.h"

namespace {

struct Backward {
    Strided d_out;
    const void* out;  // (total_q, heads, head_dim)
    const float* sums;  // (2, heads, total_q): the largest product and the sum of weights; 0: nothing is seen
    void *d_q, *d_k, *d_v;
    float *d_q_rel, *d_k_rel;  // (groups, heads, table_rows, head_dim): partial sums over a group's sequences
    index_t groups;
};

constexpr index_t KEYS_OF_DQ = 4 * BLOCK;  // keys whose parts of dQ are summed in one product
constexpr index_t QUERIES_OF_SCORES = 2 * BLOCK;
constexpr index_t MARGIN = 32;  // zeros beside a strip, so that its diagonals can be read as rows

template <class E>
struct BackwardMemory {
    word *space, *k_rows, *k_pairs, *k_columns, *v_rows;
    word *q_rows, *q_columns, *q_pairs, *d_out_rows, *d_out_columns, *d_out_pairs;
    word *weights, *d_scores, *d_score_pairs;
    float *scores_block, *d_weights_block, *d_q_columns, *d_k, *d_v, *largest, *factors, *deltas;
    std::int32_t *places, *limits;
    std::uint32_t* dropout_rows;
    // relative terms
    word *k_rel_columns, *q_rel_columns, *k_rel_turned, *q_rel_pairs, *key_terms, *query_terms, *narrow, *turned;
    float *terms_space, *strip, *d_query_terms, *d_key_terms, *d_k_rel, *d_q_rel;
    index_t strip_pitch, query_pitch, query_word_pitch, key_pitch;

    void set_pitches(index_t padded_q, index_t padded_k) {
        strip_pitch = padded_q + 2 * MARGIN;
        query_pitch = pitch(padded_q);
        query_word_pitch = pitch(padded_q / E::PER_WORD);
        key_pitch = pitch(padded_k / E::PER_WORD);
    }

    BackwardMemory(Carver& carver, const Sizes<E>& size, index_t padded_q, index_t padded_k) {
        const index_t longest = padded_q > padded_k ? padded_q : padded_k, per_word = E::PER_WORD;
        const index_t table = size.table > 0 ? 1 : 0;
        set_pitches(padded_q, padded_k);
        space = carver.take<word>(size.table * size.depth);
        // floats: rows are their own pairs
        k_rows = carver.take<word>(padded_k * size.depth_words);
        k_pairs = per_word == 1 ? k_rows : carver.take<word>(padded_k / per_word * size.depth);
        k_columns = carver.take<word>(size.depth * key_pitch);
        v_rows = carver.take<word>(padded_k * size.depth_words);
        q_rows = carver.take<word>(padded_q * size.depth_words);
        q_columns = carver.take<word>(size.depth_words * query_pitch);
        q_pairs = per_word == 1 ? q_rows : carver.take<word>(padded_q / per_word * size.depth);
        d_out_rows = carver.take<word>(padded_q * size.depth_words);
        d_out_columns = carver.take<word>(size.depth_words * query_pitch);
        d_out_pairs = per_word == 1 ? d_out_rows : carver.take<word>(padded_q / per_word * size.depth);
        weights = carver.take<word>(BLOCK * query_word_pitch);
        d_scores = carver.take<word>(BLOCK * query_word_pitch);
        d_score_pairs = carver.take<word>(KEYS_OF_DQ / per_word * query_pitch);
        scores_block = carver.take<float>(BLOCK * QUERIES_OF_SCORES);
        d_weights_block = carver.take<float>(BLOCK * QUERIES_OF_SCORES);
        d_q_columns = carver.take<float>(size.depth * query_pitch);
        d_k = carver.take<float>(padded_k * size.depth);
        d_v = carver.take<float>(padded_k * size.depth);
        largest = carver.take<float>(padded_q);
        factors = carver.take<float>(padded_q);
        deltas = carver.take<float>(padded_q);
        places = carver.take<std::int32_t>(padded_q);
        limits = carver.take<std::int32_t>(padded_q);
        dropout_rows = carver.take<std::uint32_t>(padded_q);
        k_rel_columns = carver.take<word>(size.table * size.depth_words);
        q_rel_columns = carver.take<word>(size.table * size.depth_words);
        k_rel_turned = carver.take<word>(size.depth * size.table_words);
        q_rel_pairs = carver.take<word>(size.table_words * size.depth);
        key_terms = carver.take<word>(padded_k * size.table_words);
        query_terms = carver.take<word>(padded_q * size.table_words);
        narrow = carver.take<word>(size.table * longest);
        turned = carver.take<word>(table * longest * size.table_words);
        terms_space = carver.take<float>(BLOCK * size.table);
        strip = carver.take<float>(table * BLOCK * strip_pitch);
        d_query_terms = carver.take<float>(size.table * strip_pitch);
        d_key_terms = carver.take<float>(size.table * padded_k);
        d_k_rel = carver.take<float>(size.table * size.depth);
        d_q_rel = carver.take<float>(size.table * size.depth);
    }
};

// ---- one block of 32 keys and 32 queries

// products and d_weights (32 keys each, `ld` apart) -> the weights' and the scores' gradient's places in the strips
template <class E>
void gradient_block(const Attention& call, const BackwardMemory<E>& m, index_t head, index_t first_key, index_t q,
                    const float* products, const float* d_weights, index_t ld, bool masked) {
    const Exponent<E> exponent(call.scale);
    const index_t word_pitch = m.query_word_pitch, pairs_row = first_key % KEYS_OF_DQ;
    for (index_t j = 0; j < BLOCK; j += 4) {
        f32x16 weight[4][2], d_score[4][2];
        for (int half = 0; half < 2; ++half) {
            const index_t lanes = q + half * LANES;
            const f32x16 largest = load(m.largest + lanes), factor = load(m.factors + lanes), delta = load(m.deltas + lanes);
            i32x16 kept[4];
            if (call.drops) keep_masks(call, (first_key + j) / 4, m.dropout_rows + lanes, head, kept);
            for (int n = 0; n < 4; ++n) {
                const index_t at = (j + n) * ld + half * LANES;
                f32x16 w = exponent.probability(load(products + at), largest, factor);
                f32x16 d_w = load(d_weights + at);
                if (masked) {
                    i32x16 sees = load_as<i32x16>(m.limits + lanes) > splat_int((std::int32_t)(first_key + j + n));
                    w = select(sees, w, f32x16{});
                }
                weight[n][half] = w;
                if (call.drops) {
                    weight[n][half] = select(kept[n], w * call.keep_scale, f32x16{});
                    d_w = select(kept[n], d_w * call.keep_scale, f32x16{});
                }
                d_score[n][half] = w * fma(d_w, splat(call.scale), -delta);
            }
        }
        for (int n = 0; n < 4; ++n) {
            const index_t at = (j + n) * word_pitch + q / E::PER_WORD;
            store_row<E>(m.weights + at, weight[n][0], weight[n][1]);
            store_row<E>(m.d_scores + at, d_score[n][0], d_score[n][1]);
        }
        for (int n = 0; n < 4; n += 2)
            for (int half = 0; half < 2; ++half)
                store_row_pair<E>(
                    m.d_score_pairs + (pairs_row + j + n) / E::PER_WORD * m.query_pitch + q + half * LANES,
                    m.query_pitch, d_score[n][half], d_score[n + 1][half]);
        if (call.relative())
            for (int n = 0; n < 4; ++n)
                for (int half = 0; half < 2; ++half)
                    store(m.strip + (j + n) * m.strip_pitch + MARGIN + q + half * LANES, d_score[n][half]);
    }
}

// ---- relative terms: the gradient of a term is the sum of the scores' over the pairs of one bucket

INLINE void add_to(float* at, f32x16 v) { store(at, load(at) + v); }

// along a diagonal the bucket is one: 16 x 16 of the strip, read askew and turned, have a diagonal a row
template <class E>
void add_diagonals(const Attention& call, const BackwardMemory<E>& m, index_t shift, index_t first_key, index_t first_q,
                   index_t padded_q, index_t padded_k) {
    for (index_t part = 0; part < BLOCK; part += 16) {
        const index_t key = first_key + part;
        index_t current = -1;
        f32x16 sum{};
        for (index_t i = first_q - 15; i < padded_q; i += 16) {
            u32x16 block[16];
            for (int t = 0; t < 16; ++t)  // key key + t: queries i + t ..., at distances from i + shift - key on
                block[t] = load_as<u32x16>(m.strip + (part + t) * m.strip_pitch + MARGIN + i + t);
            transpose(block);
            for (int l = 0; l < 16; ++l) {
                const index_t bucket = call.buckets[i + l + shift - key + call.span];
                if (bucket != current) {
                    if (current >= 0) add_to(m.d_key_terms + current * padded_k + key, sum);
                    current = bucket;
                    sum = f32x16{};
                }
                sum += (f32x16)block[l];
                add_to(m.d_query_terms + bucket * m.strip_pitch + MARGIN + i + l, (f32x16)block[l]);
            }
        }
        if (current >= 0) add_to(m.d_key_terms + current * padded_k + key, sum);
    }
}

// queries of some places alone: one pair at a time
template <class E>
void add_scattered(const Attention& call, const BackwardMemory<E>& m, index_t first_key, index_t first_q, index_t len_q,
                   index_t padded_k) {
    for (index_t j = 0; j < BLOCK; ++j)
        for (index_t i = first_q; i < len_q; ++i) {
            const index_t bucket = call.buckets[m.places[i] - (first_key + j) + call.span];
            const float d_score = m.strip[j * m.strip_pitch + MARGIN + i];
            m.d_query_terms[bucket * m.strip_pitch + MARGIN + i] += d_score;
            m.d_key_terms[bucket * padded_k + first_key + j] += d_score;
        }
}

// what the terms' gradients give to queries, keys and tables
template <class E>
void finish_terms(const Attention& call, const Sizes<E>& size, const BackwardMemory<E>& m, const Sequence& seq) {
    const index_t query_words = seq.padded_q / E::PER_WORD, key_words = seq.padded_k / E::PER_WORD;
    const float* d_query_terms = m.d_query_terms + MARGIN;
    if (call.k_rel.data != nullptr && seq.padded_q > 0) {
        narrow_rows<E>(d_query_terms, m.strip_pitch, size.table, seq.padded_q, m.narrow, query_words);
        product<E>(size.table, size.depth, query_words, m.narrow, query_words, m.q_pairs, size.depth, m.d_k_rel,
                   size.depth, true);
        narrow_pairs<E>(d_query_terms, m.strip_pitch, size.table, seq.padded_q, m.narrow, seq.padded_q);
        product<E>(size.depth, seq.padded_q, size.table_words, m.k_rel_turned, size.table_words, m.narrow, seq.padded_q,
                   m.d_q_columns, m.query_pitch, true);
    }
    if (call.q_rel.data != nullptr && seq.padded_k > 0) {
        narrow_rows<E>(m.d_key_terms, seq.padded_k, size.table, seq.padded_k, m.narrow, key_words);
        product<E>(size.table, size.depth, key_words, m.narrow, key_words, m.k_pairs, size.depth, m.d_q_rel, size.depth,
                   true);
        narrow_pairs<E>(m.d_key_terms, seq.padded_k, size.table, seq.padded_k, m.narrow, seq.padded_k);
        transpose_words(m.narrow, seq.padded_k, size.table_words, seq.padded_k, m.turned, size.table_words);
        product<E>(seq.padded_k, size.depth, size.table_words, m.turned, size.table_words, m.q_rel_pairs, size.depth,
                   m.d_k, size.depth, true);
    }
}

// ---- one head of one sequence

template <class E, class In>
void prepare_queries(const Attention& call, const Backward& back, const Sizes<E>& size, const BackwardMemory<E>& m,
                     const Sequence& seq, index_t head) {
    const In* q = start_of<In>(call.q, seq.first_q, head);
    const In* d_out = start_of<In>(back.d_out, seq.first_q, head);
    const index_t out_row = call.heads * call.head_dim;
    const In* out = (const In*)back.out + seq.first_q * out_row + head * call.head_dim;
    pack_rows<E>(q, call.q.row, seq.len_q, call.head_dim, m.q_rows, seq.padded_q, size.depth_words);
    transpose_words(m.q_rows, size.depth_words, seq.padded_q, size.depth_words, m.q_columns, m.query_pitch);
    pairs_of_rows<E>(m.q_rows, seq.padded_q, size.depth, m.q_pairs);
    pack_rows<E>(d_out, back.d_out.row, seq.len_q, call.head_dim, m.d_out_rows, seq.padded_q, size.depth_words);
    transpose_words(m.d_out_rows, size.depth_words, seq.padded_q, size.depth_words, m.d_out_columns, m.query_pitch);
    pairs_of_rows<E>(m.d_out_rows, seq.padded_q, size.depth, m.d_out_pairs);
    for (index_t i = 0; i < seq.padded_q; ++i) {
        m.largest[i] = __builtin_inff();  // padding, and rows that see nothing: weights of 0
        m.factors[i] = m.deltas[i] = 0.0f;
        if (i >= seq.len_q) continue;
        const float largest = back.sums[head * call.total_q + seq.first_q + i];
        const float sum = back.sums[(call.heads + head) * call.total_q + seq.first_q + i];
        if (sum != 0.0f) {
            m.largest[i] = largest;
            m.factors[i] = Exponent<E>::factor(sum);
        }
        f32x16 products{};
        for (index_t d = 0; d < call.head_dim; d += LANES) {
            int n = (int)(call.head_dim - d < LANES ? call.head_dim - d : LANES);
            products += load_first(d_out + i * back.d_out.row + d, n) * load_first(out + i * out_row + d, n);
        }
        m.deltas[i] = sum_of(products) * call.scale;
    }
}

// left of the first query that sees the block, the strips still hold an earlier block's numbers
template <class E>
void clear_left(const Attention& call, const BackwardMemory<E>& m, index_t key, index_t first_of_dq, index_t begin) {
    for (index_t row = 0; row < BLOCK / E::PER_WORD; ++row)
        clear(m.d_score_pairs + (key % KEYS_OF_DQ / E::PER_WORD + row) * m.query_pitch + first_of_dq,
              (begin - first_of_dq) * sizeof(word));
    if (call.relative())
        for (index_t j = 0; j < BLOCK; ++j) clear(m.strip + j * m.strip_pitch + begin, MARGIN * sizeof(float));
}

template <class E, class In>
void backward_head(const Attention& call, const Backward& back, const Sizes<E>& size, const BackwardMemory<E>& m,
                   const Sequence& seq, index_t head) {
    const index_t shift = seq.len_k - seq.len_q;
    prepare_queries<E, In>(call, back, size, m, seq, head);
    clear(m.d_q_columns, size.depth * m.query_pitch * sizeof(float));
    if (call.relative()) {
        if (call.k_rel.data)
            relative_terms<E>(size, m.q_rows, seq.padded_q, m.k_rel_columns, m.terms_space, m.query_terms);
        if (call.q_rel.data)
            relative_terms<E>(size, m.k_rows, seq.padded_k, m.q_rel_columns, m.terms_space, m.key_terms);
        clear(m.strip, BLOCK * m.strip_pitch * sizeof(float));
        clear(m.d_query_terms, size.table * m.strip_pitch * sizeof(float));
        clear(m.d_key_terms, size.table * seq.padded_k * sizeof(float));
    }
    index_t first = 0, first_of_dq = 0;
    for (index_t key = 0; key < seq.len_k; key += BLOCK) {
        // limits never decrease: who sees the block's first key is a tail of the queries
        while (first < seq.len_q && m.limits[first] <= key) ++first;
        if (first == seq.len_q) break;  // nobody sees this key, nor any later one
        const index_t begin = first / BLOCK * BLOCK, queries = seq.padded_q - begin, begin_word = begin / E::PER_WORD;
        if (key % KEYS_OF_DQ == 0) first_of_dq = begin;
        clear_left<E>(call, m, key, first_of_dq, begin);
        for (index_t q = begin; q < seq.padded_q; q += QUERIES_OF_SCORES) {
            const index_t lanes = seq.padded_q - q < QUERIES_OF_SCORES ? BLOCK : QUERIES_OF_SCORES;
            product<E>(BLOCK, lanes, size.depth_words, m.k_rows + key * size.depth_words, size.depth_words,
                       m.q_columns + q, m.query_pitch, m.scores_block, lanes, false);
            product<E>(BLOCK, lanes, size.depth_words, m.v_rows + key * size.depth_words, size.depth_words,
                       m.d_out_columns + q, m.query_pitch, m.d_weights_block, lanes, false);
            for (index_t part = 0; part < lanes; part += BLOCK) {
                if (call.relative())
                    add_relative_terms<E>(call, size,
                                          call.k_rel.data ? m.query_terms + (q + part) * size.table_words : nullptr,
                                          call.q_rel.data ? m.key_terms + key * size.table_words : nullptr,
                                          m.places + q + part, key, m.scores_block + part, lanes);
                gradient_block<E>(call, m, head, key, q + part, m.scores_block + part, m.d_weights_block + part, lanes,
                                  m.limits[q + part] < key + BLOCK);
            }
        }
        product<E>(BLOCK, size.depth, queries / E::PER_WORD, m.weights + begin_word, m.query_word_pitch,
                   m.d_out_pairs + begin_word * size.depth, size.depth, m.d_v + key * size.depth, size.depth, true);
        product<E>(BLOCK, size.depth, queries / E::PER_WORD, m.d_scores + begin_word, m.query_word_pitch,
                   m.q_pairs + begin_word * size.depth, size.depth, m.d_k + key * size.depth, size.depth, true);
        if (call.relative()) {
            if (call.positions != nullptr)
                add_scattered<E>(call, m, key, begin, seq.len_q, seq.padded_k);
            else
                add_diagonals<E>(call, m, shift, key, begin, seq.padded_q, seq.padded_k);
        }
        const index_t next = key + BLOCK, of_dq = key / KEYS_OF_DQ * KEYS_OF_DQ;
        const bool is_last = next >= seq.len_k || m.limits[seq.len_q - 1] <= next;
        if (next % KEYS_OF_DQ == 0 || is_last)
            product<E>(size.depth, seq.padded_q - first_of_dq, (next - of_dq) / E::PER_WORD,
                       m.k_columns + of_dq / E::PER_WORD, m.key_pitch, m.d_score_pairs + first_of_dq, m.query_pitch,
                       m.d_q_columns + first_of_dq, m.query_pitch, true);
    }
    if (call.relative()) finish_terms<E>(call, size, m, seq);
    const f32x16 as_it_is[2] = {splat(1.0f), splat(1.0f)};
    const index_t row = call.heads * call.head_dim;
    In* d_q = (In*)back.d_q + seq.first_q * row + head * call.head_dim;
    for (index_t q = 0; q < seq.len_q; q += BLOCK)
        write_rows(m.d_q_columns + q, m.query_pitch, call.head_dim, as_it_is,
                   seq.len_q - q < BLOCK ? seq.len_q - q : BLOCK, d_q + q * row, row);
}

template <class In>
void write_gradient(const float* from, index_t ld, index_t rows, index_t columns, In* to, index_t stride) {
    for (index_t r = 0; r < rows; ++r)
        for (index_t c = 0; c < columns; c += LANES)
            store_first(to + r * stride + c, load(from + r * ld + c), (int)(columns - c < LANES ? columns - c : LANES));
}

template <class E, class In>
void backward_sequence(const Attention& call, const Backward& back, const Sizes<E>& size, const BackwardMemory<E>& m,
                       const Sequence& seq, index_t kv_head) {
    const index_t key_words = seq.padded_k / E::PER_WORD, group = call.heads / call.kv_heads;
    const In* k = start_of<In>(call.k, seq.first_k, kv_head);
    place_queries(call, seq, m.places, m.limits, m.dropout_rows);
    pack_rows<E>(k, call.k.row, seq.len_k, call.head_dim, m.k_rows, seq.padded_k, size.depth_words);
    pairs_of_rows<E>(m.k_rows, seq.padded_k, size.depth, m.k_pairs);
    transpose_words(m.k_pairs, size.depth, key_words, size.depth, m.k_columns, m.key_pitch);
    pack_rows<E>(start_of<In>(call.v, seq.first_k, kv_head), call.v.row, seq.len_k, call.head_dim, m.v_rows,
                 seq.padded_k, size.depth_words);
    clear(m.d_k, seq.padded_k * size.depth * sizeof(float));
    clear(m.d_v, seq.padded_k * size.depth * sizeof(float));
    for (index_t g = 0; g < group; ++g) backward_head<E, In>(call, back, size, m, seq, kv_head * group + g);
    const index_t row = call.kv_heads * call.head_dim, at = seq.first_k * row + kv_head * call.head_dim;
    write_gradient(m.d_k, size.depth, seq.len_k, call.head_dim, (In*)back.d_k + at, row);
    write_gradient(m.d_v, size.depth, seq.len_k, call.head_dim, (In*)back.d_v + at, row);
}

template <class E, class In>
void backward_item(const Attention& call, const Backward& back, index_t group, index_t kv_head) {
    const index_t first = call.num_seqs * group / back.groups, end = call.num_seqs * (group + 1) / back.groups;
    const Sizes<E> size(call);
    index_t longest_q = BLOCK, longest_k = BLOCK;
    for (index_t s = first; s < end; ++s) {
        const Sequence seq(call, s);
        if (seq.padded_q > longest_q) longest_q = seq.padded_q;
        if (seq.padded_k > longest_k) longest_k = seq.padded_k;
    }
    thread_local Scratch scratch;
    Carver count;
    BackwardMemory<E>(count, size, longest_q, longest_k);
    void* memory = scratch.bytes(count.used());
    [[maybe_unused]] const Tiles tiles;
    {
        Carver carver(memory);
        const BackwardMemory<E> m(carver, size, longest_q, longest_k);
        clear(m.d_k_rel, size.table * size.depth * sizeof(float));
        clear(m.d_q_rel, size.table * size.depth * sizeof(float));
        if (call.k_rel.data != nullptr) {
            const In* table = start_of<In>(call.k_rel, 0, kv_head);
            pack_table<E, In>(call, size, call.k_rel, kv_head, m.space, m.k_rel_columns);
            pack_pairs<E>(table, call.k_rel.row, call.table_rows, call.head_dim, m.space, size.table, size.depth);
            transpose_words(m.space, size.depth, size.table_words, size.depth, m.k_rel_turned, size.table_words);
        }
        if (call.q_rel.data != nullptr) {
            pack_table<E, In>(call, size, call.q_rel, kv_head, m.space, m.q_rel_columns);
            pack_pairs<E>(start_of<In>(call.q_rel, 0, kv_head), call.q_rel.row, call.table_rows, call.head_dim,
                          m.q_rel_pairs, size.table, size.depth);
        }
        for (index_t s = first; s < end; ++s) {
            const Sequence seq(call, s);
            BackwardMemory<E> own = m;  // the memory of the longest, the pitches of this one
            own.set_pitches(seq.padded_q, seq.padded_k);
            backward_sequence<E, In>(call, back, size, own, seq, kv_head);
        }
        const index_t table = (group * call.heads + kv_head) * call.table_rows * call.head_dim;
        if (call.k_rel.data != nullptr)
            write_gradient(m.d_k_rel, size.depth, call.table_rows, call.head_dim, back.d_k_rel + table, call.head_dim);
        if (call.q_rel.data != nullptr)
            write_gradient(m.d_q_rel, size.depth, call.table_rows, call.head_dim, back.d_q_rel + table, call.head_dim);
    }
}

template <class E, class In>
void backward(const Attention& call, const Backward& back, int threads) {
    parallel_for(back.groups * call.kv_heads, threads,
                 [&](index_t item) { backward_item<E, In>(call, back, item / call.kv_heads, item % call.kv_heads); });
    const index_t first_q = call.cu_q[call.num_seqs], first_k = call.cu_k[call.num_seqs];
    const index_t row_q = call.heads * call.head_dim, row_k = call.kv_heads * call.head_dim;
    clear((In*)back.d_q + first_q * row_q, (call.total_q - first_q) * row_q * sizeof(In));
    clear((In*)back.d_k + first_k * row_k, (call.total_k - first_k) * row_k * sizeof(In));
    clear((In*)back.d_v + first_k * row_k, (call.total_k - first_k) * row_k * sizeof(In));
}

}  // namespace
