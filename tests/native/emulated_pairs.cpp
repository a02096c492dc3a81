// The kernels that multiply pairs of bfloat16, with a tile in plain C++ instead of AMX
// instructions. These kernels run on any machine and under every sanitizer.
#define NAMERNN_VECTOR_BYTES 64
#define NAMERNN_REGISTERS 32
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "contract.h"
#include "kernel/products/terms.h"

namespace namernn_fast {
namespace {

constexpr const Kernels& kKernelsInFloat = kernels_baseline;

// Computes what AMX computes, in the same order. Processes 16 row pairs at a time with two
// accumulators: one for the first row of each pair, one for the second. Like AMX, treats subnormal
// operands and results as zero, whatever the thread's floating-point mode. The product of two
// bfloat16 numbers is exact in float unless the product is subnormal, so a separate multiplication
// and addition round like AMX's multiply-add.
struct PairTile {
  static constexpr int64_t rows = 32;

  // Reads and writes 16 or 32 rows, like AMX, although only the first `height` results are used. In
  // the backward pass of the reverse direction, the other rows are the dz of the next step, and
  // another thread may be writing them at the same time. This data race is harmless. Builds with
  // the thread sanitizer read only `height` rows, so that the sanitizer does not report the race.
  template <int kTerms>
  void multiply(const PairOperands<kTerms>* operands, int count, int64_t height, const float* start,
                float* c) {
#if defined(__SANITIZE_THREAD__)
    const int64_t read = height;
#else
    const int64_t read = height > 16 ? 32 : 16;
#endif
    add_operands(operands, count, read, start, c);
  }

  // Sums in the same order as multiply(), unlike the kernels with AMX instructions.
  template <int kTerms>
  void multiply_row(const PairOperands<kTerms>* operands, int count, const float* start, float* c) {
    add_operands(operands, count, 1, start, c);
  }

 private:
  static constexpr int64_t kWidth = 64;
  static constexpr int64_t kTileElements = 32;

  template <int kTerms>
  static void add_operands(const PairOperands<kTerms>* operands, int count, int64_t rows,
                           const float* start, float* c) {
    for (int64_t i = 0; i < rows * kWidth; ++i) c[i] = start ? start[i] : 0.0f;
    for (int o = 0; o < count; ++o) {
      const auto& [a, a_row, K, panel] = operands[o];
      for (int64_t k = 0; k < K; k += kTileElements) {
        const auto add = [&, a_row = a_row](const BFloat16* rows_of_a, const BFloat16* pairs) {
          float tile[kTileElements][kWidth];
          for (int64_t e = 0; e < kTileElements; ++e) {
            for (int64_t j = 0; j < kWidth; ++j) {
              tile[e][j] = value(pairs[(k + e) / 2 * kWidth * 2 + 2 * j + e % 2]);
            }
          }
          for (int64_t i = 0; i < rows; ++i) {
            add_tile(rows_of_a + i * a_row + k, tile, c + i * kWidth);
          }
        };
        if (kTerms == 2) add(a.term(0), panel.term(1));
        add(a.term(0), panel.term(0));
        if (kTerms == 2) add(a.term(1), panel.term(0));
      }
    }
  }

  static void add_tile(const BFloat16* a, const float (&tile)[kTileElements][kWidth], float* sums) {
    float chains[2][kWidth] = {};
    for (int64_t e = 0; e < kTileElements; ++e) {
      const float x = value(a[e]);
      float* chain = chains[e % 2];
      for (int64_t j = 0; j < kWidth; ++j) chain[j] = flushed(chain[j] + x * tile[e][j]);
    }
    for (int64_t j = 0; j < kWidth; ++j) {
      sums[j] = flushed(flushed(sums[j]) + flushed(chains[0][j] + chains[1][j]));
    }
  }

  static float flushed(float x) {
    return std::fabs(x) < std::numeric_limits<float>::min() ? 0.0f : x;
  }

  static float value(BFloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof(wide));
    return flushed(wide);
  }
};

}  // namespace
}  // namespace namernn_fast

#include "kernel/tables/pair_table.h"

namespace namernn_fast {
extern const KernelsFor<BFloat16> kernels_emulated_pairs;
const KernelsFor<BFloat16> kernels_emulated_pairs = kernels_on_pairs<BFloat16, 1>();
extern const KernelsFor<float> kernels_emulated_float[kMostTerms];
const KernelsFor<float> kernels_emulated_float[kMostTerms] = {kernels_on_pairs<float, 1>(),
                                                              kernels_on_pairs<float, 2>()};
}  // namespace namernn_fast
