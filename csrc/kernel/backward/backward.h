// Runs the backward pass one time block at a time, from the last step to the first.
//
// For each time block, the pass first computes dz, the gradients of the sums z, by the recurrence
// dz_t = (grad_output_t + grad_h_t) act'(z_t), grad_h_{t-1} = dz_t W_hh. Then it computes the
// products dz^T h_{t-1}, dz^T x and dz W_ih over all rows of the time block, which fit in cache
// together.
//
// If the plan has several groups of sequences, each group processes its own time blocks and
// accumulates its own parameter gradients, so that rows do not move between cores. The gradients of
// all groups are added up at the end. A large group splits its sequences into parts that run one
// after the other, so that one step of a part fits in a time block.
//
// The template parameter Products computes the products: see products_interface.h.
#pragma once

#include "kernel/backward/backward_recurrence.h"
#include "kernel/backward/products_interface.h"
#include "kernel/math/subnormals.h"

namespace namernn_fast {
namespace {

template <class Products, class Storage>
void pack_input_panels(const Products& products, const Layer<Storage>& layer,
                       const Runtime& runtime) {
  const int64_t panels = panel_count<typename Products::Scalar>(layer.D);
  if (panels == 0) return;
  const double elements = double(layer.cell->gates) * double(layer.H) * double(layer.D);
  const double packing = kPackingCost / 2 * elements;
  const int64_t workers = min64(panels, choose_workers(packing, runtime.machine));
  run_parallel(runtime, workers, [&](int64_t begin, int64_t end) {
    for (int64_t p = panels * begin / workers; p < panels * end / workers; ++p) {
      products.pack_input_panel(layer, p);
    }
  });
}

// Returns the total size in bytes of the panels of weight_hh, weight_hr and weight_ih. A wave packs
// these panels once for all its stretches; a tree pass packs them once for all trees.
template <class Storage>
size_t backward_bytes(const Layer<Storage>& layer) {
  using Scalar = Compute<Storage>;
  return RecurrencePanels<Storage>::bytes(layer) +
         panels_size<Scalar>(layer.cell->gates * layer.H, layer.D) * sizeof(Scalar);
}
// Returns the address of the weight_ih panels within `panels`, as filled by pack_backward().
// Returns null if `panels` is null.
template <class Products, class Storage>
void* weight_ih_in(const void* panels, const Layer<Storage>& layer) {
  if (!panels) return nullptr;
  auto* start = static_cast<char*>(const_cast<void*>(panels));
  return start + Products::Recurrence::bytes(layer);
}
// Packs weight_hh, weight_hr and weight_ih into `panels` for the backward pass.
template <class Storage>
void pack_backward(const Layer<Storage>& layer, void* panels, const Runtime& runtime) {
  pack_all<RecurrencePanels<Storage>>(layer, panels, runtime);
  using Products = FloatProducts<Storage>;
  Products products{};
  products.weight_ih =
      static_cast<typename Products::Elements>(weight_ih_in<Products>(panels, layer));
  pack_input_panels(products, layer, runtime);
}

// Returns whether the gradients of matrices and biases are requested.
template <class Storage>
inline bool wants_matrices(const Backward<Storage>& args) {
  return args.wants_weights && !args.grad_sums.data;
}

// The shape of a weight: [blocks * block, width].
struct WeightShape {
  int64_t block;
  int64_t blocks;
  int64_t width;
};
template <class Storage>
inline WeightShape shape_of(const Layer<Storage>& layer, int parameter) {
  if (parameter == kWeightHr) return {projected_size(layer), 1, layer.H};
  return {layer.H, layer.cell->gates, parameter == kWeightIh ? layer.D : recurrent_size(layer)};
}

// Returns the number of elements in the sums of a parameter's gradient.
template <class Products, class Storage>
inline int64_t gradient_size(const Layer<Storage>& layer, int parameter) {
  const int64_t gate_rows = layer.cell->gates * layer.H;
  if (parameter == kWeightIh && has_table(layer)) return layer.table.V * gate_rows;
  if (parameter >= kOwn) return layer.cell->own_blocks[parameter - kOwn] * layer.H;
  if (is_sum_of_rows(layer, parameter)) return gate_rows;
  const auto [block, blocks, width] = shape_of(layer, parameter);
  return Products::gradient_size(block, blocks, width);
}

// Returns an array [T + 1] whose element t is the number of rows of the slice before time t.
// Returns null if all sequences of the batch are alive at every time.
inline const int64_t* count_group_rows(const SequenceLayout& layout, Slice slice,
                                       const Runtime& runtime) {
  if (!layout.count) return nullptr;
  int64_t* start = scratch<int64_t>(runtime, layout.T + 1);
  start[0] = 0;
  for (int64_t t = 0; t < layout.T; ++t) {
    start[t + 1] = start[t] + alive_end(layout, t, slice) - slice.begin;
  }
  return start;
}

template <class Products>
BackwardPass<Products> prepare_backward(const Backward<typename Products::Storage>& args,
                                        const Runtime& runtime) {
  using Scalar = typename Products::Scalar;
  using Group = BackwardGroup<Products>;
  const auto& layer = args.layer;
  const Cell& cell = *layer.cell;
  const SequenceLayout& layout = layer.layout;
  const int64_t H = layer.H;
  const bool recurrent = layout.T > 1 || reads_panels<Products>(args);
  constexpr double speed = sizeof(float) / double(Products::element_bytes);
  const Plan plan = recurrent ? choose_plan(arguments_of_plan(Pass::backward, layer, runtime,
                                                              Products::element_bytes, speed))
                              : Plan{1, 1, 0};
  Team* teams = scratch<Team>(runtime, plan.groups);
  const int64_t block_rows = Products::block_rows(layer, runtime);

  Group common{};
  common.copies = weight_copies<typename Products::Recurrence>(layer, layer.panels, plan, runtime);
  for (int i = 0; i < cell.states; ++i) {
    auto* result = layout.order ? nullptr : args.grad_initial[i];
    const int64_t size = layout.B * size_of_state(layer, i);
    common.grad[i] = accumulator<Scalar>(runtime, result, size);
    common.grad_previous[i] = layout.tree ? scratch<Scalar>(runtime, size) : common.grad[i];
  }
  const int64_t projected = projected_size(layer);
  if (projected) common.unprojected = scratch<Scalar>(runtime, layout.B * H);
  if (cell.own) {
    const int64_t panels = panel_count<Scalar>(H), w = Shape<Scalar>::panel_width;
    common.own = {scratch<Scalar>(runtime, own_blocks(cell) * panels * w), panels * w};
    for (int64_t p = 0; p < panels; ++p) pack_own(layer, p, common.own, p * w);
  }
  if (args.grad_input.data) {
    void* weight_ih = weight_ih_in<Products>(layer.panels, layer);
    common.products.prepare_input_gradient(layer, weight_ih, plan, runtime);
    if (!layer.panels) pack_input_panels(common.products, layer, runtime);
  }
  int64_t sizes[kParameters] = {};
  for (int p = 0; p < kParameters; ++p) {
    const bool is_matrix = p == kWeightIh || (p == kWeightHh && cell.has_weight_hh);
    const bool exists = args.grads[p] != nullptr || (is_matrix && wants_matrices(args));
    if (exists) sizes[p] = gradient_size<Products>(layer, p);
  }
  // Splits each group so that the rows of one step of a part fit in a time block.
  const int64_t parts =
      choose_parts(layout, plan, int64_t(runtime.machine.l2_bytes) / block_rows, runtime.machine);
  common.one_product = plan.groups == 1 && parts == 1 && layout.N <= kOneProductRows &&
                       !has_table(layer) && !args.accumulate_weights && !projected &&
                       layer.heads == 1;
  const EvenRows<Scalar> registers = row_registers<Scalar>(layer, true, plan.groups, runtime);
  Group* groups = scratch<Group>(runtime, plan.groups);
  GroupRows* rows = scratch<GroupRows>(runtime, plan.groups * parts);
  for (int64_t g = 0; g < plan.groups; ++g) {
    Group group = common;
    group.row_registers = registers.data + g * registers.stride;
    for (Scalar*& sums : group.grad_own) {
      if (cell.own) sums = scratch<Scalar>(runtime, own_blocks(cell) * H);
    }
    int64_t width = 0;  // number of sequences in the largest part
    int64_t group_rows = 0;
    for (int64_t p = g * parts; p < (g + 1) * parts; ++p) {
      const Slice slice = slice_of(layout, p, plan.groups * parts);
      rows[p] = {slice, count_group_rows(layout, slice, runtime)};
      width = max64(width, slice.end - slice.begin);
      group_rows += first_row(rows[p], layout.T);
    }
    const int64_t capacity = max64(1, min64(block_rows + width, layout.T * width));
    group.products.prepare_rows(layer, wants_matrices(args), capacity, runtime);
    if (args.wants_weights) {
      group.gradients = gradient_sums<Products>(args, sizes, g, group_rows, runtime);
      if (has_table(layer)) group.tokens = token_rows(layer.table.V, capacity, runtime);
    }
    groups[g] = group;
  }
  return {args, runtime, plan, teams, block_rows, groups, parts, rows};
}

// Returns how many rows at the start of a time block can be left out of the gradient of weight_hh,
// because their previous state is zero. These are the rows of time 0 if all sequences start from
// zeros. Returns 0 if any dz of these rows is not finite, because zero times infinity is NaN.
template <class Products>
inline int64_t count_rows_from_zero(const Layer<typename Products::Storage>& layer,
                                    const Products& products, const GroupRows& rows,
                                    const TimeBlock& block) {
  const bool from_zeros = !layer.initial[0].data && !layer.reset_to[0].data;
  if (layer.reverse || !from_zeros || block.first > 0) return 0;
  const int64_t count = first_row(rows, 1);
  for (int64_t row = 0; row < count; ++row) {
    if (!all_finite(products.dz + row * products.dz_stride, layer.cell->sums * products.dz_block)) {
      return 0;
    }
  }
  return count;
}

// Computes one worker's share of a time block's gradients: matrices and biases.
template <class Products, class Gradients>
inline void add_matrix_gradients(const Backward<typename Products::Storage>& args,
                                 const BackwardGroup<Products>& group, const TimeBlock& block,
                                 bool initial, Share& share, const Gradients& grad) {
  const Products& products = group.products;
  const Cell& cell = *args.layer.cell;
  const int64_t H = args.layer.H;
  const int64_t D = args.layer.D;
  const int64_t rows = count_rows(group.rows, block);
  const int64_t from_zero = count_rows_from_zero(args.layer, products, group.rows, block);
  if (cell.has_weight_hh && group.one_product) {
    products.write_weight_gradient(state_blocks(cell), share, from_zero, rows, products.previous,
                                   args.layer.P, args.grads[kWeightHh]);
  } else if (args.layer.heads > 1) {
    if constexpr (Products::can_project) {
      products.add_heads_gradient(initial, share, from_zero, rows, grad[kWeightHh]);
    }
  } else if (cell.has_weight_hh) {
    products.add_weight_gradient(state_blocks(cell), initial, share, from_zero, rows,
                                 products.previous, args.layer.P, grad[kWeightHh]);
  }
  if constexpr (Products::can_project) {
    products.add_projection_gradient(initial, share, rows, grad[kWeightHr]);
  }
  for_each_input_blocks(cell, [&](const Blocks& blocks) {
    if (group.one_product) {
      products.write_weight_gradient(blocks, share, 0, rows, products.input, D,
                                     args.grads[kWeightIh]);
    } else if (group.tokens.token) {
      add_table_gradient(products, group.tokens, blocks, initial, share, args.layer.table.V, rows,
                         grad[kWeightIh], cell.gates * H);
    } else {
      products.add_weight_gradient(blocks, initial, share, 0, rows, products.input, D,
                                   grad[kWeightIh]);
    }
    if (args.grads[kBiasIh]) {
      add_bias_gradient(products, blocks, initial, share, rows, grad[kBiasIh]);
    }
  });
  if (args.grads[kBiasHh]) {
    add_bias_gradient(products, state_blocks(cell), initial, share, rows, grad[kBiasHh]);
  }
}

// Computes one worker's share of the parameter and input gradients of a time block.
template <class Products>
inline void backward_products(const Backward<typename Products::Storage>& args,
                              const BackwardGroup<Products>& group, const TimeBlock& block,
                              const Accumulation& accumulation, Share share, int64_t worker) {
  const Products& products = group.products;
  const Cell& cell = *args.layer.cell;
  if (args.wants_weights) {
    const auto& grad = accumulation.apart ? group.gradients.apart : group.gradients.sums;
    const bool initial = block.initial && !group.gradients.accumulate;
    if (wants_matrices(args)) add_matrix_gradients(args, group, block, initial, share, grad);
    for (int64_t i = 0; i < cell.own; ++i) {
      if (!args.grads[kOwn + i] || !take(share)) continue;
      const int64_t elements = cell.own_blocks[i] * args.layer.H;
      if (initial) fill_zeros(grad[kOwn + i], elements);
      add(group.grad_own[0] + own_blocks(cell, i) * args.layer.H, grad[kOwn + i], elements);
    }
  }
  if (args.grad_input.data) {
    products.write_input_gradient(args, group.rows, block, share, worker);
  }
  if constexpr (Products::can_project) {
    if (args.grad_sums.data) products.write_sum_gradients(args, group.rows, block, share);
  }
}

// Calls body(part, block, accumulation) for every time block of every part of a group, and calls
// add() whenever the gradients accumulated in `apart` must be added to `sums`.
template <class Products, class Add, class Body>
inline void for_each_time_block(const BackwardPass<Products>& pass, int64_t group, Add&& add,
                                Body&& body) {
  const auto& layer = pass.args.layer;
  const auto& gradients = pass.groups[group].gradients;
  Accumulation accumulation;
  for_each_part(pass, group, [&](const BackwardGroup<Products>& part) {
    for (TimeBlock block = block_before_first(layer);
         next_block(layer, part.rows, pass.block_rows, block);) {
      body(part, block, accumulation);
      after_time_block(gradients, count_rows(part.rows, block), accumulation, add);
    }
  });
  if (accumulation.apart) add();
}

// Runs the backward pass for a plan with several groups. Each group processes its time blocks
// independently, and the members of a group split its recurrence and its products.
template <class Products>
void run_groups_apart(const BackwardPass<Products>& pass) {
  const auto& args = pass.args;
  const Runtime& runtime = pass.runtime;
  run_plan(pass.plan, args.layer, runtime, pass.teams, [&](const Part& part) {
    const FlushSubnormals flush;
    const int64_t worker = part.group * pass.plan.members + part.member;
    const auto& gradients = pass.groups[part.group].gradients;
    const auto add = [&] { add_apart(gradients, part.member, part.member + 1, part.members); };
    for_each_time_block(pass, part.group, add,
                        [&](const BackwardGroup<Products>& group, const TimeBlock& block,
                            const Accumulation& sums) {
                          backward_recurrence(args, group, block, part, runtime);
                          if (part.team) barrier(*part.team, runtime);
                          backward_products(args, group, block, sums,
                                            fixed_share(part.member, part.members), worker);
                          if (part.team) barrier(*part.team, runtime);
                        });
  });
}

// Runs the backward pass for a plan with a single group. The recurrence runs on the threads of the
// plan. The products have more work to split than the recurrence, so they may use all threads.
template <class Products>
void run_one_group(const BackwardPass<Products>& pass) {
  using Scalar = typename Products::Scalar;
  const auto& args = pass.args;
  const auto& layer = args.layer;
  const Runtime& runtime = pass.runtime;
  const auto& gradients = pass.groups[0].gradients;
  const double per_row = double(Products::element_bytes) / sizeof(Scalar) *
                         double(layer.cell->gates) * double(layer.H) *
                         ((wants_matrices(args) ? 1 : 0) * double(recurrent_size(layer) + layer.D) +
                          (args.grad_input.data ? 1 : 0) * double(layer.D));
  const auto add = [&] {
    const auto& sizes = gradients.sizes;
    const double cost = kAddingCost * double(sizes[kWeightIh] + sizes[kWeightHh]);
    const int64_t workers = choose_workers(cost, runtime.machine);
    run_parallel(runtime, workers, [&](int64_t begin, int64_t end) {
      const FlushSubnormals flush;
      add_apart(gradients, begin, end, workers);
    });
  };
  for_each_time_block(
      pass, 0, add,
      [&](const BackwardGroup<Products>& group, const TimeBlock& block, const Accumulation& sums) {
        run_plan(pass.plan, layer, runtime, pass.teams, [&](const Part& part) {
          const FlushSubnormals flush;
          backward_recurrence(args, group, block, part, runtime);
        });
        const double cost = per_row * double(count_rows(group.rows, block));
        int64_t counter = 0;
        run_parallel(runtime, choose_workers(cost, runtime.machine), [&](int64_t begin, int64_t) {
          const FlushSubnormals flush;
          backward_products(args, group, block, sums, dynamic_share(&counter), begin);
        });
      });
}

// Adds up the parameter gradients of all groups. Then converts and stores every gradient that was
// not accumulated in the caller's memory.
template <class Products>
void deliver_gradients(const BackwardPass<Products>& pass) {
  using Scalar = typename Products::Scalar;
  const auto& args = pass.args;
  const SequenceLayout& layout = args.layer.layout;
  const auto* groups = pass.groups;
  if (!std::is_same_v<typename Products::Storage, Scalar> || layout.order) {
    for (int i = 0; i < args.layer.cell->states && args.grad_initial[0]; ++i) {
      const int64_t size = size_of_state(args.layer, i);
      for (int64_t b = 0; b < layout.B; ++b) {
        convert(groups[0].grad[i] + b * size, args.grad_initial[i] + place_of(layout, b) * size,
                size);
      }
    }
  }
  if (!args.wants_weights) return;
  for (int p = 0; p < kParameters; ++p) {
    const int64_t size = groups[0].gradients.sizes[p];
    if (size == 0) continue;
    if (pass.plan.groups > 1) {
      add_up<Scalar>(pass.plan.groups, size, pass.runtime,
                     [&](int64_t g) { return groups[g].gradients.sums[p]; });
    }
    const Scalar* sums = groups[0].gradients.sums[p];
    if (is_sum_of_rows(args.layer, p)) {
      deliver(sums, args.grads[p], size);
    } else if (!groups[0].one_product) {
      const auto [block, blocks, width] = shape_of(args.layer, p);
      Products::deliver_gradient(sums, args.grads[p], block, blocks, width, pass.runtime);
    }
  }
}

template <class Products>
void backward(const Backward<typename Products::Storage>& args, const Runtime& runtime) {
  static_assert(sizeof(ProductsInterface<Products>) > 0);  // instantiates the interface's checks
  const BackwardPass<Products> pass = prepare_backward<Products>(args, runtime);
  if (pass.plan.groups > 1) {
    run_groups_apart(pass);
  } else {
    run_one_group(pass);
  }
  deliver_gradients(pass);
}

}  // namespace
}  // namespace namernn_fast
