// Decides from sizes alone, without torch, how threads split the work, which layers run at the same
// time, and how long chains of multiply-adds are.
#pragma once

#include "contract.h"

namespace namernn_fast {

enum class Pass { forward, backward };

// The sizes of one direction of a layer, and the machine. Plans depend on nothing else.
struct PlanArguments {
  Pass pass;
  SequenceLayout layout;
  Machine machine;
  int64_t D;  // number of input features; 0 with a token table
  int64_t H;
  int64_t panels;  // number of panels of W_hh that members can split; 1 if units are not split
  size_t scalar_bytes;
  int64_t blocks;  // number of gates: blocks of H rows in each weight
  double speed;    // rate of multiply-adds, relative to floats
  int64_t R;       // number of elements of h that a unit multiplies; 0 without weight_hh
};

// How the recurrence of one direction is split among groups * members threads. Each group takes its
// own sequences through all steps. Each member of a group computes some of the hidden units of
// these sequences and waits for the other members at a barrier after every step.
struct Plan {
  int64_t groups;
  int64_t members;
  double time;  // estimate in ns, from the cost model of plan.cpp
};

// Returns the plan with the lowest estimated time.
Plan choose_plan(const PlanArguments& arguments);

// Returns true if running two directions at the same time, on one thread each, is estimated to be
// faster than running them one after the other on all threads.
bool choose_both_at_once(const PlanArguments& arguments);

// How stacked layers run concurrently, one thread per layer. Time is cut into stretches. A
// layer starts a stretch as soon as the layer that feeds it has finished that stretch.
struct Wave {
  int64_t layers;  // number of concurrent layers; 1 means one layer after the other
  int64_t steps;   // steps per stretch
};

// Chooses the wave for `layers` unidirectional layers of equal size. Plans for H input features and
// ignores `arguments.D`: every layer except the first reads h, which has H elements or, with
// projections, fewer.
Wave choose_wave(const PlanArguments& arguments, int64_t layers);

// Cost of packing one element of a weight into a panel, in multiply-adds.
constexpr double kPackingCost = 8;
// Cost of adding one element to another, in multiply-adds.
constexpr double kAddingCost = 16;

// Chooses which weights the forward pass reads in place: weights multiplied by only a few rows. A
// unit multiplies D inputs and R elements of h. The
// choice changes the last bits of results, so it must not depend on the number of threads or on
// cache sizes.
InPlace choose_in_place(const SequenceLayout& layout, int64_t D, int64_t R,
                        const PanelGains& panel_gains);

// Returns the number of bfloat16 terms to split numbers into: `allowed`, or 0 if multiplying floats
// is estimated to be faster. The choice changes results. So it must not depend on the number of
// threads, nor on the batch if `batch_invariant` is true.
int64_t choose_terms(int64_t allowed, const SequenceLayout& layout, int64_t H,
                     bool batch_invariant);

// Maximum number of rows of a register tile.
constexpr int64_t kTileRows = 6;

// Returns true if data that a thread reads repeatedly takes more than half of the core's private
// cache, so that the data is evicted before the thread reads it again.
bool leave_cache(int64_t bytes, const Machine& machine);

// Returns how many steps of the input projection to compute at once, ahead of the recurrence. 0
// means that each step computes its projection and its recurrence as one product. `slices` is the
// number of slices that the plan cuts the sequences into. Results do not depend on this choice,
// because the order of summation is the same either way.
int64_t choose_projected_steps(const PlanArguments& arguments, const Plan& plan, int64_t slices,
                               InPlace in_place);

// Like choose_projected_steps(), for a pass on encoded rows. `tile_rows` is the maximum number of
// rows of a tile. Results do not depend on this choice.
int64_t choose_encoded_steps(const PlanArguments& arguments, const Plan& plan, int64_t tile_rows);

// Returns the number of parts into which each group cuts its sequences. A group takes one part
// after the other through all steps, so that the rows of a step (row_bytes per sequence) stay in
// the core's private cache.
int64_t choose_parts(const SequenceLayout& layout, const Plan& plan, int64_t row_bytes,
                     const Machine& machine);

// Returns true if each step should prefetch the rows of the next step, which take `row_bytes` per
// sequence: if the rows of all steps are much larger than the core's private cache, but the rows of
// two steps fit in it. `slices` is the number of slices that the plan cuts the sequences into.
bool choose_row_prefetch(const SequenceLayout& layout, int64_t slices, int64_t row_bytes,
                         const Machine& machine);

// Returns true if each group should pack its own copy of the weights. That pays off with one group,
// or if a copy (`bytes` bytes) fits in a private cache and all copies together are small.
bool choose_copies(size_t bytes, const Plan& plan, const Machine& machine);

// Returns the approximate number of rows of a time block in the backward pass: as many as fill half
// of the core's private cache, but at least `least`.
int64_t choose_block_rows(int64_t row_bytes, int64_t least, const Machine& machine);

// Returns how many rows to compute at once in a cell that needs whole rows of sums, which take
// `row_bytes` each.
int64_t choose_whole_rows(const PlanArguments& arguments, int64_t row_bytes);

// Returns how many rows to project at once if the projection runs ahead of the recurrence.
int64_t choose_projected_rows(const PlanArguments& arguments);

// Returns how many threads to use for this many independent multiply-adds: all threads, or one
// thread if the work does not justify the overhead.
int64_t choose_workers(double multiply_adds, const Machine& machine);

// Chooses chain lengths. Products with few rows or columns get shorter chains: BLAS libraries sum
// such products in several lanes, so their chains are short as well, and starting a new chain costs
// little in such a product. Counts the rows of the whole call, not of one thread, because results
// must not depend on how work is split.
Chains choose_chains(const SequenceLayout& layout, int64_t H);

}  // namespace namernn_fast
