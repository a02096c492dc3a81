#include "processor.h"

#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace namernn_fast {
namespace {

#if defined(__x86_64__) && !defined(NAMERNN_FAST_WITHOUT_AVX512)
// Replaces the AVX-512 kernels for 8-bit weights if this processor supports faster kernels. Adds
// kernels that multiply pairs of bfloat16 if these are faster.
void detect_pairs(const std::string& wanted, Kernels& kernels) {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx);
  const bool tiles = (edx >> 22 & 1) != 0 && (edx >> 24 & 1) != 0;  // AMX-BF16, AMX-TILE
  const bool int8_tiles = (edx >> 25 & 1) != 0;                     // AMX-INT8
  const bool vnni = (ecx >> 11 & 1) != 0;                           // AVX512-VNNI
  __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx);
  const bool dot_products = (eax >> 5 & 1) != 0;  // AVX512-BF16
#if defined(__linux__)
  // Linux lets a process use the tile registers only after the process has requested permission.
  constexpr long request_permission = 0x1023, tile_data = 18;
  const bool permitted =
      tiles && dot_products && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  const bool permitted = false;
#endif
  if (vnni && (wanted.empty() || wanted == "amx" || wanted == "avx512_vnni")) {
    const bool on_tiles = permitted && int8_tiles && wanted != "avx512_vnni";
    kernels.int8 = on_tiles ? &int8_kernels_amx : &int8_kernels_avx512_vnni;
  }
  if (permitted && (wanted.empty() || wanted == "amx")) {
    kernels.bfloat16_on_pairs = &kernels_amx;
    kernels.bfloat16_name = "amx";
    kernels.float_on_pairs = kernels_amx_float;
    return;
  }
  // On Intel processors, bfloat16 dot products run at half the rate of float multiply-adds.
  if (dot_products && (wanted.empty() ? __builtin_cpu_is("amd") != 0 : wanted == "avx512_bf16")) {
    kernels.bfloat16_on_pairs = &kernels_avx512_bf16;
    kernels.bfloat16_name = "avx512_bf16";
  }
}
#endif

Kernels detect_kernels() {
#if defined(__x86_64__)
  // ATen's environment variable also selects our kernels.
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string wanted = variable ? variable : "";
  __builtin_cpu_init();
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  __get_cpuid(1, &eax, &ebx, &ecx, &edx);
  // Reads F16C from cpuid, because Clang before version 15 does not accept "f16c" in
  // __builtin_cpu_supports().
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && (ecx & bit_F16C) != 0;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (wanted != "default" && wanted != "avx2" && wanted != "avx_vnni" && avx512) {
#if defined(NAMERNN_FAST_WITHOUT_AVX512)
    throw std::runtime_error(
        "this processor has AVX-512, but NAMERNN_FAST_ISA=avx2 left out these kernels");
#else
    Kernels found = kernels_avx512;
    detect_pairs(wanted, found);
    return found;
#endif
  }
  if (wanted != "default" && avx2) {
    Kernels found = kernels_avx2;
    __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx);
    const bool vnni = (eax >> 4 & 1) != 0;  // AVX-VNNI
    if (vnni && wanted != "avx2") found.int8 = &int8_kernels_avx_vnni;
    return found;
  }
#endif
  return kernels_baseline;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels chosen = detect_kernels();
  return chosen;
}

size_t l2_bytes() {
  static const size_t bytes = [] {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    if (const long size = sysconf(_SC_LEVEL2_CACHE_SIZE); size > 0) return size_t(size);
#endif
    return size_t(1) << 20;
  }();
  return bytes;
}

int64_t panels_of(int64_t hidden_size) {
  const int64_t width = kernels().panel_width;
  return (hidden_size + width - 1) / width;
}

}  // namespace namernn_fast
