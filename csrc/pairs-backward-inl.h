// The backward pass in bfloat16 on instructions that multiply pairs of bfloat16: all its products,
// of gradients dz that are rounded to bfloat16, with sums in float.
//
// dz lies twice: by rows, to be multiplied with W_hh and W_ih, and transposed, to be multiplied
// with the rows that it meets in the gradients of the weights. Right operands are panels of pairs
// of rows; the sums of a weight's gradient lie in panels as well, to be tiles that go on from where
// the last block left them.
#pragma once

#include "pairs-inl.h"

namespace namernn_fast {
namespace {

// Elements of a row so that a column of rows does not fall into few cache sets.
inline int64_t odd_steps(int64_t n) { return (padded(n) / kStep | 1) * kStep; }

// Pairs of a's and b's elements; either may be null, for zeros.
inline Vec<float> load_pairs(const BFloat16* a, const BFloat16* b, int64_t n) {
  const Vec<float> low = a ? load_upto(a, n) : Vec<float>{};
  const Vec<float> high = b ? load_upto(b, n) : Vec<float>{};
  return (Vec<float>)((Word)low >> 16 | (Word)high);
}

inline void store_pairs(BFloat16* p, Vec<float> pairs) { std::memcpy(p, &pairs, sizeof(pairs)); }

// A row of a panel of pairs: columns first .. of two rows of `width` elements, zero past their end.
inline void pack_pair_row(const BFloat16* a, const BFloat16* b, int64_t width, int64_t first,
                          BFloat16* panel_row) {
  constexpr int64_t lanes = Simd<float>::lanes;
  for (int64_t j = 0; j < Shape<float>::panel_width; j += lanes) {
    const int64_t n = min64(lanes, width - (first + j));
    store_pairs(panel_row + 2 * j, n <= 0 ? Vec<float>{}
                                          : load_pairs(a + (first + j) * (a != nullptr),
                                                       b + (first + j) * (b != nullptr), n));
  }
}

// Panel [padded(K) / 2, panel_width, 2] for columns first .. of a row-major W [K, width].
inline void pack_pair_rows(const BFloat16* w, int64_t K, int64_t width, int64_t first,
                           BFloat16* panel) {
  for (int64_t k = 0; k < padded(K); k += 2) {
    pack_pair_row(k < K ? w + k * width : nullptr, k + 1 < K ? w + (k + 1) * width : nullptr, width,
                  first, panel + k * Shape<float>::panel_width);
  }
}

// weight_hh as the backward recurrence reads it: panels of W_hh [padded(H), H].
struct PackedPairRecurrence {
  static constexpr int64_t w = Shape<float>::panel_width;

  BFloat16* weights;

  static size_t bytes(int64_t, int64_t H) {
    return panels_size<float>(padded(H), H) * sizeof(BFloat16);
  }
  PackedPairRecurrence(void* memory, int64_t, int64_t) : weights(static_cast<BFloat16*>(memory)) {}
  void pack(const Layer<BFloat16>& layer, int64_t p) const {
    pack_pair_rows(layer.weight_hh, layer.H, layer.H, p * w, weights + p * padded(layer.H) * w);
  }
};

// The tensors' rows that belong to a row of dz.
struct PairRow {
  const BFloat16* previous;  // h_{t-1}, or null: zeros
  const BFloat16* input;
  BFloat16* grad_input;  // if it is wanted
};

struct PairsWork : BackwardWork<BFloat16, BFloat16> {
  using Recurrence = PackedPairRecurrence;

  BFloat16* dz_transposed;  // [padded(H), capacity], if parameter gradients are wanted
  PairRow* rows;            // [capacity]
};

constexpr int64_t kMinPairRows = 512;    // of a block: sums of gradients are read and written once
constexpr int64_t kPairChunkRows = 256;  // of a product over a block's rows, per pass over C

inline int64_t block_rows(const PairsWork&, const Layer<BFloat16>& layer, const Runtime& runtime) {
  const int64_t row = (3 * layer.H + layer.D) * int64_t(sizeof(BFloat16));
  return max64(kMinPairRows, int64_t(runtime.machine.near_bytes / 2) / row);
}

inline void prepare_input_gradient(PairsWork& work, const Layer<BFloat16>& layer, const Plan&,
                                   const Runtime& runtime) {
  work.weight_ih = scratch<BFloat16>(runtime, panels_size<float>(padded(layer.H), layer.D));
}

inline void pack_input_panel(const PairsWork& work, const Layer<BFloat16>& layer, int64_t p) {
  constexpr int64_t w = Shape<float>::panel_width;
  pack_pair_rows(layer.weight_ih, layer.H, layer.D, p * w,
                 work.weight_ih + p * padded(layer.H) * w);
}

inline void prepare_rows(PairsWork& work, const Backward<BFloat16>& args, const Runtime& runtime) {
  const int64_t H = args.layer.H;
  work.capacity = odd_steps(work.capacity);
  work.dz_stride = odd_steps(H);
  work.dz = scratch<BFloat16>(runtime, (work.capacity + PairProduct::rows) * work.dz_stride);
  for (int64_t row = 0; H < padded(H) && row < work.capacity; ++row) {
    std::memset(work.dz + row * work.dz_stride + H, 0, (padded(H) - H) * sizeof(BFloat16));
  }
  work.rows = scratch<PairRow>(runtime, work.capacity);
  if (args.grad_weight_ih) {
    work.dz_transposed = scratch<BFloat16>(runtime, padded(H) * work.capacity);
    work.previous = scratch<BFloat16>(runtime, panels_size<float>(work.capacity, H));
    work.input = scratch<BFloat16>(runtime, panels_size<float>(work.capacity, args.layer.D));
  }
}

inline void keep_row(const Backward<BFloat16>& args, const PairsWork& work, int64_t row, int64_t t,
                     int64_t b, const BFloat16* h) {
  const Layer<BFloat16>& layer = args.layer;
  work.rows[row] = {h, row_at(layer.input, layer.steps, t, b),
                    args.grad_input.data ? row_at(args.grad_input, layer.steps, t, b) : nullptr};
}

// Columns of A[rows, padded(K)] B[K, ..]: calls finish(i, j, height, width, block) for every block
// [height, panel_width] of the product.
template <class Finish>
inline void multiply_pairs(const BFloat16* a, int64_t a_row, int64_t K, int64_t rows,
                           const BFloat16* panels, Columns columns, Finish&& finish) {
  constexpr int64_t w = Shape<float>::panel_width;
  PairProduct product;
  alignas(64) float block[PairProduct::rows * w];
  for (int64_t j = columns.first; j < columns.last; j += w) {
    for (int64_t i = 0; i < rows; i += PairProduct::rows) {
      const int64_t height = min64(PairProduct::rows, rows - i);
      product.multiply<false>(a + i * a_row, a_row, padded(K), height, panels + j * padded(K),
                              block);
      finish(i, j, height, min64(w, columns.last - j), block);
    }
  }
}

inline void step_back(const PairsWork& work, const BFloat16* dz, const BFloat16* weight_hh,
                      int64_t H, int64_t rows, Columns columns, float* grad_h) {
  multiply_pairs(dz, work.dz_stride, H, rows, weight_hh, columns,
                 [&](int64_t i, int64_t j, int64_t height, int64_t width, const float* block) {
                   for (int64_t r = 0; r < height; ++r) {
                     convert(block + r * Shape<float>::panel_width, grad_h + (i + r) * H + j,
                             width);
                   }
                 });
}

// Packs the rows of the block, kStep of them at once, for the gradients of the weights.
inline void end_recurrence(const Backward<BFloat16>& args, const PairsWork& work, int64_t rows,
                           const Part& part) {
  constexpr int64_t lanes = Simd<float>::lanes;
  constexpr int64_t w = Shape<float>::panel_width;
  const int64_t H = args.layer.H;
  const int64_t D = args.layer.D;
  if (!args.grad_weight_ih) return;
  for (int64_t first = part.member * kStep; first < rows; first += part.members * kStep) {
    const auto dz = [&](int64_t row) {
      return row < rows ? work.dz + row * work.dz_stride : nullptr;
    };
    for (int64_t i = 0; i < padded(H); i += lanes) {
      Vec<float> block[lanes];
#pragma GCC unroll 16
      for (int64_t r = 0; r < lanes; ++r) {
        const BFloat16* a = dz(first + 2 * r);
        const BFloat16* b = dz(first + 2 * r + 1);
        block[r] = load_pairs(a ? a + i : nullptr, b ? b + i : nullptr, lanes);
      }
      transpose<float>(block);
#pragma GCC unroll 16
      for (int64_t r = 0; r < lanes; ++r) {
        store_pairs(work.dz_transposed + (i + r) * work.capacity + first, block[r]);
      }
    }
    for (int64_t row = first; row < first + kStep; row += 2) {
      constexpr PairRow none{};
      const PairRow& a = row < rows ? work.rows[row] : none;
      const PairRow& b = row + 1 < rows ? work.rows[row + 1] : none;
      for (int64_t j = 0; j < H; j += w) {
        pack_pair_row(a.previous, b.previous, H, j, work.previous + j * work.capacity + row * w);
      }
      for (int64_t j = 0; j < D; j += w) {
        pack_pair_row(a.input, b.input, D, j, work.input + j * work.capacity + row * w);
      }
    }
  }
}

// Sums of a gradient [H, width]: panels of [padded(H), width].
inline int64_t gradient_size(const PairsWork&, int64_t H, int64_t width) {
  return panels_size<float>(padded(H), width);
}

inline void deliver_gradient(const PairsWork&, const float* sums, BFloat16* result, int64_t H,
                             int64_t width, const Runtime& runtime) {
  constexpr int64_t w = Shape<float>::panel_width;
  const double cost = 16 * double(H) * double(width);
  const int64_t workers = choose_workers(cost, runtime.machine);
  run_parallel(runtime, workers, [&](int64_t begin, int64_t end) {
    for (int64_t i = H * begin / workers; i < H * end / workers; ++i) {
      for (int64_t j = 0; j < width; j += w) {
        convert(sums + j * padded(H) + i * w, result + i * width + j, min64(w, width - j));
      }
    }
  });
}

inline void backward_weight(const PairsWork& work, bool initial, Share& share, int64_t H,
                            int64_t rows, const BFloat16* panels, int64_t width, float* grad) {
  constexpr int64_t w = Shape<float>::panel_width;
  static_assert(kTaskRows % PairProduct::rows == 0);
  PairProduct product;
  for (int64_t j = 0; j < width; j += w) {
    for (int64_t task = 0; task < padded(H); task += kTaskRows) {
      if (!take(share)) continue;
      const int64_t end = min64(task + kTaskRows, padded(H));
      for (int64_t k = 0; k < padded(rows); k += kPairChunkRows) {
        const int64_t K = min64(kPairChunkRows, padded(rows) - k);
        const BFloat16* panel = panels + j * work.capacity + k * w;
        for (int64_t i = task; i < end; i += PairProduct::rows) {
          const BFloat16* a = work.dz_transposed + i * work.capacity + k;
          float* c = grad + j * padded(H) + i * w;
          const int64_t height = min64(PairProduct::rows, end - i);
          initial&& k == 0 ? product.multiply<false>(a, work.capacity, K, height, panel, c)
                           : product.multiply<true>(a, work.capacity, K, height, panel, c);
        }
      }
    }
  }
}

inline void backward_input(const Backward<BFloat16>& args, const PairsWork& work,
                           const Block& block, Share& share, const float*) {
  const int64_t D = args.layer.D;
  const int64_t rows = local_row(work, block.last) - local_row(work, block.first);
  for (int64_t first = 0; first < rows; first += kTaskRows) {
    if (!take(share)) continue;
    multiply_pairs(work.dz + first * work.dz_stride, work.dz_stride, args.layer.H,
                   min64(kTaskRows, rows - first), work.weight_ih, Columns{0, D},
                   [&](int64_t i, int64_t j, int64_t height, int64_t width, float* sums) {
                     for (int64_t r = 0; r < height; ++r) {
                       BFloat16* grad = work.rows[first + i + r].grad_input + j;
                       const float* sum = sums + r * Shape<float>::panel_width;
                       for_each_vector<float>(width, [&](int64_t c, int64_t n) {
                         const Vec<float> before =
                             args.accumulate_input ? load_upto(grad + c, n) : Vec<float>{};
                         store_upto(grad + c, before + load(sum + c), n);
                       });
                     }
                   });
  }
}

inline void backward_pairs(const Backward<BFloat16>& args, const Runtime& runtime) {
  backward_with<PairsWork>(args, runtime);
}

// The backward pass packs at every call.
constexpr KernelsFor<BFloat16> kernels_on_pairs() {
  return {{&PackedPairs::bytes, &pack_all<PackedPairs, BFloat16>},
          &forward_pairs,
          {nullptr, nullptr},
          &backward_pairs};
}

}  // namespace
}  // namespace namernn_fast
