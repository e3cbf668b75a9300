// Linear cross-entropy between its products: logits become each row's loss and, in place, the loss's gradient.
//
// A row's logits are read from memory once: in 16 bits a vocabulary of 16k is 32 KiB, which stays in the core's cache
// for the passes that follow (the largest logit; exponentials and their sum; the gradient). Arithmetic is in float32,
// and a row is one thread's from start to end, so no number depends on how many threads there are.

#include <type_traits>

#include "simd.h"
#include "threads.h"

namespace {

// every pass walks a row in such pieces; the float32 sum of a piece is added to the row's, which keeps both short
constexpr index_t PIECE = 1024;

template <class T>
struct Job {
    T* logits;      // (rows, stride), in place: columns from vocab on are padding
    const T* bias;  // (vocab,) or null: added here, in float32
    const index_t* targets;
    const std::uint8_t* counts;  // (rows,) or null: which rows count
    const float* upstream;       // (rows,) or null: multiplies the gradient
    float *losses, *lse;         // (rows,)
    std::uint8_t* correct;       // (rows,) or null
    index_t vocab, stride;
    bool gradient;
    float softcap, inverse_cap;  // where CAPPED
    float z_loss, smoothing;
};

template <class T>
INLINE f32x16 load_some(const T* p, int n) {
    return n == LANES ? load(p) : load_first(p, n);
}
template <class T>
INLINE void store_some(T* p, f32x16 v, int n) {
    if (n == LANES)
        store(p, v);
    else
        store_first(p, v, n);
}

// body(col, n) for n columns from col on: 16 at a time, and what is left
template <class Body>
INLINE void walk(index_t first, index_t end, const Body& body) {
    index_t col = first;
    for (; col + LANES <= end; col += LANES) body(col, LANES);
    if (col < end) body(col, (int)(end - col));
}
template <class Body>
INLINE void in_pieces(index_t end, const Body& body) {
    for (index_t first = 0; first < end; first += PIECE) body(first, first + PIECE < end ? first + PIECE : end);
}
#define COLUMNS [&](index_t col, int n) __attribute__((always_inline))

INLINE f32x16 only_first(f32x16 v, int n, float rest) {
    return n == LANES ? v : select(lane_numbers() < n, v, splat(rest));
}

// exp(x) - 1 for x <= 0, as exact near 0 as elsewhere: (2^f - 1) / f for |f| <= 1/2 is a polynomial of degree 5 (fitted
// for the least relative error: 1.1e-8 before rounding)
INLINE f32x16 expm1_of_negative(f32x16 x) {
    x *= LOG2E;
    x = select(x < -30.0f, splat(-30.0f), x);  // what is left of it vanishes beside 1
    f32x16 n = round_to_whole(x), f = x - n;
    f32x16 p = splat(1.5403512743e-4f);
    p = fma(p, f, splat(1.3390735478e-3f));
    p = fma(p, f, splat(9.6182374938e-3f));
    p = fma(p, f, splat(5.5503574336e-2f));
    p = fma(p, f, splat(2.4022649795e-1f));
    p = fma(p, f, splat(6.9314718793e-1f));
    // 2^n by its exponent; of a NaN it is any number, and times NaN is NaN
    f32x16 scale = (f32x16)((__builtin_convertvector(select(n == n, n, splat(0.0f)), i32x16) + 127) << 23);
    return fma(scale, p * f, scale - 1.0f);
}

INLINE f32x16 tanh(f32x16 x) {
    const i32x16 sign = splat_int(INT32_MIN);
    f32x16 size = (f32x16)((i32x16)x & ~sign);
    f32x16 m = expm1_of_negative(size * -2.0f);
    return (f32x16)((i32x16)(-m / (m + 2.0f)) | ((i32x16)x & sign));
}

// what follows is the four steps of one row; `kept` is its float32 memory (the row itself where logits are float32)

template <class T>
INLINE f32x16 logit(const T* row, const T* bias, index_t col, int n) {
    f32x16 x = load_some(row + col, n);
    return bias ? x + load_some(bias + col, n) : x;
}

// the largest logit; capped logits are kept
template <class T, bool CAPPED>
float find_largest(const Job<T>& job, const T* row, float* kept) {
    const f32x16 lowest = splat(-__builtin_inff());
    f32x16 largest[4] = {lowest, lowest, lowest, lowest};
    const T* bias = job.bias;
    auto step = [&](index_t col, int n, f32x16& so_far) __attribute__((always_inline)) {
        f32x16 x = logit(row, bias, col, n);
        if (CAPPED) {
            x = tanh(x * job.inverse_cap) * job.softcap;
            store_some(kept + col, x, n);
        }
        so_far = maximum(so_far, only_first(x, n, -__builtin_inff()));
    };
    index_t col = 0;
    for (; col + 4 * LANES <= job.vocab; col += 4 * LANES)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) step(col + i * LANES, LANES, largest[i]);
    walk(col, job.vocab, COLUMNS { step(col, n, largest[0]); });
    return largest_of(maximum(maximum(largest[0], largest[1]), maximum(largest[2], largest[3])));
}

struct Sums {
    float total;    // of exp(logit - largest)
    float shifted;  // of logit - largest, where SMOOTHED
};

// sums over the row; exponentials are kept for the gradient, unless capped logits are
template <class T, bool CAPPED, bool SMOOTHED>
Sums add_up(const Job<T>& job, const T* row, float* kept, float largest) {
    const bool keep = !CAPPED && job.gradient;
    const T *bias = job.bias, *next = row + job.stride;
    f32x16 total{}, shifted{};
    in_pieces(job.vocab, [&](index_t first, index_t end) __attribute__((always_inline)) {
        f32x16 piece_total{}, piece_shifted{};
        walk(
            first, end, COLUMNS {
                f32x16 x = CAPPED ? load_some(kept + col, n) : logit(row, bias, col, n);
                __builtin_prefetch(next + col, 1,
                                   2);  // hides the way from the third-level cache; past the end it is nothing
                x -= largest;
                if (SMOOTHED) piece_shifted += only_first(x, n, 0.0f);
                f32x16 e = exp(x);
                piece_total += only_first(e, n, 0.0f);
                if (keep) store_some(kept + col, e, n);
            });
        total += piece_total;
        if (SMOOTHED) shifted += piece_shifted;
    });
    return {sum_of(total), sum_of(shifted)};
}

// the gradient of the loss by the logits is p * (1 + 2 z lse) - smoothing / vocab, less 1 - smoothing at the target
template <class T, bool CAPPED>
void write_gradient(const Job<T>& job, T* row, const float* kept, float largest, float scale, float share) {
    walk(
        0, job.vocab, COLUMNS {
            f32x16 x = load_some(kept + col, n);
            f32x16 d = (CAPPED ? exp(x - largest) : x) * scale - share;
            if (CAPPED) {
                f32x16 level = x * job.inverse_cap;
                d *= 1.0f - level * level;
            }
            store_some(row + col, d, n);
        });
}

INLINE float* kept_of(float* row, float*) { return row; }
INLINE float* kept_of(bf16*, float* scratch) { return scratch; }

template <class T, bool CAPPED>
void one_row(const Job<T>& job, index_t number, float* scratch) {
    T* row = job.logits + number * job.stride;
    const std::size_t row_bytes = job.stride * sizeof(T);
    if (job.counts && !job.counts[number]) {  // it may hold anything, so nothing is computed of it
        job.losses[number] = job.lse[number] = 0.0f;
        if (job.correct) job.correct[number] = 0;
        if (job.gradient) std::memset(row, 0, row_bytes);
        return;
    }
    // losses
    float* kept = kept_of(row, scratch);
    const index_t at = job.targets[number];
    const float largest = find_largest<T, CAPPED>(job, row, kept);
    const float target_logit = CAPPED ? kept[at] : logit(row, job.bias, at, 1)[0];
    const float target = target_logit - largest;
    const Sums sums = job.smoothing != 0.0f ? add_up<T, CAPPED, true>(job, row, kept, largest)
                                            : add_up<T, CAPPED, false>(job, row, kept, largest);
    const float log_total = log_of(sums.total), lse = log_total + largest;
    float loss = (1.0f - job.smoothing) * (log_total - target);
    if (job.smoothing != 0.0f) loss += job.smoothing * (log_total - sums.shifted / (float)job.vocab);
    if (job.z_loss != 0.0f) loss += job.z_loss * lse * lse;
    job.losses[number] = loss;
    job.lse[number] = lse;
    // a NaN anywhere is in the sum, and then nothing is right
    if (job.correct) job.correct[number] = target >= 0.0f && sums.total == sums.total;
    if (!job.gradient) return;
    // The gradient. In float32 up to the one rounding: p - 1 in bfloat16 would be all error where p is near 1.
    const float upstream = job.upstream ? job.upstream[number] : 1.0f;
    float scale = 1.0f / sums.total;
    if (job.z_loss != 0.0f) scale *= 1.0f + 2.0f * job.z_loss * lse;
    const float share = job.smoothing / (float)job.vocab;
    float at_target = exp(splat(target))[0] * scale - share - (1.0f - job.smoothing);
    const float level = target_logit * job.inverse_cap;
    if (CAPPED) at_target *= 1.0f - level * level;
    write_gradient<T, CAPPED>(job, row, kept, largest, scale * upstream, share * upstream);
    write(row + at, at_target * upstream);
    if (job.stride > job.vocab) std::memset(row + job.vocab, 0, (job.stride - job.vocab) * sizeof(T));
}

constexpr index_t NEIGHBOURS = 8;

template <class T, bool CAPPED>
void all_rows(const Job<T>& job, index_t rows, int threads) {
    static thread_local Scratch scratch;
    const bool own = sizeof(T) != sizeof(float) && (CAPPED || job.gradient);
    // a thread takes some neighbours at a time, so that the row it fetches ahead is its own
    parallel_for((rows + NEIGHBOURS - 1) / NEIGHBOURS, threads, [&](index_t block) {
        float* kept = own ? (float*)scratch.bytes(job.vocab * sizeof(float)) : nullptr;
        for (index_t row = block * NEIGHBOURS; row < rows && row < (block + 1) * NEIGHBOURS; ++row)
            one_row<T, CAPPED>(job, row, kept);
    });
}

// columns are added in blocks of so many rows, for the same reason as PIECE
constexpr index_t BLOCK_ROWS = 64;
constexpr int VECTORS = 4;

// total[col] += sum over rows of weights[row] * d_logits[row, col]
template <class T>
void column_sums(const T* d_logits, const float* weights, float* total, index_t rows, index_t columns, index_t stride,
                 int threads) {
    parallel_ranges(columns, VECTORS * LANES, threads, [&](index_t first, index_t end) {
        for (index_t col = first; col < end; col += VECTORS * LANES) {
            f32x16 sums[VECTORS] = {};
            for (index_t start = 0; start < rows; start += BLOCK_ROWS) {
                f32x16 block[VECTORS] = {};
                const index_t stop = start + BLOCK_ROWS < rows ? start + BLOCK_ROWS : rows;
                for (index_t row = start; row < stop; ++row)
                    for (int i = 0; i < VECTORS; ++i) {
                        const index_t at = col + i * LANES, left = end - at;
                        if (left <= 0) break;
                        f32x16 d = load_some(d_logits + row * stride + at, left < LANES ? (int)left : LANES);
                        block[i] += weights ? d * weights[row] : d;
                    }
                for (int i = 0; i < VECTORS; ++i) sums[i] += block[i];
            }
            for (int i = 0; i < VECTORS; ++i) {
                const index_t at = col + i * LANES, left = end - at;
                if (left <= 0) break;
                const int n = left < LANES ? (int)left : LANES;
                store_some(total + at, load_some(total + at, n) + sums[i], n);
            }
        }
    });
}

template <class T>
void run(Job<T> job, index_t rows, int threads) {
    if (job.softcap != 0.0f)
        all_rows<T, true>(job, rows, threads);
    else
        all_rows<T, false>(job, rows, threads);
}

}  // namespace

// Losses, lse and what is predicted right, of rows of logits; with `gradient` != 0 the logits become
// upstream * d loss / d logits and their padding 0, without it they are used up. softcap 0 is none.
EXPORT(cross_entropy_rows)
(void* logits, const void* bias, const void* targets, const void* counts, const void* upstream, void* losses, void* lse,
 void* correct, index_t rows, index_t vocab, index_t stride, index_t is_bf16, index_t gradient, double softcap,
 double z_loss, double smoothing, index_t threads) {
    auto start = [&](auto* typed) {
        using T = std::remove_pointer_t<decltype(typed)>;
        const float cap = (float)softcap;
        Job<T> job{typed,
                   (const T*)bias,
                   (const index_t*)targets,
                   (const std::uint8_t*)counts,
                   (const float*)upstream,
                   (float*)losses,
                   (float*)lse,
                   (std::uint8_t*)correct,
                   vocab,
                   stride,
                   gradient != 0,
                   cap,
                   cap != 0.0f ? 1.0f / cap : 0.0f,
                   (float)z_loss,
                   (float)smoothing};
        run(job, rows, (int)threads);
    };
    if (is_bf16)
        start((bf16*)logits);
    else
        start((float*)logits);
}

// total (float32, columns) += weights^T @ d_logits; weights (float32, rows) may be null: all 1
EXPORT(cross_entropy_column_sums)
(const void* d_logits, const void* weights, void* total, index_t rows, index_t columns, index_t stride, index_t is_bf16,
 index_t threads) {
    if (is_bf16)
        column_sums((const bf16*)d_logits, (const float*)weights, (float*)total, rows, columns, stride, (int)threads);
    else
        column_sums((const float*)d_logits, (const float*)weights, (float*)total, rows, columns, stride, (int)threads);
}
