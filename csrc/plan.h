// Decisions made from sizes alone: how work is shared out among threads, which layers run at once,
// how long chains of multiply-adds are. Sees no torch.
#pragma once

#include "contract.h"

namespace namernn_fast {

// One direction of a layer on one machine: what a plan is made from.
struct Workload {
  SequenceLayout layout;
  Machine machine;
  int64_t D;  // 0: the recurrence alone
  int64_t H;
  int64_t panels;  // column panels that members can share out
  size_t scalar_bytes;
};

// How the recurrence of one direction is shared out: groups x members threads. Every group takes
// sequences of its own through all steps; its members take hidden units of these sequences each,
// with a barrier after every step.
struct Plan {
  int64_t groups;
  int64_t members;
  double time;  // in ns, by the cost model of plan.cpp
};

Plan choose_plan(const Workload& workload);

// Whether two directions are done sooner at once, with one thread each, than one after the other
// with all threads.
bool choose_both_at_once(const Workload& workload);

// How layers that feed each other run at once, a thread each: one stretch of steps after the other,
// each as soon as the layer before has done that stretch.
struct Wave {
  int64_t layers;  // at once; 1: the layers run one after the other
  int64_t steps;   // of a stretch
};

enum class Pass { forward, backward };

// For `layers` equal layers of one direction. `workload.D` is not read: layers after the first have
// H input features.
Wave choose_wave(const Workload& workload, int64_t layers, Pass pass);

// Multiply-adds that take as long as packing one element of the weights into a panel.
constexpr double kPackingCost = 8;

// Chooses the weights that the forward pass reads in place: those that few rows are multiplied
// with. The last bits of results follow from the choice, so neither threads nor caches may affect
// it. `panel_rate`: as in KernelsFor.
InPlace choose_in_place(const SequenceLayout& layout, int64_t D, int64_t H, int64_t panel_rate);

// Rows of a register tile at most.
constexpr int64_t kTileRows = 6;

// How many steps of the input projection run at once, ahead of their recurrence; 0: the projection
// of each step is summed together with its recurrent product. For a plan whose sequences are cut
// into so many `slices`. Does not affect results: sums have the same order either way.
int64_t choose_projected_steps(const Workload& workload, const Plan& plan, int64_t slices,
                               InPlace in_place);

// How many threads are worth having for so many multiply-adds that do not depend on each other.
int64_t choose_workers(double multiply_adds, const Machine& machine);

// Few rows or columns get short chains: other BLAS kernels sum them in lanes, in chains of a few,
// and the ends of chains take little of the time there. All rows count, whoever computes them: bits
// must not depend on how work is shared out.
Chains choose_chains(const SequenceLayout& layout, int64_t H);

}  // namespace namernn_fast
