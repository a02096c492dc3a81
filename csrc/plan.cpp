// Chooses the threading plan: the split of the work that a small cost model estimates to be
// fastest.
//
// `groups` split the sequences and never wait for each other; within a group, `members` split the
// hidden units and meet at a barrier after every step. A step takes as long as its multiply-adds or
// as reading its weights from the core's private cache, whichever is longer. Weights that do not
// fit in this cache must be read from further away at every step, which adds to the time. So does
// reading the rows that other members have just written.
//
// In the backward pass, the weight gradients of several groups must be added up. Members share more
// rows there, and for many rows, reading weights from far away overlaps with the multiply-adds. (It
// does in the forward pass as well, but there a step gains more from weights in the private cache.)
//
// The constants are typical of x86-64 servers of 2022 to 2025; only their order of magnitude
// matters.
#include "plan.h"

#include <algorithm>
#include <cmath>

#include "expect.h"

namespace namernn_fast {
namespace {

constexpr double kRate = 60.0;       // float multiply-adds per ns on one core
constexpr double kNearRate = 100.0;  // bytes per ns from the core's private cache
constexpr double kFarRate = 30.0;    // bytes per ns from beyond the core's private cache
constexpr double kCacheFraction =
    0.75;  // fraction of the private cache that weights may fill; rows need the rest
constexpr double kSharedRate = 5;  // bytes per ns of rows that another core has just written
// Multiply-adds that take as long as the cell of one unit. Counted only without weight_hh, whose
// multiply-adds otherwise dwarf it.
constexpr double kCellCost = 60;
// With more rows, the backward pass reads weights from far away while it multiplies.
constexpr double kManyRows = 2 * kTileRows;
// Maximum bytes of the weight gradients that the groups sum apart, unless dz takes more.
constexpr double kMostGradients = double(64 << 20);
constexpr double kRegion = 3000;  // ns to hand work to a second thread and wait for the result
constexpr double kThread = 50;    // ns for each further thread
constexpr double kBarrier = 150;  // ns per barrier and member
constexpr double kStretch = 600;  // ns to start a stretch of a wave
constexpr double kWorth = 0.95;   // maximum time with a wave, relative to the time without a wave
constexpr int64_t kStepsAlone = 16;        // layers with at most this many steps do not form a wave
constexpr double kBackward = 3;            // time of a backward pass, relative to a forward pass
constexpr int64_t kProjectedRows = 256;    // rows to project at once ahead of the recurrence
constexpr int64_t kFarRows = 128;          // kProjectedRows if weight_ih exceeds the private cache
constexpr int64_t kMinPartSequences = 64;  // smaller parts would give products too few rows
constexpr size_t kMaxCopies = size_t(4) << 20;  // maximum total bytes of all copies of the weights

// Estimates the overhead in ns of running on this many threads.
double threading_overhead(int64_t workers) {
  return workers > 1 ? kRegion + kThread * double(workers - 2) : 0;
}

int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

PlanArguments on_one_thread(PlanArguments arguments) {
  arguments.machine.threads = 1;
  return arguments;
}

// Returns the number of elements of a weight with `width` columns.
double weight_elements(const PlanArguments& arguments, int64_t width) {
  return double(arguments.blocks) * double(arguments.H) * double(width);
}

// Returns the number of bytes of all weights.
double weight_bytes(const PlanArguments& arguments) {
  return weight_elements(arguments, arguments.D + arguments.R) * double(arguments.scalar_bytes);
}

// Returns whether a thread's weights are evicted from its private cache before the next step.
bool weights_leave_cache(const PlanArguments& arguments, const Plan& plan) {
  const int64_t panels = arguments.panels;
  const double share = double(ceiling(panels, plan.members)) / double(panels);
  return leave_cache(int64_t(weight_bytes(arguments) * share), arguments.machine);
}

// Returns how many rows to project into scratch memory in one product: at least `least`, and
// otherwise at most kProjectedRows and no more than fit in a quarter of the private cache.
int64_t fit_projected_rows(const PlanArguments& arguments, size_t scalar_bytes, int64_t least) {
  const int64_t row = arguments.blocks * arguments.H * int64_t(scalar_bytes);
  const int64_t fit = int64_t(arguments.machine.l2_bytes) / 4 / std::max<int64_t>(1, row);
  return std::max(least, std::min(kProjectedRows, fit));
}

}  // namespace

Plan choose_plan(const PlanArguments& arguments) {
  const SequenceLayout& layout = arguments.layout;
  const Machine& machine = arguments.machine;
  const int64_t panels = arguments.panels;
  const double scalar_bytes = double(arguments.scalar_bytes);
  NAMERNN_EXPECT(arguments.speed > 0);
  Plan best{1, 1, 0};
  if (layout.N == 0) return best;
  const double T = double(layout.T);
  const double rows = double(layout.N) / T;  // average number of rows per step
  const bool backward = arguments.pass == Pass::backward;
  const double all_weights = weight_elements(arguments, arguments.D + arguments.R);
  // The backward recurrence does not read weight_ih.
  const double weights = backward ? weight_elements(arguments, arguments.R) : all_weights;
  const double cell = arguments.R > 0 ? 0 : double(arguments.H) * kCellCost;
  const double dz_bytes = double(layout.N) * double(arguments.blocks * arguments.H) * scalar_bytes;
  // Members read the h of other members and, in the backward pass, also their copies of x and dz.
  const int64_t shared =
      backward ? arguments.D + (1 + arguments.blocks) * arguments.H : arguments.H;
  const double row_bytes = double(shared) * scalar_bytes;
  const double rate = kRate * arguments.speed;
  for (int64_t members = 1; members <= std::min(machine.threads, panels); ++members) {
    const int64_t max_groups = std::max<int64_t>(1, std::min(machine.threads / members, layout.B));
    // Rounds up, because a step ends only when the thread with the most work is done.
    const double share = double(ceiling(panels, members)) / double(panels);
    const double bytes = weights * share * scalar_bytes;
    for (const int64_t groups : {int64_t(1), max_groups}) {
      const double step_rows = rows * double(ceiling(layout.B, groups)) / double(layout.B);
      double step = std::max(step_rows * (weights + cell) * share / rate, bytes / kNearRate);
      if (bytes > kCacheFraction * double(machine.l2_bytes)) {
        const double far = bytes / kFarRate;
        const bool overlaps = backward && step_rows > kManyRows;
        step = overlaps ? std::max(step, far) : step + far;
      }
      if (members > 1 && arguments.R > 0) {
        step += kBarrier * double(members) + step_rows * row_bytes * (1 - share) / kSharedRate;
      }
      double time = T * step + threading_overhead(groups * members);
      if (backward) {
        const double gradients = double(groups - 1) * all_weights;  // besides the first group's
        if (gradients * scalar_bytes > std::max(kMostGradients, dz_bytes)) continue;
        time += kAddingCost * gradients / kRate / double(groups * members);
      }
      if (best.time == 0 || time < best.time) best = {groups, members, time};
    }
  }
  return best;
}

bool choose_both_at_once(const PlanArguments& arguments) {
  if (arguments.machine.threads < 2) return false;
  const double shared = choose_plan(arguments).time;
  const double alone = choose_plan(on_one_thread(arguments)).time;
  return alone + threading_overhead(2) < 2 * shared;
}

// A wave of L layers cuts time into n stretches. One thread computes a layer in the time `alone`.
// Each stretch of a layer takes a + c, where a = alone / n is the work and c is the overhead of
// starting the stretch. All layers together need `rounds` waves, and the last layer of a wave
// starts L - 1 stretches after the first. So the total time is (rounds n + L - 1) (a + c). It is
// minimal at n^2 = (L - 1) alone / (rounds c).
Wave choose_wave(const PlanArguments& arguments, int64_t layers) {
  PlanArguments recurrent = arguments;
  recurrent.pass = Pass::forward;
  recurrent.D = arguments.H;
  const SequenceLayout& layout = arguments.layout;
  const Machine& machine = arguments.machine;
  const double weight_hh = weight_elements(arguments, arguments.R);
  const Wave none{1, layout.T};
  const int64_t at_once = std::min(layers, machine.threads);
  if (at_once < 2 || layout.T <= kStepsAlone) return none;
  double shared = choose_plan(recurrent).time;
  double alone = choose_plan(on_one_thread(recurrent)).time;
  double overhead = kStretch;
  // A layer of a wave packs its weights on one thread; without a wave all threads share the
  // packing.
  const double packing = kPackingCost * 2 * weight_hh / kRate;
  if (arguments.pass == Pass::backward) {
    shared *= kBackward;
    alone *= kBackward;
    // Weight gradients are read and written once per stretch.
    overhead =
        kBackward * overhead + 2 * 2 * weight_hh * double(arguments.scalar_bytes) / kNearRate;
  }
  const double rounds = double(ceiling(layers, at_once));
  const double best = std::sqrt(double(at_once - 1) * alone / (rounds * overhead));
  const int64_t stretch =
      ceiling(layout.T, std::max<int64_t>(1, std::min(layout.T, int64_t(best))));
  const double stretches = double(ceiling(layout.T, stretch));
  const double time = (rounds * stretches + double(at_once - 1)) * (alone / stretches + overhead) +
                      rounds * packing + threading_overhead(at_once);
  const double without_wave =
      double(layers) * (shared + packing / double(std::min(machine.threads, arguments.panels)));
  return stretches > 1 && time < kWorth * without_wave ? Wave{at_once, stretch} : none;
}

bool leave_cache(int64_t bytes, const Machine& machine) {
  return bytes > int64_t(machine.l2_bytes / 2);
}

// The projections of different steps do not depend on each other. Computing several of them ahead
// of the recurrence makes tiles taller if there are few sequences, and leaves the nearest caches to
// weight_hh if weight_ih and weight_hh do not both fit. The projection must run ahead if a weight
// is read in place: a product in place handles only one weight, so the recurrence must start from
// sums that already contain the projection. With only one step, projection and recurrence run as
// one product instead: running ahead would not make tiles taller, and one product can prefetch
// across both weights.
int64_t choose_projected_steps(const PlanArguments& arguments, const Plan& plan, int64_t slices,
                               InPlace in_place) {
  const SequenceLayout& layout = arguments.layout;
  if (arguments.D == 0) return 0;
  const int64_t width = std::max<int64_t>(1, ceiling(layout.B, slices));
  const bool thin = width < kTileRows && (!layout.count || slices == 1);
  const int64_t steps = std::max<int64_t>(1, choose_projected_rows(arguments) / width);
  if (in_place.weight_ih || in_place.weight_hh) return steps;
  if (layout.T == 1) return 0;
  if (thin) return steps;
  // Running only one step ahead would not save any reads of weight_ih.
  return weights_leave_cache(arguments, plan) && steps > 1 ? steps : 0;
}

int64_t choose_encoded_steps(const PlanArguments& arguments, const Plan& plan, int64_t tile_rows) {
  if (arguments.D == 0) return 0;
  const int64_t width = ceiling(arguments.layout.B, plan.groups);
  int64_t rows = fit_projected_rows(arguments, sizeof(float), tile_rows);
  const double input_bytes = double(arguments.blocks) * double(arguments.H) * double(arguments.D) *
                             double(arguments.scalar_bytes);
  if (input_bytes > double(arguments.machine.l2_bytes)) rows = std::max(rows, kFarRows);
  const int64_t steps = std::min(rows / std::max<int64_t>(1, width), arguments.layout.T);
  const bool thin = width < tile_rows;
  return steps > 1 && (thin || weights_leave_cache(arguments, plan)) ? steps : 0;
}

// A cell with several gates projects into scratch memory, which shares the cache with the weights
// of the recurrence.
int64_t choose_projected_rows(const PlanArguments& arguments) {
  if (arguments.blocks == 1) return kProjectedRows;
  return fit_projected_rows(arguments, arguments.scalar_bytes, kTileRows);
}

// Every chunk of rows reads all weights. If they come from beyond the private cache, fewer reads of
// the weights are worth more than sums that stay in this cache, as long as all sums of a chunk take
// no more than the weights.
int64_t choose_whole_rows(const PlanArguments& arguments, int64_t row_bytes) {
  const Machine& machine = arguments.machine;
  const int64_t weights = int64_t(weight_bytes(arguments));
  const int64_t bytes = leave_cache(weights, machine) ? weights : int64_t(machine.l2_bytes) / 4;
  const int64_t fit = std::max(2 * kTileRows, bytes / std::max<int64_t>(1, row_bytes));
  return std::min(std::max<int64_t>(1, arguments.layout.B), fit);
}

int64_t choose_parts(const SequenceLayout& layout, const Plan& plan, int64_t row_bytes,
                     const Machine& machine) {
  if (layout.tree || plan.members > 1) return 1;
  return ceiling(layout.B,
                 plan.groups * std::max(kMinPartSequences, int64_t(machine.l2_bytes) / row_bytes));
}

bool choose_row_prefetch(const SequenceLayout& layout, int64_t slices, int64_t row_bytes,
                         const Machine& machine) {
  const int64_t of_step = ceiling(layout.B, slices) * row_bytes;
  const int64_t of_all_steps = ceiling(layout.N, slices) * row_bytes;
  return !layout.tree && of_all_steps > 2 * int64_t(machine.l2_bytes) &&
         !leave_cache(2 * of_step, machine);
}

bool choose_copies(size_t bytes, const Plan& plan, const Machine& machine) {
  return plan.groups == 1 ||
         (bytes <= machine.l2_bytes && bytes * size_t(plan.groups) <= kMaxCopies);
}

int64_t choose_block_rows(int64_t row_bytes, int64_t least, const Machine& machine) {
  return std::max(least, int64_t(machine.l2_bytes / 2) / row_bytes);
}

int64_t choose_workers(double multiply_adds, const Machine& machine) {
  const double serial = multiply_adds / kRate;
  const double shared = serial / double(machine.threads) + threading_overhead(machine.threads);
  return shared < serial ? machine.threads : 1;
}

Chains choose_chains(const SequenceLayout& layout, int64_t H) {
  const auto chain = [H](int64_t rows) {
    const int64_t few = std::min(rows, H);
    return few <= 2 ? kChain / 4 : few <= 12 ? kChain / 2 : kChain;
  };
  return {chain(layout.N), chain(layout.B)};
}

int64_t choose_terms(int64_t allowed, const SequenceLayout& layout, int64_t H,
                     bool batch_invariant) {
  constexpr int64_t one_term = 1;
  if (batch_invariant) return allowed == one_term ? one_term : 0;
  // There must be enough rows to make up for the cost of packing, which is lower for a single step.
  // With very few sequences, a step takes as long as reading the weights, and reading one term per
  // weight is faster than reading floats, which are twice as large.
  const bool one_step = layout.T == 1;
  const bool gains = allowed == one_term
                         ? H >= 32 && (layout.B <= 4 || layout.N >= (one_step ? 16 : 32))
                         : H >= 128 && layout.B >= 16 && layout.N >= (one_step ? 64 : 512);
  return gains ? allowed : 0;
}

InPlace choose_in_place(const SequenceLayout& layout, int64_t D, int64_t R,
                        const PanelGains& panel_gains) {
  const auto [rate, most_rows] = layout.B < 8 ? panel_gains.few : panel_gains.many;
  if (layout.N > most_rows) return {false, false};
  // Products in place consist of dot products. Each dot product ends by adding up its lanes, which
  // makes it slower than a product with panels; the longer the dot product, the smaller the
  // difference. Packing large weights costs more per element, because large weights are read from
  // further away.
  const auto gains = [&, rate = rate](int64_t K) {
    return 16 * rate * layout.N <= K + K * K / 1024;
  };
  return {gains(D), gains(R)};
}

}  // namespace namernn_fast
