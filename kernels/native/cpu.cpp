// Which instruction sets this processor and system offer; asked once, when the library is loaded.

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#define VISIBLE extern "C" __attribute__((visibility("default")))

// read by products of bfloat16 in the AVX-512 kernels
__attribute__((visibility("hidden"))) int antlm_amx_in_use = 0;

VISIBLE const char* antlm_sources() { return ANTLM_SOURCES; }

VISIBLE int antlm_has_avx2() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#else
    return 0;
#endif
}

// AVX-512 as servers have had it since Cooper Lake and Zen 4: with bfloat16 products
VISIBLE int antlm_has_avx512() {
#if defined(__x86_64__)
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) || !(eax >> 5 & 1)) return 0;
    return antlm_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512cd");
#else
    return 0;
#endif
}

// tiles need the system's leave, for the whole process
VISIBLE int antlm_has_amx() {
#if defined(ANTLM_AMX) && defined(__x86_64__) && defined(__linux__)
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return 0;
    if (!(edx >> 22 & 1) || !(edx >> 24 & 1)) return 0;
    constexpr int request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return 0;
#endif
}

VISIBLE void antlm_use_amx(int use) { antlm_amx_in_use = use; }
