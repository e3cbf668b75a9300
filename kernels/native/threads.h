// Threads and their scratch memory. The OpenMP runtime is the one that torch has loaded, so its threads are torch's.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__SANITIZE_THREAD__)
#include <atomic>
#include <thread>
#include <vector>
#endif

namespace {

// body(item) for each item in [0, items), by up to `threads` threads; an item is done by one thread from start to end,
// so what it computes does not depend on who does it
template <class Body>
void parallel_for(std::int64_t items, int threads, const Body& body) {
#if defined(__SANITIZE_THREAD__)  // which does not see how an OpenMP runtime hands work over
    std::atomic<std::int64_t> next{0};
    std::vector<std::thread> team;
    for (int number = 0; number < threads; ++number)
        team.emplace_back([&] {
            for (std::int64_t item = next++; item < items; item = next++) body(item);
        });
    for (std::thread& each : team) each.join();
    return;
#elif defined(_OPENMP)
    if (threads > 1 && items > 1) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
        for (std::int64_t item = 0; item < items; ++item) body(item);
        return;
    }
#endif
    (void)threads;
    for (std::int64_t item = 0; item < items; ++item) body(item);
}

// body(first, end) for ranges that cover [0, items), one a thread; boundaries are multiples of `grain`
template <class Body>
void parallel_ranges(std::int64_t items, std::int64_t grain, int threads, const Body& body) {
    std::int64_t blocks = (items + grain - 1) / grain;
    std::int64_t parts = blocks < threads ? blocks : threads;
    if (parts < 1) return;
    parallel_for(parts, threads, [&](std::int64_t part) {
        std::int64_t first = blocks * part / parts * grain, end = blocks * (part + 1) / parts * grain;
        body(first, end < items ? end : items);
    });
}

// memory of one thread, kept from call to call and grown where more is asked for; 64-byte aligned
class Scratch {
  public:
    ~Scratch() { std::free(memory_); }
    void* bytes(std::size_t wanted) {
        if (wanted > size_) {
            std::free(memory_);
            size_ = 0;
            memory_ = std::aligned_alloc(64, (wanted + 4095) / 4096 * 4096);
            if (memory_ == nullptr) throw std::bad_alloc();
            size_ = wanted;
        }
        return memory_;
    }

  private:
    void* memory_ = nullptr;
    std::size_t size_ = 0;
};

// cuts one piece of memory into arrays; made twice, first to count (memory is null), then to cut
class Carver {
  public:
    explicit Carver(void* memory = nullptr) : memory_((char*)memory) {}
    template <class T>
    T* take(std::int64_t count) {
        char* start = memory_ + used_;
        used_ += ((std::size_t)count * sizeof(T) + 63) / 64 * 64;
        return (T*)start;
    }
    std::size_t used() const { return used_; }

  private:
    char* memory_;
    std::size_t used_ = 0;
};

}  // namespace
