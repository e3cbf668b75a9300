// Softmax attention over packed sequences, with or without relative positions: forward.
//
// One sequence and head at a time: its keys and values are packed, then 32 queries at a time: all their scores,
// softmax, and the product with the values. Nothing quadratic is kept. The contracts are kernels/attention/api.py and
// kernels/disentangled_attention/api.py.

#include "attention.h"
#include "attention_backward.h"

namespace {

template <class E>
struct ForwardMemory {
    word *k_rows, *v_rows, *v_columns, *pairs, *q_rows, *q_columns, *weights;
    word *table, *k_rel_columns, *q_rel_columns, *key_terms, *query_terms;
    float *scores, *terms_space, *out_columns;
    std::int32_t *places, *limits;
    std::uint32_t* dropout_rows;
    index_t key_pitch;  // of v_columns

    ForwardMemory(Carver& carver, const Sizes<E>& size, index_t padded_q, index_t padded_k) {
        key_pitch = pitch(padded_k / E::PER_WORD);
        k_rows = carver.take<word>(padded_k * size.depth_words);
        v_columns = carver.take<word>(size.depth * key_pitch);
        v_rows = carver.take<word>(padded_k * size.depth_words);
        pairs = carver.take<word>(padded_k / E::PER_WORD * size.depth);
        q_rows = carver.take<word>(BLOCK * size.depth_words);
        q_columns = carver.take<word>(size.depth_words * BLOCK);
        weights = carver.take<word>(padded_k / E::PER_WORD * BLOCK);
        scores = carver.take<float>(padded_k * BLOCK);
        out_columns = carver.take<float>(size.depth * BLOCK);
        places = carver.take<std::int32_t>(padded_q);
        limits = carver.take<std::int32_t>(padded_q);
        dropout_rows = carver.take<std::uint32_t>(padded_q);
        table = carver.take<word>(size.table * size.depth_words);
        k_rel_columns = carver.take<word>(size.table * size.depth_words);
        q_rel_columns = carver.take<word>(size.table * size.depth_words);
        key_terms = carver.take<word>(padded_k * size.table_words);
        query_terms = carver.take<word>(BLOCK * size.table_words);
        terms_space = carver.take<float>(BLOCK * size.table);
    }
};

// each lane's largest product
INLINE void largest_products(const std::int32_t* limits, index_t keys, const float* products, f32x16 (&largest)[2]) {
    const index_t all_see = limits[0] / BLOCK * BLOCK;  // limits never decrease: every lane sees these
    for (int half = 0; half < 2; ++half) {
        const i32x16 limit = load_as<i32x16>(limits + half * LANES);
        const float* product = products + half * LANES;
        f32x16 most = splat(-__builtin_inff());
        index_t j = 0;
        for (; j < all_see; ++j) most = maximum(most, load(product + j * BLOCK));
        for (; j < keys; ++j)
            most = select(limit > splat_int((std::int32_t)j), maximum(most, load(product + j * BLOCK)), most);
        // a lane that sees nothing: its weights are to be 0 and not NaN
        largest[half] = select(most == -__builtin_inff(), f32x16{}, most);
    }
}

// products -> weights exp((product - largest) * scale) in the layout of the product with the values, 0 where a key is not
// seen or dropped; returns each lane's sum before dropout
template <class E>
void exponentials(const Attention& call, const std::int32_t* limits, const std::uint32_t* dropout_rows, index_t head,
                  index_t keys, const float* products, const f32x16 (&largest)[2], word* weights, f32x16 (&sum)[2]) {
    const index_t all_see = limits[0] / BLOCK * BLOCK;
    const Exponent<E> exponent(call.scale);
    for (int half = 0; half < 2; ++half) {
        const i32x16 limit = load_as<i32x16>(limits + half * LANES);
        f32x16 total[4] = {};  // four shorter sums round less than one
        for (index_t j = 0; j < keys; j += 4) {
            f32x16 weight[4];
            for (int n = 0; n < 4; ++n)
                weight[n] = exponent.weight(load(products + (j + n) * BLOCK + half * LANES), largest[half]);
            if (j >= all_see)
                for (int n = 0; n < 4; ++n)
                    weight[n] = select(limit > splat_int((std::int32_t)j + n), weight[n], f32x16{});
            for (int n = 0; n < 4; ++n) total[n] += weight[n];
            if (call.drops) {
                i32x16 kept[4];
                keep_masks(call, j / 4, dropout_rows + half * LANES, head, kept);
                for (int n = 0; n < 4; ++n) weight[n] = select(kept[n], weight[n], f32x16{});
            }
            word* to = weights + j / E::PER_WORD * BLOCK + half * LANES;
            store_row_pair<E>(to, BLOCK, weight[0], weight[1]);
            store_row_pair<E>(to + 2 / E::PER_WORD * BLOCK, BLOCK, weight[2], weight[3]);
        }
        sum[half] = (total[0] + total[1]) + (total[2] + total[3]);
    }
}

template <class E, class In>
void forward_item(const Attention& call, In* out, float* sums, index_t s, index_t head) {
    const Sequence seq(call, s);
    const Sizes<E> size(call);
    const index_t kv_head = head / (call.heads / call.kv_heads), out_stride = call.heads * call.head_dim;
    if (seq.len_q == 0) return;
    thread_local Scratch scratch;
    Carver count;
    ForwardMemory<E>(count, size, seq.padded_q, seq.padded_k);
    Carver carver(scratch.bytes(count.used()));
    const ForwardMemory<E> m(carver, size, seq.padded_q, seq.padded_k);
    [[maybe_unused]] const Tiles tiles;

    place_queries(call, seq, m.places, m.limits, m.dropout_rows);
    pack_rows<E>(start_of<In>(call.k, seq.first_k, kv_head), call.k.row, seq.len_k, call.head_dim, m.k_rows,
                 seq.padded_k, size.depth_words);
    const index_t key_words = seq.padded_k / E::PER_WORD;
    pack_rows<E>(start_of<In>(call.v, seq.first_k, kv_head), call.v.row, seq.len_k, call.head_dim, m.v_rows,
                 seq.padded_k, size.depth_words);
    const word* pairs = pairs_of_rows<E>(m.v_rows, seq.padded_k, size.depth, m.pairs);
    transpose_words(pairs, size.depth, key_words, size.depth, m.v_columns, m.key_pitch);
    if (call.k_rel.data) pack_table<E, In>(call, size, call.k_rel, head, m.table, m.k_rel_columns);
    if (call.q_rel.data) {
        pack_table<E, In>(call, size, call.q_rel, head, m.table, m.q_rel_columns);
        relative_terms<E>(size, m.k_rows, seq.padded_k, m.q_rel_columns, m.terms_space, m.key_terms);
    }

    for (index_t i = 0; i < seq.len_q; i += BLOCK) {
        const index_t queries = seq.len_q - i < BLOCK ? seq.len_q - i : BLOCK;
        const index_t keys = round_up(m.limits[i + BLOCK - 1], BLOCK);  // the last query sees most
        pack_rows<E>(start_of<In>(call.q, seq.first_q + i, head), call.q.row, queries, call.head_dim, m.q_rows, BLOCK,
                     size.depth_words);
        transpose_words(m.q_rows, size.depth_words, BLOCK, size.depth_words, m.q_columns, BLOCK);
        product<E>(keys, BLOCK, size.depth_words, m.k_rows, size.depth_words, m.q_columns, BLOCK, m.scores, BLOCK,
                   false);
        if (call.relative()) {
            if (call.k_rel.data)
                relative_terms<E>(size, m.q_rows, BLOCK, m.k_rel_columns, m.terms_space, m.query_terms);
            for (index_t j = 0; j < keys; j += BLOCK)
                add_relative_terms<E>(call, size, call.k_rel.data ? m.query_terms : nullptr,
                                      call.q_rel.data ? m.key_terms + j * size.table_words : nullptr, m.places + i, j,
                                      m.scores + j * BLOCK, BLOCK);
        }
        f32x16 largest[2], sum[2], factor[2];
        largest_products(m.limits + i, keys, m.scores, largest);
        exponentials<E>(call, m.limits + i, m.dropout_rows + i, head, keys, m.scores, largest, m.weights, sum);
        product<E>(size.depth, BLOCK, keys / E::PER_WORD, m.v_columns, m.key_pitch, m.weights, BLOCK, m.out_columns,
                   BLOCK, false);
        for (int half = 0; half < 2; ++half)
            factor[half] = select(sum[half] == 0.0f, f32x16{}, (call.drops ? call.keep_scale : 1.0f) / sum[half]);
        write_rows(m.out_columns, BLOCK, call.head_dim, factor, queries,
                   out + (seq.first_q + i) * out_stride + head * call.head_dim, out_stride);
        for (int half = 0; half < 2 && half * LANES < queries; ++half) {
            const int n = (int)(queries - half * LANES < LANES ? queries - half * LANES : LANES);
            float* to = sums + head * call.total_q + seq.first_q + i + half * LANES;
            store_first(to, largest[half], n);
            store_first(to + call.heads * call.total_q, sum[half], n);
        }
    }
}

// rows past the last sequence see nothing
template <class In>
void forward_slack(const Attention& call, In* out, float* sums) {
    const index_t first = call.cu_q[call.num_seqs], row = call.heads * call.head_dim;
    clear(out + first * row, (call.total_q - first) * row * sizeof(In));
    for (index_t head = 0; head < 2 * call.heads; ++head)
        clear(sums + head * call.total_q + first, (call.total_q - first) * sizeof(float));
}

template <class E, class In>
void forward(const Attention& call, void* out, void* sums, int threads) {
    parallel_for(call.num_seqs * call.heads, threads, [&](index_t item) {
        forward_item<E>(call, (In*)out, (float*)sums, item / call.heads, item % call.heads);
    });
    forward_slack(call, (In*)out, (float*)sums);
}

}  // namespace

#define ATTENTION_PARAMETERS                                                                                        \
    const void *q, const void *k, const void *v, const void *q_rel, const void *k_rel, const void *cu_q,            \
        const void *cu_k, const void *prefix, const void *positions, const void *buckets, const void *buckets_back, \
        index_t q_row, index_t q_head, index_t k_row, index_t k_head, index_t v_row, index_t v_head,                \
        index_t q_rel_row, index_t q_rel_head, index_t k_rel_row, index_t k_rel_head, index_t is_bf16,              \
        index_t num_seqs, index_t total_q, index_t total_k, index_t heads, index_t kv_heads, index_t head_dim,      \
        index_t table_rows, index_t span, index_t drops, index_t seed, index_t threshold, double scale,             \
        double keep_scale

#define ATTENTION_CALL                                          \
    const Attention call = {{q, q_row, q_head},                 \
                            {k, k_row, k_head},                 \
                            {v, v_row, v_head},                 \
                            {q_rel, q_rel_row, q_rel_head},     \
                            {k_rel, k_rel_row, k_rel_head},     \
                            (const std::int32_t*)cu_q,          \
                            (const std::int32_t*)cu_k,          \
                            (const std::int32_t*)prefix,        \
                            (const std::int32_t*)positions,     \
                            (const std::uint16_t*)buckets,      \
                            (const std::uint16_t*)buckets_back, \
                            span,                               \
                            table_rows,                         \
                            num_seqs,                           \
                            total_q,                            \
                            total_k,                            \
                            heads,                              \
                            kv_heads,                           \
                            head_dim,                           \
                            (float)scale,                       \
                            drops != 0,                         \
                            (std::uint64_t)seed,                \
                            (std::uint32_t)threshold,           \
                            (float)keep_scale}

EXPORT(attention_forward)(ATTENTION_PARAMETERS, void* out, void* sums, index_t threads) {
    ATTENTION_CALL;
#if defined(__AVX512BF16__)
    if (is_bf16) return forward<Bf16, bf16>(call, out, sums, (int)threads);
#else
    if (is_bf16) return forward<Float, bf16>(call, out, sums, (int)threads);
#endif
    forward<Float, float>(call, out, sums, (int)threads);
}

EXPORT(attention_backward)(ATTENTION_PARAMETERS, const void* d_out, index_t d_out_row, index_t d_out_head,
                           const void* out, const void* sums, void* d_q, void* d_k, void* d_v, void* d_q_rel,
                           void* d_k_rel, index_t groups, index_t threads) {
    ATTENTION_CALL;
    const Backward back = {{d_out, d_out_row, d_out_head},
                           out,
                           (const float*)sums,
                           d_q,
                           d_k,
                           d_v,
                           (float*)d_q_rel,
                           (float*)d_k_rel,
                           groups};
#if defined(__AVX512BF16__)
    if (is_bf16) return backward<Bf16, bf16>(call, back, (int)threads);
#else
    if (is_bf16) return backward<Float, bf16>(call, back, (int)threads);
#endif
    backward<Float, float>(call, back, (int)threads);
}
