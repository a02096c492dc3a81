// The threading plan: a small cost model in nanoseconds, minimised over the ways to share the work.
//
// `groups` share out the sequences and never wait for each other; within a group `members` share
// out the hidden units and meet at a barrier after every step. A step takes the longer of its
// multiply-adds and of reading its weights from the core's own cache; weights that do not fit there
// come from further away at every step, and that adds to the time. The constants are of the order
// of several x86-64 servers of 2022 to 2025; the plan needs no more than the order.
#include "plan.h"

#include <algorithm>
#include <cmath>

namespace namernn_fast {
namespace {

constexpr double kRate = 60.0;       // float multiply-adds per ns on one core
constexpr double kNear = 100.0;      // bytes per ns from the core's own cache
constexpr double kFar = 30.0;        // bytes per ns from beyond that cache
constexpr double kFits = 0.75;       // share of that cache for weights; rows want the rest
constexpr double kRegion = 3000;     // ns to hand work to one other thread and get it back
constexpr double kThread = 50;       // ns for every further thread
constexpr double kMeeting = 150;     // ns of a barrier for every member
constexpr double kStretch = 600;     // ns to begin a stretch of a wave
constexpr double kWorth = 0.95;      // a wave must take less than this share of the time without it
constexpr int64_t kStepsAlone = 16;  // up to this many steps, layers form no wave
constexpr double kBackward = 3;      // time of the backward pass in forward passes
constexpr int64_t kProjectedRows = 256;  // of the projection at once, if it runs ahead

double handing_over(int64_t workers) {
  return workers > 1 ? kRegion + kThread * double(workers - 2) : 0;
}

int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

Workload on_one_thread(Workload workload) {
  workload.machine.threads = 1;
  return workload;
}

}  // namespace

Plan choose_plan(const Workload& workload) {
  const auto& [layout, machine, D, H, panels, scalar_bytes] = workload;
  Plan best{1, 1, 0};
  if (layout.N == 0) return best;
  const double T = double(layout.T);
  const double rows = double(layout.N) / T;  // alive at an average step
  const double weights = double(H) * double(D + H);
  const double rate = kRate * sizeof(float) / double(scalar_bytes);
  for (int64_t members = 1; members <= std::min(machine.threads, panels); ++members) {
    const int64_t most = std::max<int64_t>(1, std::min(machine.threads / members, layout.B));
    // The largest shares, where they do not divide evenly.
    const double share = double(ceiling(panels, members)) / double(panels);
    const double bytes = weights * share * double(scalar_bytes);
    for (const int64_t groups : {int64_t(1), most}) {
      const double step_rows = rows * double(ceiling(layout.B, groups)) / double(layout.B);
      double step = std::max(step_rows * weights * share / rate, bytes / kNear);
      if (bytes > kFits * double(machine.l2_bytes)) step += bytes / kFar;
      if (members > 1) step += kMeeting * double(members);
      const double time = T * step + handing_over(groups * members);
      if (best.time == 0 || time < best.time) best = {groups, members, time};
    }
  }
  return best;
}

bool choose_both_at_once(const Workload& workload) {
  if (workload.machine.threads < 2) return false;
  const double shared = choose_plan(workload).time;
  const double alone = choose_plan(on_one_thread(workload)).time;
  return alone + handing_over(2) < 2 * shared;
}

// The layers of a wave take a + c for each of n stretches, with a = alone / n of work and c to
// begin a stretch, and the last layers wait as long again for the first stretch to reach them:
// (rounds n + layers - 1) (a + c), which is least at n^2 = (layers - 1) alone / (rounds c).
Wave choose_wave(const Workload& workload, int64_t layers, Pass pass) {
  Workload recurrent = workload;
  recurrent.D = workload.H;
  const auto& [layout, machine, D, H, panels, scalar_bytes] = recurrent;
  const Wave none{1, layout.T};
  const int64_t at_once = std::min(layers, machine.threads);
  if (at_once < 2 || layout.T <= kStepsAlone) return none;
  double shared = choose_plan(recurrent).time;
  double alone = choose_plan(on_one_thread(recurrent)).time;
  double begin = kStretch;
  // Done by the one thread of a layer, or shared out.
  const double packing = kPackingCost * 2 * double(H) * double(H) / kRate;
  if (pass == Pass::backward) {
    shared *= kBackward;
    alone *= kBackward;
    // The gradients of the weights are read and written once for every stretch.
    begin = kBackward * begin + 2 * 2 * double(H) * double(H) * double(scalar_bytes) / kNear;
  }
  const double rounds = double(ceiling(layers, at_once));
  const double best = std::sqrt(double(at_once - 1) * alone / (rounds * begin));
  const int64_t stretch =
      ceiling(layout.T, std::max<int64_t>(1, std::min(layout.T, int64_t(best))));
  const double stretches = double(ceiling(layout.T, stretch));
  const double time = (rounds * stretches + double(at_once - 1)) * (alone / stretches + begin) +
                      rounds * packing + handing_over(at_once);
  const double otherwise =
      double(layers) * (shared + packing / double(std::min(machine.threads, panels)));
  return stretches > 1 && time < kWorth * otherwise ? Wave{at_once, stretch} : none;
}

// The projection is parallel in time. Ahead of the recurrence, several steps at once, it has better
// tiles where few sequences make thin ones, and leaves the nearest caches to weight_hh where both
// weights would not fit. Products that read weights in place start from the projection.
int64_t choose_projected_steps(const Workload& workload, const Plan& plan, int64_t slices,
                               InPlace in_place) {
  const auto& [layout, machine, D, H, panels, scalar_bytes] = workload;
  if (D == 0) return 0;
  const int64_t width = std::max<int64_t>(1, ceiling(layout.B, slices));
  const bool thin = width < kTileRows && (!layout.count || slices == 1);
  const double share = double(ceiling(panels, plan.members)) / double(panels);
  const double bytes = double(H) * double(D + H) * share * double(scalar_bytes);
  const bool ahead =
      in_place.weight_ih || in_place.weight_hh || thin || bytes > double(machine.l2_bytes / 2);
  return ahead ? std::max<int64_t>(1, kProjectedRows / width) : 0;
}

int64_t choose_workers(double multiply_adds, const Machine& machine) {
  const double serial = multiply_adds / kRate;
  const double shared = serial / double(machine.threads) + handing_over(machine.threads);
  return shared < serial ? machine.threads : 1;
}

Chains choose_chains(const SequenceLayout& layout, int64_t H) {
  const auto chain = [H](int64_t rows) {
    const int64_t few = std::min(rows, H);
    return few <= 2 ? kChain / 4 : few <= 12 ? kChain / 2 : kChain;
  };
  return {chain(layout.N), chain(layout.B)};
}

InPlace choose_in_place(const SequenceLayout& layout, int64_t D, int64_t H, int64_t panel_rate) {
  // Adding up the lanes makes a dot product slower than a product with panels, but the longer it
  // is, the less; and packing costs more, the further away the weights are.
  const auto gains = [&](int64_t K) { return 16 * panel_rate * layout.N <= K + K * K / 1024; };
  return {gains(D), gains(H)};
}

}  // namespace namernn_fast
