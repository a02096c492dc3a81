// The bfloat16 kernels with a tile in plain C++ instead of AMX or AVX-512 instructions, so that
// csrc/kernel/bfloat16_*.h run on any machine and under every sanitizer.
#define NAMERNN_VECTOR_BYTES 64
#define NAMERNN_REGISTERS 32
#include <cstring>

#include "contract.h"
#include "kernel/simd.h"

namespace namernn_fast {
namespace {

constexpr const Kernels& kKernelsInFloat = kernels_baseline;

struct PairTile {
  static constexpr int64_t rows = 32;

  // Reads and writes 16 or 32 rows, like AMX; only the first `height` results are used. In the
  // backward pass of the reverse direction another thread may meanwhile write the other rows, which
  // are dz of the next step. That race is harmless, so the thread sanitizer does not get to see it.
  template <bool kAdd>
  void multiply(const BFloat16* a, int64_t a_row, int64_t K, int64_t height, const BFloat16* panel,
                float* c) {
    constexpr int64_t width = 64;
#if defined(__SANITIZE_THREAD__)
    const int64_t read = height;
#else
    const int64_t read = height > 16 ? 32 : 16;
#endif
    for (int64_t i = 0; i < read; ++i) {
      float sums[width] = {};
      if (kAdd) std::memcpy(sums, c + i * width, sizeof(sums));
      for (int64_t k = 0; k < K; ++k) {
        const float x = value(a[i * a_row + k]);
        const BFloat16* pairs = panel + k / 2 * width * 2 + k % 2;
        for (int64_t j = 0; j < width; ++j) sums[j] += x * value(pairs[2 * j]);
      }
      std::memcpy(c + i * width, sums, sizeof(sums));
    }
  }

 private:
  static float value(BFloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof(wide));
    return wide;
  }
};

}  // namespace
}  // namespace namernn_fast

#include "kernel/bfloat16_table.h"

namespace namernn_fast {
extern const KernelsOnPairs kernels_emulated_pairs;
const KernelsOnPairs kernels_emulated_pairs = kernels_on_pairs();
}  // namespace namernn_fast
