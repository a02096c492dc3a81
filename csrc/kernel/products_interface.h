// The interface of the types that compute the products of the backward pass: FloatProducts and, on
// instructions that multiply pairs of bfloat16, PairProducts. Each group has its own object.
#pragma once

#include <type_traits>

#include "kernel/sharing.h"
#include "kernel/time_blocks.h"
#include "kernel/weights.h"

namespace namernn_fast {
namespace {

// Checks at compile time that a type has everything that the backward pass uses.
template <class Products>
struct ProductsInterface {
  using Storage = typename Products::Storage;  // of the layer's tensors
  using Scalar = typename Products::Scalar;    // of sums
  using Element = typename Products::Element;  // of the operands of products

  template <class Given, class Wanted>
  static constexpr bool same = std::is_same_v<Given, Wanted>;

  // Columns of a panel.
  static_assert(same<decltype(Products::w), const int64_t>);
  // The hidden size.
  static_assert(same<decltype(Products::H), int64_t>);
  // The rows of dz of a time block, the stride between them, and that between the blocks of a row,
  // one block of H gradients per sum.
  static_assert(same<decltype(Products::dz), Element*>);
  static_assert(same<decltype(Products::dz_stride), int64_t>);
  static_assert(same<decltype(Products::dz_block), int64_t>);
  // Panels of previous states and of inputs, the right operands of the weight gradients.
  static_assert(same<decltype(Products::previous), Element*>);
  static_assert(same<decltype(Products::input), Element*>);

  // block_rows(layer, runtime): returns about how many rows a time block should have.
  static_assert(
      same<decltype(&Products::block_rows), int64_t (*)(const Layer<Storage>&, const Runtime&)>);
  // gradient_size(rows, width): returns how many elements the sums of a gradient [rows, width]
  // have. `rows` is H for each weight block of the cell.
  static_assert(same<decltype(&Products::gradient_size), int64_t (*)(int64_t, int64_t)>);
  // deliver_gradient(sums, result, rows, width, runtime): writes those sums to the caller's
  // `result`.
  static_assert(same<decltype(&Products::deliver_gradient),
                     void (*)(const Scalar*, Storage*, int64_t, int64_t, const Runtime&)>);
  // prepare_input_gradient(layer, panels, plan, runtime): allocates memory for the gradient of the
  // input. `panels` are those of weight_ih, or null if pack_input_panel() will be called.
  static_assert(
      same<decltype(&Products::prepare_input_gradient),
           void (Products::*)(const Layer<Storage>&, Element*, const Plan&, const Runtime&)>);
  // pack_input_panel(layer, p): packs panel p of weight_ih.
  static_assert(same<decltype(&Products::pack_input_panel),
                     void (Products::*)(const Layer<Storage>&, int64_t) const>);
  // prepare_rows(D, H, want_weights, rows, runtime): allocates memory for time blocks of at most
  // `rows` rows, and for weight gradients if `want_weights`.
  static_assert(same<decltype(&Products::prepare_rows),
                     void (Products::*)(int64_t, int64_t, bool, int64_t, const Runtime&)>);
  // keep_row(row, h, x, grad_input): keeps what the products over the time block need about one
  // row: the previous state h (null: zeros), the input x or null, and where to write its gradient
  // or null.
  static_assert(same<decltype(&Products::keep_row),
                     void (Products::*)(int64_t, const Storage*, const Storage*, Storage*) const>);
  // step_back(row, weight_hh, rows, columns, grad_h): computes these columns of grad_h = dz W_hh,
  // or += unless the cell is only_through_sums, for the rows of one time, which begin at `row`.
  static_assert(same<decltype(&Products::step_back),
                     void (Products::*)(int64_t, const Element*, int64_t, Columns, Scalar*) const>);
  // end_recurrence(rows, part): called when dz of the whole time block is known, to prepare the
  // products over its rows.
  static_assert(
      same<decltype(&Products::end_recurrence), void (Products::*)(int64_t, const Part&) const>);
  // add_weight_gradient(blocks, initial, share, zeros, rows, panels, width, grad): computes these
  // blocks of the sums `grad` of a weight gradient [.., width]: = dz^T X if `initial`, else +=. X
  // is stored in `panels`, and its first `zeros` rows are zeros.
  static_assert(same<decltype(&Products::add_weight_gradient),
                     void (Products::*)(const Blocks&, bool, Share&, int64_t, int64_t,
                                        const Element*, int64_t, Scalar*) const>);
  // write_weight_gradient(blocks, share, zeros, rows, panels, width, grad): writes these blocks of
  // the gradient, each that product, for at most kOneProductRows rows.
  static_assert(same<decltype(&Products::write_weight_gradient),
                     void (Products::*)(const Blocks&, Share&, int64_t, int64_t, const Element*,
                                        int64_t, Storage*) const>);
  // write_input_gradient(args, group, block, share, worker): grad_input = dz W_ih, or += if
  // args.accumulate_input.
  static_assert(same<decltype(&Products::write_input_gradient),
                     void (Products::*)(const Backward<Storage>&, const GroupRows&,
                                        const TimeBlock&, Share&, int64_t) const>);
};

}  // namespace
}  // namespace namernn_fast
