// A step of AdamW or LAMB over many tensors, and the sum of squares that clipping needs.
//
// Everything is read and written once: the gradient is scaled (clipping) while it is read, and a weight's copy in
// bfloat16 is written while the weight is at hand. The work is cut into blocks over all tensors, so that threads are
// balanced whatever the tensors' sizes are; sums are formed block by block and added in the blocks' order, so no result
// depends on the number of threads.

#include <cmath>

#include "simd.h"
#include "threads.h"

namespace {

constexpr index_t BLOCK = 64 * 1024;  // elements of a tensor that a thread takes at a time
constexpr index_t STRIDE = 4096;      // elements whose squares are added in float before they go to double

// a row of the table of tensors; addresses are held in 64-bit integers
struct Tensor {
    index_t weight, gradient, first_moment, second_moment, copy;  // copy: 0, or bfloat16 of the weight's size
    index_t size;
    index_t gradient_is_bf16;
    index_t first_block;  // among the blocks of all tensors

    float* floats(index_t address) const { return (float*)(std::uintptr_t)address; }
    index_t blocks() const { return (size + BLOCK - 1) / BLOCK; }
};

// a row of the table of AdamW's numbers
struct AdamWSettings {
    double kept;  // 1 - lr * weight_decay
    double step;  // lr / (1 - beta1^t)
    double beta1, beta2;
    double eps;
    double root;  // sqrt(1 - beta2^t)
};

// a row of the table of LAMB's numbers
struct LambSettings {
    double lr, weight_decay;
    double beta1, beta2;
    double eps;    // eps * sqrt(1 - beta2^t)
    double scale;  // sqrt(1 - beta2^t) / (1 - beta1^t)
    double trust;  // 0: the ratio is 1
};

// body(first, count) for 16 elements at a time of [begin, end), the last ones fewer
template <class Body>
INLINE void each_vector(index_t begin, index_t end, const Body& body) {
    index_t i = begin;
    for (; i + LANES <= end; i += LANES) body(i, LANES);
    if (i < end) body(i, (int)(end - i));
}

template <class T>
INLINE f32x16 get(const T* p, int count) {
    return count == LANES ? load(p) : load_first(p, count);
}
template <class T>
INLINE void put(T* p, f32x16 v, int count) {
    count == LANES ? store(p, v) : store_first(p, v, count);
}

INLINE f32x16 root_of(f32x16 v) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_maskz_sqrt_ps(0xffff, (__m512)v);  // the plain form makes GCC 12 warn
#else
    float each[LANES];  // a loop over memory is vectorised, one over lanes is not
    std::memcpy(each, &v, sizeof each);
    for (float& x : each) x = __builtin_sqrtf(x);
    std::memcpy(&v, each, sizeof each);
    return v;
#endif
}

// the gradient may be float or bfloat16: body(pointer to it)
template <class Body>
void with_gradient(const Tensor& tensor, const Body& body) {
    if (tensor.gradient_is_bf16)
        body((const bf16*)(std::uintptr_t)tensor.gradient);
    else
        body((const float*)(std::uintptr_t)tensor.gradient);
}

// body(tensor's number, begin, end) for every block of every tensor
template <class Body>
void each_block(const Tensor* tensors, index_t count, int threads, const Body& body) {
    if (count == 0) return;
    const Tensor& last = tensors[count - 1];
    parallel_for(last.first_block + last.blocks(), threads, [&](index_t block) {
        index_t low = 0, high = count;  // the last tensor that begins at this block or before it
        while (high - low > 1) {
            index_t middle = (low + high) / 2;
            (tensors[middle].first_block <= block ? low : high) = middle;
        }
        index_t begin = (block - tensors[low].first_block) * BLOCK;
        index_t end = begin + BLOCK;
        body(low, begin, end < tensors[low].size ? end : tensors[low].size);
    });
}

template <class T>
double sum_of_squares(const T* x, index_t begin, index_t end) {
    double total = 0;
    for (index_t first = begin; first < end; first += STRIDE) {
        index_t stop = first + STRIDE < end ? first + STRIDE : end;
        f32x16 sums[4] = {};
        index_t i = first;
        for (; i + 4 * LANES <= stop; i += 4 * LANES)
            for (int j = 0; j < 4; ++j) {
                f32x16 v = load(x + i + j * LANES);
                sums[j] = fma(v, v, sums[j]);
            }
        each_vector(i, stop, [&](index_t at, int n) {
            f32x16 v = get(x + at, n);
            sums[0] = fma(v, v, sums[0]);
        });
        total += sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
    return total;
}

// m <- m + (1 - beta1) (g - m); v <- beta2 v + (1 - beta2) g^2
struct Moments {
    f32x16 m, v;
};
INLINE Moments moved(f32x16 g, f32x16 m, f32x16 v, float take1, float beta2, float take2) {
    return {fma(splat(take1), g - m, m), fma(g * g, splat(take2), v * beta2)};
}

template <class G>
void adamw_block(const Tensor& tensor, const G* gradient, const AdamWSettings& s, float factor, index_t begin,
                 index_t end) {
    float *weight = tensor.floats(tensor.weight), *first = tensor.floats(tensor.first_moment),
          *second = tensor.floats(tensor.second_moment);
    bf16* copy = (bf16*)(std::uintptr_t)tensor.copy;
    const float take1 = (float)(1 - s.beta1), beta2 = (float)s.beta2, take2 = (float)(1 - s.beta2);
    const float kept = (float)s.kept, step = (float)s.step, eps = (float)s.eps, inverse_root = (float)(1 / s.root);
    each_vector(begin, end, [&](index_t i, int n) {
        Moments now = moved(get(gradient + i, n) * factor, get(first + i, n), get(second + i, n), take1, beta2, take2);
        f32x16 denominator = fma(root_of(now.v), splat(inverse_root), splat(eps));
        f32x16 w = get(weight + i, n) * kept - step * now.m / denominator;
        put(first + i, now.m, n);
        put(second + i, now.v, n);
        put(weight + i, w, n);
        if (copy) put(copy + i, w, n);
    });
}

// LAMB's direction before the trust ratio, out of the moments of this step
INLINE f32x16 direction(f32x16 w, f32x16 m, f32x16 v, const LambSettings& s) {
    return fma(splat((float)s.weight_decay), w, m / (root_of(v) + (float)s.eps) * (float)s.scale);
}

// moves the moments; the squared norms of the weight and of its direction are added up
template <class G>
void lamb_gather(const Tensor& tensor, const G* gradient, const LambSettings& s, float factor, index_t begin,
                 index_t end, double* norms) {
    float *weight = tensor.floats(tensor.weight), *first = tensor.floats(tensor.first_moment),
          *second = tensor.floats(tensor.second_moment);
    const float take1 = (float)(1 - s.beta1), beta2 = (float)s.beta2, take2 = (float)(1 - s.beta2);
    norms[0] = norms[1] = 0;
    for (index_t chunk = begin; chunk < end; chunk += STRIDE) {
        f32x16 of_weight{}, of_direction{};
        each_vector(chunk, chunk + STRIDE < end ? chunk + STRIDE : end, [&](index_t i, int n) {
            f32x16 g = get(gradient + i, n) * factor;
            Moments now = moved(g, get(first + i, n), get(second + i, n), take1, beta2, take2);
            f32x16 w = get(weight + i, n);
            f32x16 u = direction(w, now.m, now.v, s);
            if (n < LANES) u = select(lane_numbers() < n, u, f32x16{});  // 0 / 0 where eps is 0
            of_weight = fma(w, w, of_weight);
            of_direction = fma(u, u, of_direction);
            put(first + i, now.m, n);
            put(second + i, now.v, n);
        });
        norms[0] += sum_of(of_weight);
        norms[1] += sum_of(of_direction);
    }
}

void lamb_apply(const Tensor& tensor, const LambSettings& s, float step, index_t begin, index_t end) {
    float *weight = tensor.floats(tensor.weight), *first = tensor.floats(tensor.first_moment),
          *second = tensor.floats(tensor.second_moment);
    bf16* copy = (bf16*)(std::uintptr_t)tensor.copy;
    each_vector(begin, end, [&](index_t i, int n) {
        f32x16 w = get(weight + i, n);
        w -= step * direction(w, get(first + i, n), get(second + i, n), s);
        put(weight + i, w, n);
        if (copy) put(copy + i, w, n);
    });
}

}  // namespace

// total[0] <- the sum of the squares of all gradients; partial has room for one double a block
EXPORT(gradient_squares)(const void* table, void* partial, void* total, index_t count, index_t threads) {
    const Tensor* tensors = (const Tensor*)table;
    double* sums = (double*)partial;
    each_block(tensors, count, (int)threads, [&](index_t number, index_t begin, index_t end) {
        const Tensor& tensor = tensors[number];
        with_gradient(tensor, [&](auto gradient) {
            sums[tensor.first_block + begin / BLOCK] = sum_of_squares(gradient, begin, end);
        });
    });
    double sum = 0;
    if (count > 0) {
        index_t blocks = tensors[count - 1].first_block + tensors[count - 1].blocks();
        for (index_t block = 0; block < blocks; ++block) sum += sums[block];
    }
    *(double*)total = sum;
}

// factor multiplies every gradient as it is read
EXPORT(adamw)(const void* table, const void* settings, index_t count, double factor, index_t threads) {
    const Tensor* tensors = (const Tensor*)table;
    const AdamWSettings* all = (const AdamWSettings*)settings;
    each_block(tensors, count, (int)threads, [&](index_t number, index_t begin, index_t end) {
        with_gradient(tensors[number], [&](auto gradient) {
            adamw_block(tensors[number], gradient, all[number], (float)factor, begin, end);
        });
    });
}

// partial has room for two doubles for each block of the largest tensor. A tensor is finished before the next is begun:
// what its first pass has read is then still in cache for the second
EXPORT(lamb)(const void* table, const void* settings, void* partial, index_t count, double factor, index_t threads) {
    const Tensor* tensors = (const Tensor*)table;
    const LambSettings* all = (const LambSettings*)settings;
    double* norms = (double*)partial;
    for (index_t number = 0; number < count; ++number) {
        const Tensor& tensor = tensors[number];
        const LambSettings& s = all[number];
        auto end_of = [&](index_t block) {
            const index_t end = (block + 1) * BLOCK;
            return end < tensor.size ? end : tensor.size;
        };
        parallel_for(tensor.blocks(), (int)threads, [&](index_t block) {
            with_gradient(tensor, [&](auto gradient) {
                lamb_gather(tensor, gradient, s, (float)factor, block * BLOCK, end_of(block), norms + 2 * block);
            });
        });
        double of_weight = 0, of_direction = 0;
        for (index_t block = 0; block < tensor.blocks(); ++block) {
            of_weight += norms[2 * block];
            of_direction += norms[2 * block + 1];
        }
        bool usable = s.trust != 0 && of_weight > 0 && of_direction > 0;
        float step = (float)(s.lr * (usable ? std::sqrt(of_weight / of_direction) : 1.0));
        parallel_for(tensor.blocks(), (int)threads,
                     [&](index_t block) { lamb_apply(tensor, s, step, block * BLOCK, end_of(block)); });
    }
}
