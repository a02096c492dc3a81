#include "library/inference/prepared.h"

#include <algorithm>
#include <cstring>

#include "library/arguments/program.h"
#include "library/base/runtime.h"

namespace namernn_fast {
namespace {

constexpr char kMagic[16] = "namernn_fast 5";

struct Header {
  char magic[16];
  char kernels[16];  // the instruction set of the kernels that read the panels
  int64_t cell;      // index of the cell, or kEquation
  int64_t layers;
  int64_t directions;
  int64_t parameters;  // number of parameters per direction
  int64_t D;
  int64_t H;
  int64_t V;
  int64_t P;
  int64_t heads;
  int64_t dtype;
  int64_t backward;  // 1 if the panels are for the backward pass
  uint64_t program;  // digest of an equation's program, otherwise 0
};
constexpr int64_t kAlignment = 64;

int32_t prepared_dtype(const Stack& stack) {
  return stack.int8 ? aoti_torch_dtype_int8() : stack.dtype;
}

int64_t number_of(const Cell& cell) { return cell.program ? kEquation : &cell - kernels().cells; }

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

Header header_of(const Stack& stack) {
  Header header{};
  std::memcpy(header.magic, kMagic, sizeof(kMagic));
  const bool pairs = stack.dtype == aoti_torch_dtype_bfloat16() && !stack.needs_floats();
  const char* const name = stack.int8 ? kernels().int8->name
                           : pairs    ? kernels().bfloat16_name
                                      : kernels().name;
  std::strncpy(header.kernels, name, sizeof(header.kernels) - 1);
  header.cell = number_of(*stack.cell);
  header.layers = stack.layers;
  header.directions = stack.directions;
  header.parameters = stack.parameters.count;
  header.D = stack.D;
  header.H = stack.H;
  header.V = stack.V;
  header.P = stack.P;
  header.heads = stack.heads;
  header.dtype = prepared_dtype(stack);
  header.backward = stack.backward_panels;
  if (stack.cell->program) header.program = stack.cell->program->digest;
  return header;
}

// Returns the bytes per element of a table. Kernels that can add the biases to a table store the
// result in the type that the kernels compute in.
template <class Scalar>
int64_t table_element(const KernelsFor<Scalar>& kernels) {
  return kernels.add_biases ? std::max(sizeof(Scalar), sizeof(float)) : sizeof(Scalar);
}

// Returns the format of a prepared stack's panels.
template <class Scalar>
const PanelFormat<Scalar>& panels_of(const Stack& stack) {
  const KernelsFor<Scalar>& kernels = prepared_kernels<Scalar>(stack);
  return stack.backward_panels ? kernels.backward_panels : kernels.forward_panels;
}

// Returns the length of a parameter that is a vector.
int64_t elements_of(const Stack& stack, Parameter vector) {
  return vector >= kOwn ? stack.cell->own_blocks[vector - kOwn] * stack.H : stack.gate_rows();
}

// Returns the offsets of one direction's weights in layer k, starting at the offset `begin`.
PreparedParts parts_from(const Stack& stack, int64_t k, int64_t begin) {
  PreparedParts parts{};
  parts.panels = begin;
  with_storage(stack.dtype, [&](auto storage) {
    using Scalar = decltype(storage);
    const KernelsFor<Scalar>& kernels = prepared_kernels<Scalar>(stack);
    const int64_t table = k == 0 ? stack.V * stack.gate_rows() : 0;
    Layer<Scalar> layer{};
    layer.cell = stack.cell;
    layer.D = stack.input_size(k), layer.H = stack.H, layer.P = stack.P;
    layer.heads = stack.heads;
    const size_t panels = panels_of<Scalar>(stack).bytes(layer);
    int64_t at = parts.panels + aligned(int64_t(panels));
    for (const Parameter p : stack.parameters) {
      if (!is_vector(p)) continue;
      parts.vectors[p] = at;
      at += aligned(elements_of(stack, p) * int64_t(sizeof(Scalar)));
    }
    parts.table = at;
    parts.end = parts.table + aligned(table * table_element<Scalar>(kernels));
  });
  return parts;
}

int64_t prepared_bytes(const Stack& stack) {
  return parts_of(stack, stack.layers - 1, stack.directions - 1).end;
}

template <class Scalar>
void pack_direction(const Stack& stack, int64_t k, int64_t d, char* data) {
  const KernelsFor<Scalar>& kernels = prepared_kernels<Scalar>(stack);
  const PreparedParts parts = parts_of(stack, k, d);
  Layer<Scalar> layer = layer_of<Scalar>(stack, k, d);
  layer.in_place = {};
  const Resources runtime(this_machine());
  panels_of<Scalar>(stack).pack(layer, data + parts.panels, runtime.runtime());
  for (const Parameter p : stack.parameters) {
    if (!is_vector(p)) continue;
    const size_t bytes = size_t(elements_of(stack, p)) * sizeof(Scalar);
    std::memcpy(data + parts.vectors[p], layer.parameters[p], bytes);
  }
  if (layer.table.V > 0) {
    if (kernels.add_biases) {
      kernels.add_biases(layer, data + parts.table, runtime.runtime());
    } else {
      std::memcpy(data + parts.table, layer.table.rows,
                  size_t(layer.table.V * stack.gate_rows()) * sizeof(Scalar));
    }
  }
}

template <class Scalar>
void unpack_direction(const Stack& stack, int64_t k, int64_t d, std::vector<Tensor>& weights) {
  const Layer<Scalar> layer = layer_of<Scalar>(stack, k, d);
  Scalar* to[kParameters] = {};
  for (const Parameter p : stack.parameters) {
    std::vector<int64_t> shape = stack.shape_of(p, k);
    if (p == kWeightIh) shape = {stack.gate_rows(), layer.D};  // D is 0 for token ids
    weights.push_back(empty(shape, stack.dtype));
    to[p] = mutable_data<Scalar>(weights.back());
    if (!is_vector(p)) continue;
    std::memcpy(to[p], layer.parameters[p], size_t(weights.back().numel()) * sizeof(Scalar));
  }
  panels_of<Scalar>(stack).unpack(layer, to);
}

// Requests huge pages for the part of the tensor that covers whole pages. Steps with few sequences
// read all panels from beyond L2, where page-table walks for small pages delay prefetching.
void advise_inner_pages(char* data, size_t bytes) {
  const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(data) % kHugePage) % kHugePage;
  if (bytes < before + kHugePage) return;
  advise_huge_pages(data + before, (bytes - before) / kHugePage * kHugePage);
}

// Returns the size in bytes of a contiguous 1-D tensor, or 0 for any other tensor.
int64_t bytes_of(const View& prepared) {
  if (prepared.dim != 1 || prepared.strides[0] != 1) return 0;
  return prepared.sizes[0] * prepared.element;
}

void check_header(const Stack& stack, const View& prepared) {
  const Header header = header_of(stack);
  const int64_t bytes = bytes_of(prepared);
  check(stack.layers > 0 && prepared.dtype == prepared_dtype(stack) &&
            bytes >= int64_t(sizeof(Header)) &&
            std::memcmp(prepared.data, &header, sizeof(header)) == 0 &&
            bytes >= prepared_bytes(stack),
        "prepared must come from namernn_fast::prepare on a processor with the kernels ",
        header.kernels, ", for the same cell, sizes, options and dtype");
}

void check_prepared(const Stack& stack, const Tensor& prepared) {
  check(prepared.is_cpu(), "prepared must be on the CPU");
  check_header(stack, view_of(prepared));
}

template <class F>
void for_each_direction(const Stack& stack, F&& f) {
  for (int64_t k = 0; k < stack.layers; ++k) {
    for (int64_t d = 0; d < stack.directions; ++d) f(k, d);
  }
}

}  // namespace

PreparedParts parts_of(const Stack& stack, int64_t k, int64_t d) {
  const int64_t begin = aligned(sizeof(Header));
  const int64_t first = parts_from(stack, 0, 0).end;  // bytes per direction of the first layer
  if (k == 0) return parts_from(stack, 0, begin + d * first);
  const int64_t later = parts_from(stack, 1, 0).end;  // bytes per direction of a later layer
  const int64_t before = (k - 1) * stack.directions + d;
  return parts_from(stack, k, begin + stack.directions * first + before * later);
}

int32_t dtype_of_weights(int32_t prepared, const Options& options) {
  return options.int8 ? aoti_torch_dtype_float32() : prepared;
}

Tensor prepare(const Stack& stack) {
  const int64_t element = stack.int8 ? 1 : element_size(stack.dtype);
  const int64_t bytes = prepared_bytes(stack);
  const Tensor prepared = empty({bytes / element}, prepared_dtype(stack));
  advise_inner_pages(mutable_data<char>(prepared), size_t(bytes));
  const Header header = header_of(stack);
  std::memcpy(mutable_data<char>(prepared), &header, sizeof(header));
  refresh(stack, prepared);
  return prepared;
}

void refresh(const Stack& stack, const Tensor& prepared) {
  check_prepared(stack, prepared);
  with_storage(stack.dtype, [&](auto storage) {
    for_each_direction(stack, [&](int64_t k, int64_t d) {
      pack_direction<decltype(storage)>(stack, k, d, mutable_data<char>(prepared));
    });
  });
}

std::vector<Tensor> unpack(const Stack& stack) {
  std::vector<Tensor> weights;
  with_storage(stack.dtype, [&](auto storage) {
    for_each_direction(stack, [&](int64_t k, int64_t d) {
      unpack_direction<decltype(storage)>(stack, k, d, weights);
    });
  });
  return weights;
}

void set_prepared(Stack& stack, const Tensor& prepared) {
  check_prepared(stack, prepared);
  stack.prepared = const_data<char>(prepared);
}

Stack stack_of_prepared(const Cell& cell, const View& prepared, const Options& options) {
  Header header{};
  const int64_t bytes = bytes_of(prepared);
  if (bytes >= int64_t(sizeof(Header))) std::memcpy(&header, prepared.data, sizeof(header));
  const Sizes claimed{header.layers, header.D, header.H, header.V, header.P, header.heads};
  bool known =
      std::memcmp(header.magic, kMagic, sizeof(kMagic)) == 0 && header.cell == number_of(cell);
  const auto& [layers, D, H, V, P, heads] = claimed;
  for (const int64_t size : {layers, D, H, V, P, heads}) {
    known = known && size >= 0 && size <= bytes;
  }
  known = known && can_have_heads(cell, H, heads);
  // If the header is invalid, check_header() below rejects the tensor, whatever the stack's sizes.
  const int32_t dtype = dtype_of_weights(prepared.dtype, options);
  Stack stack = check_layers(cell, known ? claimed : Sizes{0, 0, 0, 0, 0, 1}, dtype, options);
  check_header(stack, prepared);
  stack.prepared = prepared.data;
  return stack;
}

}  // namespace namernn_fast
