// The threading plan: a cost model in nanoseconds, minimized over the ways to divide the work.
//
// Groups divide the sequences and never wait for each other. The members of a group divide the
// hidden units and meet at a barrier after every step. A step takes as long as its multiply-adds or
// as reading its weights from the core's own cache, whichever is longer. Weights that do not fit in
// that cache are read from farther away at every step, and that time is added. The constants are
// typical of x86-64 servers from 2022 to 2025; the order of magnitude is enough.
#include "plan.h"

#include <algorithm>
#include <cmath>

namespace namernn_fast {
namespace {

constexpr double kRate = 60.0;       // float multiply-adds per ns on one core
constexpr double kNear = 100.0;      // bytes per ns from the core's own cache
constexpr double kFar = 30.0;        // bytes per ns from beyond that cache
constexpr double kFits = 0.75;       // fraction of that cache for weights; rows need the rest
constexpr double kRegion = 3000;     // ns to hand work to another thread and wait for the result
constexpr double kThread = 50;       // ns for each thread after that
constexpr double kBarrier = 150;     // ns per member and barrier
constexpr double kStretch = 600;     // ns to start one stretch of a wave
constexpr double kWorth = 0.95;      // a wave must take less than this fraction of the time without
constexpr int64_t kStepsAlone = 16;  // layers of at most this many steps form no wave
constexpr double kBackward = 3;      // time of a backward pass in units of a forward pass
constexpr int64_t kProjectedRows = 256;  // rows projected at once when the projection runs ahead

double handoff_time(int64_t workers) {
  return workers > 1 ? kRegion + kThread * double(workers - 2) : 0;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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
  const double rows = double(layout.N) / T;  // per step, on average
  const double weights = double(H) * double(D + H);
  const double rate = kRate * sizeof(float) / double(scalar_bytes);
  for (int64_t members = 1; members <= std::min(machine.threads, panels); ++members) {
    const int64_t most = std::max<int64_t>(1, std::min(machine.threads / members, layout.B));
    // The largest share sets the time if the panels do not divide evenly.
    const double share = double(ceil_div(panels, members)) / double(panels);
    const double bytes = weights * share * double(scalar_bytes);
    for (const int64_t groups : {int64_t(1), most}) {
      const double step_rows = rows * double(ceil_div(layout.B, groups)) / double(layout.B);
      double step = std::max(step_rows * weights * share / rate, bytes / kNear);
      if (bytes > kFits * double(machine.l2_bytes)) step += bytes / kFar;
      if (members > 1) step += kBarrier * double(members);
      const double time = T * step + handoff_time(groups * members);
      if (best.time == 0 || time < best.time) best = {groups, members, time};
    }
  }
  return best;
}

bool choose_both_at_once(const Workload& workload) {
  if (workload.machine.threads < 2) return false;
  const double shared = choose_plan(workload).time;
  const double alone = choose_plan(on_one_thread(workload)).time;
  return alone + handoff_time(2) < 2 * shared;
}

// Each of n stretches takes a layer a + c, where a = alone / n is its work and c the time to start
// it. The last of the layers that run at once also waits for at_once - 1 stretches before its first
// one. The total is (rounds n + at_once - 1) (a + c), with its minimum at
// n^2 = (at_once - 1) alone / (rounds c).
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
  // In a wave one thread packs a layer's weights; otherwise the threads divide them.
  const double packing = kPackingCost * 2 * double(H) * double(H) / kRate;
  if (pass == Pass::backward) {
    shared *= kBackward;
    alone *= kBackward;
    // Every stretch reads and writes the gradients of the weights once.
    begin = kBackward * begin + 2 * 2 * double(H) * double(H) * double(scalar_bytes) / kNear;
  }
  const double rounds = double(ceil_div(layers, at_once));
  const double best = std::sqrt(double(at_once - 1) * alone / (rounds * begin));
  const int64_t stretch =
      ceil_div(layout.T, std::max<int64_t>(1, std::min(layout.T, int64_t(best))));
  const double stretches = double(ceil_div(layout.T, stretch));
  const double time = (rounds * stretches + double(at_once - 1)) * (alone / stretches + begin) +
                      rounds * packing + handoff_time(at_once);
  const double otherwise =
      double(layers) * (shared + packing / double(std::min(machine.threads, panels)));
  return stretches > 1 && time < kWorth * otherwise ? Wave{at_once, stretch} : none;
}

// The projection is parallel in time, so it can run several steps ahead of the recurrence. That
// fills the register tiles when there are few sequences, and leaves the cache to weight_hh when
// both weights would not fit. Products that read weights in place start from the projection.
int64_t choose_projected_steps(const Workload& workload, const Plan& plan, int64_t slices,
                               InPlace in_place) {
  const auto& [layout, machine, D, H, panels, scalar_bytes] = workload;
  if (D == 0) return 0;
  const int64_t width = std::max<int64_t>(1, ceil_div(layout.B, slices));
  const bool thin = width < kTileRows && (!layout.count || slices == 1);
  const double share = double(ceil_div(panels, plan.members)) / double(panels);
  const double bytes = double(H) * double(D + H) * share * double(scalar_bytes);
  const bool ahead =
      in_place.weight_ih || in_place.weight_hh || thin || bytes > double(machine.l2_bytes / 2);
  return ahead ? std::max<int64_t>(1, kProjectedRows / width) : 0;
}

int64_t choose_workers(double multiply_adds, const Machine& machine) {
  const double serial = multiply_adds / kRate;
  const double shared = serial / double(machine.threads) + handoff_time(machine.threads);
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
  // A dot product has to add up its lanes, which matters less the longer it is. Packing costs more
  // the larger the weights are, since they come from farther away.
  const auto gains = [&](int64_t K) { return 16 * panel_rate * layout.N <= K + K * K / 1024; };
  return {gains(D), gains(H)};
}

}  // namespace namernn_fast
