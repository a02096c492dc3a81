// bfloat16 kernels on AVX-512 BF16, for processors that compute dot products of bfloat16 pairs at
// twice the rate of float multiply-adds.
#define NAMERNN_VECTOR_BYTES 64
#define NAMERNN_REGISTERS 32
#include "contract.h"
#include "kernel/products/dot_pairs.h"

namespace namernn_fast {
namespace {

constexpr const Kernels& kKernelsInFloat = kernels_avx512;

// pair_panels.h describes the interface of PairTile.
struct PairTile {
  static constexpr int64_t rows = 6;

  template <int kTerms>
  void multiply(const PairOperands<kTerms>* operands, int count, int64_t height, const float* start,
                float* c) {
    constexpr void (*blocks[])(const PairOperands<kTerms>*, int, const float*, float*) = {
        &multiply_dots<kTerms, 1, 1>, &multiply_dots<kTerms, 2, 1>, &multiply_dots<kTerms, 3, 1>,
        &multiply_dots<kTerms, 4, 1>, &multiply_dots<kTerms, 5, 1>, &multiply_dots<kTerms, 6, 1>};
    blocks[height - 1](operands, count, start, c);
  }

  template <int kTerms>
  void multiply_row(const PairOperands<kTerms>* operands, int count, const float* start, float* c) {
    multiply_dots<kTerms, 1, 2>(operands, count, start, c);
  }
};

}  // namespace
}  // namespace namernn_fast

#include "kernel/tables/pair_table.h"

namespace namernn_fast {
const KernelsFor<BFloat16> kernels_avx512_bf16 = kernels_on_pairs<BFloat16, 1>();
}  // namespace namernn_fast
