// Defines the interface of the types that compute the products of the backward pass: FloatProducts
// and, on processors that multiply pairs of bfloat16, PairProducts. Each group of sequences uses
// its own object of such a type.
#pragma once

#include <type_traits>

#include "kernel/backward/time_blocks.h"
#include "kernel/threads/sharing.h"
#include "kernel/weights/weights.h"

namespace namernn_fast {
namespace {

// Checks at compile time that the type Products has all members that the backward pass uses.
template <class Products>
struct ProductsInterface {
  using Storage = typename Products::Storage;    // element type of the layer's tensors
  using Scalar = typename Products::Scalar;      // type of sums
  using Elements = typename Products::Elements;  // pointer to the elements of an operand

  template <class Actual, class Expected>
  static constexpr bool same = std::is_same_v<Actual, Expected>;

  // The number of columns of a panel.
  static_assert(same<decltype(Products::w), const int64_t>);
  // The size in bytes of an operand's element, including all of its terms.
  static_assert(same<decltype(Products::element_bytes), const size_t>);
  // Whether the sums of a gradient have the same memory layout as the gradient.
  static_assert(same<decltype(Products::sums_like_gradient), const bool>);
  // Whether layers may project h, split h into heads, or give the sums. If so, Products also has
  // grad_h(), project_back(), keep_unprojected(), add_projection_gradient(),
  // add_heads_gradient() and write_sum_gradients(): see FloatProducts.
  static_assert(same<decltype(Products::can_project), const bool>);
  // The hidden size.
  static_assert(same<decltype(Products::H), int64_t>);
  // The rows of dz in a time block, the row stride, and the stride between the blocks of a row.
  // Each block holds H gradients, one per hidden unit.
  static_assert(same<decltype(Products::dz), Elements>);
  static_assert(same<decltype(Products::dz_stride), int64_t>);
  static_assert(same<decltype(Products::dz_block), int64_t>);
  // Panels of previous states and of inputs, the right operands in products for weight gradients.
  static_assert(same<decltype(Products::previous), Elements>);
  static_assert(same<decltype(Products::input), Elements>);

  // block_rows(layer, runtime): returns the approximate number of rows of a time block.
  static_assert(
      same<decltype(&Products::block_rows), int64_t (*)(const Layer<Storage>&, const Runtime&)>);
  // gradient_size(H, blocks, width): returns the number of elements in the sums of a gradient
  // [blocks * H, width].
  static_assert(same<decltype(&Products::gradient_size), int64_t (*)(int64_t, int64_t, int64_t)>);
  // deliver_gradient(sums, result, H, blocks, width, runtime): writes the sums of a gradient to the
  // caller's `result`.
  static_assert(same<decltype(&Products::deliver_gradient),
                     void (*)(const Scalar*, Storage*, int64_t, int64_t, int64_t, const Runtime&)>);
  // dz_rows(row, first): returns where the cell writes a row of dz, starting at unit `first`. If
  // encodes_dz, this is a one-row buffer; otherwise it is dz itself. store_dz(row, columns):
  // encodes `columns` of the buffer into dz. No-op unless encodes_dz.
  static_assert(same<decltype(Products::encodes_dz), const bool>);
  static_assert(same<decltype(&Products::dz_rows), Scalar* (Products::*)(int64_t, int64_t) const>);
  static_assert(same<decltype(&Products::store_dz), void (Products::*)(int64_t, Columns) const>);
  // prepare_input_gradient(layer, panels, plan, runtime): allocates memory for the gradient of the
  // input. `panels` holds the panels of weight_ih, or is null if pack_input_panel() will be called.
  static_assert(
      same<decltype(&Products::prepare_input_gradient),
           void (Products::*)(const Layer<Storage>&, void*, const Plan&, const Runtime&)>);
  // pack_input_panel(layer, p): packs panel p of weight_ih.
  static_assert(same<decltype(&Products::pack_input_panel),
                     void (Products::*)(const Layer<Storage>&, int64_t) const>);
  // prepare_rows(layer, want_weights, rows, runtime): allocates memory for time blocks of at most
  // `rows` rows, and for weight gradients if `want_weights`.
  static_assert(same<decltype(&Products::prepare_rows),
                     void (Products::*)(const Layer<Storage>&, bool, int64_t, const Runtime&)>);
  // keep_row(row, h, x, grad_input): keeps one row's operands for the products of the time block. h
  // is the previous state (null means zeros), x is the input (may be null), and grad_input receives
  // the gradient of x (null if not wanted).
  static_assert(same<decltype(&Products::keep_row),
                     void (Products::*)(int64_t, const Storage*, const Storage*, Storage*) const>);
  // step_back(row, weight_hh, rows, columns, grad_h): computes `columns` of grad_h = dz W_hh for
  // the `rows` rows of one time step, which start at index `row` of the time block. Adds to grad_h
  // unless the cell is only_through_sums.
  static_assert(
      same<decltype(&Products::step_back),
           void (Products::*)(int64_t, const Elements&, int64_t, Columns, Scalar*) const>);
  // end_recurrence(rows, part): prepares the products over the rows of a time block. Called after
  // dz has been computed for all these rows.
  static_assert(
      same<decltype(&Products::end_recurrence), void (Products::*)(int64_t, const Part&) const>);
  // add_weight_gradient(blocks, initial, share, zeros, rows, panels, width, grad): adds dz^T X to
  // `blocks` of `grad` [.., width], the sums of a weight gradient, or overwrites these blocks if
  // `initial`. `panels` holds X, whose first `zeros` rows are zeros.
  static_assert(same<decltype(&Products::add_weight_gradient),
                     void (Products::*)(const Blocks&, bool, Share&, int64_t, int64_t,
                                        const Elements&, int64_t, Scalar*) const>);
  // write_weight_gradient(blocks, share, zeros, rows, panels, width, grad): writes dz^T X to
  // `blocks` of the caller's gradient `grad`, for at most kOneProductRows rows. `panels` holds X as
  // in add_weight_gradient().
  static_assert(same<decltype(&Products::write_weight_gradient),
                     void (Products::*)(const Blocks&, Share&, int64_t, int64_t, const Elements&,
                                        int64_t, Storage*) const>);
  // write_input_gradient(args, group, block, share, worker): computes the worker's share of
  // grad_input = dz W_ih. Adds to grad_input if args.accumulate_input.
  static_assert(same<decltype(&Products::write_input_gradient),
                     void (Products::*)(const Backward<Storage>&, const GroupRows&,
                                        const TimeBlock&, Share&, int64_t) const>);
};

}  // namespace
}  // namespace namernn_fast
