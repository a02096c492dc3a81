// Matrix products. Sums are exact and truncated to float32 once, at the end, so results are at
// least as precise as on tensor cores. The PTX ISA documents which lane holds which element.
#include <cmath>

#include "instructions.h"
#include "numbers.h"

namespace ptx {

namespace {

float cut_off(double value) {
  const float nearest = static_cast<float>(value);
  if (std::isfinite(nearest) && std::fabs(static_cast<double>(nearest)) > std::fabs(value)) {
    return std::nextafterf(nearest, 0);
  }
  return nearest;
}

template <class Number>
constexpr int kPerRegister = static_cast<int>(4 / sizeof(Number));

// Reads a matrix from registers. Each lane holds one float or two adjacent 16-bit elements per
// register. A register covers 8 rows; the next register covers the next 8 rows of these columns.
template <class Number, int rows, int columns>
void read_fragment(Warp& warp, const Operand* from, double (&matrix)[rows][columns]) {
  constexpr int kWidth = 4 * kPerRegister<Number>;  // number of columns that a register covers
  for (int right = 0; right < columns / kWidth; ++right) {
    for (int down = 0; down < rows / 8; ++down) {
      const Number* values = warp.lanes<Number>(from[right * (rows / 8) + down]);
      for (int lane = 0; lane < kLanes; ++lane) {
        for (int i = 0; i < kPerRegister<Number>; ++i) {
          const int column = right * kWidth + lane % 4 * kPerRegister<Number> + i;
          matrix[down * 8 + lane / 4][column] = values[lane * kPerRegister<Number> + i];
        }
      }
    }
  }
}

template <class Number, int depth>
void multiply(Machine&, Warp& warp, const Instruction& at, Mask) {
  constexpr int kRegisters = depth / (4 * kPerRegister<Number>);
  double left[16][depth], right[8][depth];  // `right` is transposed
  read_fragment<Number>(warp, &at.sources[0], left);
  read_fragment<Number>(warp, &at.sources[2 * kRegisters], right);
  for (int i = 0; i < 4; ++i) {
    const float* addends = warp.lanes<float>(at.sources[3 * kRegisters + i]);
    float* results = warp.lanes<float>(at.results[i]);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
      double sum = addends[lane];
      for (int k = 0; k < depth; ++k) sum += left[row][k] * right[column][k];
      results[lane] = cut_off(sum);
    }
  }
}

template <class Number, int depth>
Entry product() {
  constexpr int kRegisters = depth / (4 * kPerRegister<Number>);
  return {multiply<Number, depth>, std::vector<int>(4, 4), std::vector<int>(3 * kRegisters + 4, 4),
          true};
}

// An operand of wgmma, with which four warps multiply matrices in shared memory. A descriptor
// defines the layout of the operand.
struct SharedMatrix {
  uint64_t start, leading, stride;
  int swizzle;  // 0: none; 1, 2, 3: rows of 128, 64, 32 bytes
  bool is_transposed;

  SharedMatrix(uint64_t descriptor, bool is_transposed)
      : start((descriptor & 0x3fff) << 4),
        leading((descriptor >> 16 & 0x3fff) << 4),
        stride((descriptor >> 32 & 0x3fff) << 4),
        swizzle(static_cast<int>(descriptor >> 62)),
        is_transposed(is_transposed) {}

  // Returns the address of an element of `size` bytes; k is its index along the summed dimension, c
  // its index along the other dimension.
  uint64_t address(uint64_t c, uint64_t k, uint64_t size) const {
    uint64_t offset;
    if (swizzle == 0) {  // tiles of 8 rows of 16 bytes
      const uint64_t in_row = 16 / size;
      offset = is_transposed
                   ? c % in_row * size + c / in_row * stride + k % 8 * 16 + k / 8 * leading
                   : c % 8 * 16 + c / 8 * stride + k % in_row * size + k / in_row * leading;
    } else {
      const uint64_t width = 256u >> swizzle, in_row = width / size;
      offset = is_transposed
                   ? c % in_row * size + c / in_row * leading + k % 8 * width + k / 8 * stride
                   : c % 8 * width + c / 8 * stride + k * size;
    }
    uint64_t at = start + offset;
    if (swizzle != 0) at ^= (at >> 7 & ((8u >> (swizzle - 1)) - 1)) << 4;
    return at;
  }
};

template <class Number>
double element(Machine& machine, Warp& warp, uint64_t address) {
  Number value;
  machine.load_shared(Thread{warp, 0}, address, sizeof(Number), &value);
  return value;
}

// Computes one warp's 16 rows of a wgmma. The sources are the right descriptor, whether to
// accumulate, and the left matrix, as a descriptor or in registers. `at.numbers` holds the number
// of columns of the right matrix, and whether the left and the right matrix are transposed.
template <class Number>
void multiply_shared(Machine& machine, Warp& warp, const MatrixProduct& product) {
  constexpr int kDepth = 8 * kPerRegister<Number>;
  const Instruction& at = *product.at;
  const int columns = static_cast<int>(at.numbers[0]);
  double left[16][kDepth];
  if (at.sources.size() > 3) {
    read_fragment<Number>(warp, &at.sources[2], left);
  } else {
    const SharedMatrix matrix(product.left, at.numbers[1]);
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < kDepth; ++k) {
        const int all_rows = 16 * (warp.number % 4) + row;
        left[row][k] = element<Number>(machine, warp, matrix.address(all_rows, k, sizeof(Number)));
      }
    }
  }
  const SharedMatrix matrix(product.right, at.numbers[2]);
  for (int column = 0; column < columns; ++column) {
    double right[kDepth];
    for (int k = 0; k < kDepth; ++k) {
      right[k] = element<Number>(machine, warp, matrix.address(column, k, sizeof(Number)));
    }
    for (int row = 0; row < 16; ++row) {
      const int lane = row % 8 * 4 + column % 8 / 2;
      const int place = column / 8 * 4 + row / 8 * 2 + column % 2;
      float& result = warp.lanes<float>(at.results[place])[lane];
      double sum = product.adds ? result : 0;
      for (int k = 0; k < kDepth; ++k) sum += left[row][k] * right[k];
      result = cut_off(sum);
    }
  }
}

// Returns a wgmma instruction. The machine computes the product when the warp commits the
// instruction or, at random, only when the warp waits for the product.
template <class Number>
Entry group_product() {
  const auto run = [](Machine&, Warp& warp, const Instruction& at, Mask) {
    MatrixProduct product{};
    product.at = &at;
    product.multiply = multiply_shared<Number>;
    product.right = warp.get(at.sources[0], 0);
    product.left = at.sources.size() > 3 ? 0 : warp.get(at.sources[2], 0);
    product.adds = warp.predicate(at.sources[1]) & 1;
    warp.products.push_back(product);
  };
  return {run, {}, {}, true};
}

void finish_products(Machine& machine, Warp& warp, size_t groups_left) {
  while (warp.product_groups.size() > groups_left) {
    for (const MatrixProduct& product : warp.product_groups.front()) {
      product.multiply(machine, warp, product);
    }
    warp.product_groups.pop_front();
  }
}

void commit_products(Machine& machine, Warp& warp, const Instruction&, Mask) {
  warp.product_groups.push_back(std::move(warp.products));
  warp.products.clear();
  if (machine.random(2) == 0) finish_products(machine, warp, 0);
}

void wait_for_products(Machine& machine, Warp& warp, const Instruction& at, Mask) {
  finish_products(machine, warp, static_cast<size_t>(at.numbers[0]));
}

}  // namespace

void add_tensor_cores(Table& table) {
  const std::string shape = "mma.sync.aligned.m16n8k";
  table[shape + "8.row.col.f32.tf32.tf32.f32"] = product<TensorFloat32, 8>();
  table[shape + "16.row.col.f32.bf16.bf16.f32"] = product<BFloat16, 16>();
  table[shape + "16.row.col.f32.f16.f16.f32"] = product<Half, 16>();
  table["wgmma.tf32"] = group_product<TensorFloat32>();
  table["wgmma.bf16"] = group_product<BFloat16>();
  table["wgmma.f16"] = group_product<Half>();
  table["wgmma.fence.sync.aligned"] = {nothing, {}, {}, true};
  table["wgmma.commit_group.sync.aligned"] = {commit_products, {}, {}, true};
  table["wgmma.wait_group"] = {wait_for_products, {}, {}, true};
}

}  // namespace ptx
