// Divides sequences, hidden units and loops among workers. Runs the parts of a plan.
#pragma once

#include <type_traits>

#include "kernel/products/panels.h"
#include "kernel/threads/team.h"
#include "plan.h"
#include "rows.h"

namespace namernn_fast {
namespace {

// A range of columns of a matrix, first .. last.
struct Columns {
  int64_t first;
  int64_t last;
};

// Returns one worker's columns of a matrix with `width` columns. Each worker gets whole panels, and
// all workers get about the same number of panels.
template <class Scalar>
inline Columns columns_of(int64_t width, int64_t worker, int64_t workers) {
  const int64_t panels = panel_count<Scalar>(width);
  constexpr int64_t w = Shape<Scalar>::panel_width;
  return {min64(width, panels * worker / workers * w),
          min64(width, panels * (worker + 1) / workers * w)};
}

// Splits units into ranges that each belong to one head, and calls f(head, range) for each range.
template <class Scalar, class F>
inline void for_each_head(const Layer<Scalar>& layer, Columns units, F&& f) {
  const int64_t size = layer.heads == 1 ? layer.H : layer.H / layer.heads;
  for (int64_t unit = units.first; unit < units.last;) {
    const int64_t head = layer.heads == 1 ? 0 : unit / size;
    const int64_t end = min64(units.last, (head + 1) * size);
    f(head, Columns{unit, end});
    unit = end;
  }
}

// Returns the arguments for choosing a pass's plan. `bytes` is the size of a weight, and `speed`
// the rate of multiply-adds, relative to floats.
template <class Storage>
inline PlanArguments arguments_of_plan(Pass pass, const Layer<Storage>& layer,
                                       const Runtime& runtime, size_t bytes, double speed) {
  return {pass,
          layer.layout,
          runtime.machine,
          layer.D,
          layer.H,
          panels_to_split(*layer.cell, pass == Pass::backward, layer.H, layer.heads,
                          Shape<Compute<Storage>>::panel_width),
          bytes,
          layer.cell->gates,
          speed,
          recurrent_size(*layer.cell, layer.H, layer.H, layer.heads)};
}

// Returns the first sequence of a worker's slice. All slices have about the same number of rows.
inline int64_t slice_start(const SequenceLayout& layout, int64_t worker, int64_t workers) {
  if (!layout.count || worker == workers) return layout.B * worker / workers;
  const int64_t wanted = layout.N * worker / workers;
  int64_t rows = 0;
  int64_t length = layout.T;  // length of sequence b; sequences are sorted, longest first
  for (int64_t b = 0; b < layout.B; ++b) {
    while (length > 0 && layout.count[length - 1] <= b) --length;
    if (rows + length / 2 >= wanted) return b;
    rows += length;
  }
  return layout.B;
}

// Returns the slice of the sequences that a worker computes.
inline Slice slice_of(const SequenceLayout& layout, int64_t worker, int64_t workers) {
  return {slice_start(layout, worker, workers), slice_start(layout, worker + 1, workers)};
}

// Runs body(begin, end) in parallel on ranges that together cover [0, n).
template <class Body>
inline void run_parallel(const Runtime& runtime, int64_t n, Body&& body) {
  if (n == 1) {
    body(0, 1);
  } else {
    runtime.parallel(
        n,
        [](void* context, int64_t begin, int64_t end) {
          (*static_cast<Body*>(context))(begin, end);
        },
        &body);
  }
}

// Hands out a loop's units of work. Every worker iterates over the whole loop and computes the
// units that take() assigns to it. Each unit is computed once, with the same result on any worker.
// With dynamic shares, a free worker takes the next unit, so that a slow worker does not delay the
// others. Fixed shares need no shared counter.
struct Share {
  int64_t* counter;  // number of units taken by all workers; null if the share is fixed
  int64_t workers;   // in a fixed share, the worker takes every `workers`-th unit
  int64_t mine;      // index of the next unit that this worker computes
  int64_t unit;      // index of the next unit of the loop
};

inline Share dynamic_share(int64_t* counter) {
  return {counter, 0, __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED), 0};
}
inline Share fixed_share(int64_t worker, int64_t workers) { return {nullptr, workers, worker, 0}; }

// Advances the loop by one unit. Returns whether this worker must compute that unit.
inline bool take(Share& share) {
  if (share.unit++ != share.mine) return false;
  share.mine = share.counter ? __atomic_fetch_add(share.counter, 1, __ATOMIC_RELAXED)
                             : share.mine + share.workers;
  return true;
}

// The part of the recurrence that a plan assigns to one worker: a range of sequences, a range of
// hidden units, and a range of elements of h.
struct Part {
  Slice slice;
  Columns columns;
  Columns outputs;  // the same as `columns` unless the layer projects h
  int64_t group;
  int64_t member;   // the worker's number in the team; 0 if there is no team
  int64_t members;  // number of members of the team; 1 if there is no team
  Team* team;       // null if the group has a single member

  // Returns which elements of the i-th state the part computes.
  Columns of_state(int i) const { return i == 0 ? outputs : columns; }
};

// Runs body(part) in parallel for every part of the plan. `teams` [groups] is used only if groups
// have several members.
template <class Storage, class Body>
inline void run_plan(const Plan& plan, const Layer<Storage>& layer, const Runtime& runtime,
                     Team* teams, Body&& body) {
  const int64_t workers = plan.groups * plan.members;
  for (int64_t g = 0; plan.members > 1 && g < plan.groups; ++g) teams[g] = Team{};
  run_parallel(runtime, workers, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) {
      const int64_t group = w / plan.members;
      const Slice slice = slice_of(layer.layout, group, plan.groups);
      if (plan.members == 1) {
        body(Part{slice, Columns{0, layer.H}, Columns{0, layer.P}, group, 0, 1, nullptr});
        continue;
      }
      Team& team = teams[group];
      // One thread may have to act as several workers of a group. The thread joins the team as the
      // first of these workers. By the time the thread acts as the next worker, the team is closed,
      // and join() returns -1.
      const int64_t expected = plan.members / (end - begin);
      const int64_t member = join(team, max64(1, expected), runtime);
      if (member < 0) continue;
      const int64_t members = members_of(team);
      const Columns columns = columns_of<Compute<Storage>>(layer.H, member, members);
      const Columns outputs = columns_of<Compute<Storage>>(layer.P, member, members);
      body(Part{slice, columns, outputs, group, member, members, &team});
    }
  });
}

// Returns uninitialized scratch memory. Must not be called inside a parallel region, because a
// failed allocation between two barriers would leave the other members waiting.
template <class Scalar>
inline Scalar* scratch(const Runtime& runtime, int64_t elements) {
  static_assert(std::is_trivially_copyable_v<Scalar>);  // scratch memory runs no constructors
  return static_cast<Scalar*>(runtime.scratch(size_t(elements) * sizeof(Scalar)));
}

// Returns the memory for the row registers of each group, for an equation whose pass computes
// means.
template <class Scalar, class Storage>
inline EvenRows<Scalar> row_registers(const Layer<Storage>& layer, bool backward, int64_t groups,
                                      const Runtime& runtime) {
  const Program* const program = layer.cell->program;
  if (!program) return {};
  const PassProgram& pass = backward ? program->backward : program->forward;
  const int64_t elements = pass.row_registers * (layer.H + Simd<Scalar>::lanes);
  return {scratch<Scalar>(runtime, groups * elements), elements};
}

// Returns scratch memory filled with zeros.
template <class Scalar>
inline Scalar* zeros(const Runtime& runtime, int64_t elements) {
  Scalar* memory = scratch<Scalar>(runtime, elements);
  fill_zeros(memory, elements);
  return memory;
}

}  // namespace
}  // namespace namernn_fast
