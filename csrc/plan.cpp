// The threading rule: a small cost model in nanoseconds, minimised over the ways to share the work.
//
// `groups` share out the sequences and never wait for each other; within a group `members` share
// out the hidden units and meet at a barrier after every step. A step takes the longer of its
// multiply-adds and of reading its weights from the core's own cache; weights that do not fit there
// come from further away, every step anew, and that adds to the time. The constants are of the
// order of several x86-64 servers of 2022 to 2025; the rule needs no more than the order.
#include <algorithm>
#include <cmath>

#include "kernel.h"

namespace namernn_fast {
namespace {

constexpr double kRate = 60.0;    // float multiply-adds per ns on one core
constexpr double kNear = 100.0;   // bytes per ns from the core's own cache
constexpr double kFar = 30.0;     // bytes per ns from beyond it
constexpr double kFits = 0.75;    // of that cache; rows want the rest
constexpr double kRegion = 3000;  // ns to hand work to one other thread and get it back
constexpr double kThread = 50;    // ns for every further thread
constexpr double kMeeting = 150;  // ns of a barrier for every member
constexpr double kStretch = 600;  // ns to begin a stretch of a wave
constexpr double kWorth = 0.95;   // of the time without it: a wave that saves less is not run
constexpr double kPacking = 8;    // multiply-adds as long as packing an element of the weights
constexpr double kBackward = 3;   // times the forward pass

double handing_over(int64_t workers) {
  return workers > 1 ? kRegion + kThread * double(workers - 2) : 0;
}

int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

Plan choose_plan(const Steps& steps, const Machine& machine, int64_t D, int64_t H, int64_t panels,
                 size_t scalar_bytes) {
  Plan best{1, 1, 0};
  if (steps.N == 0) return best;
  const double T = double(steps.T);
  const double rows = double(steps.N) / T;  // alive at an average step
  const double weights = double(H) * double(D + H);
  const double rate = kRate * sizeof(float) / double(scalar_bytes);
  for (int64_t members = 1; members <= std::min(machine.threads, panels); ++members) {
    const int64_t most = std::max<int64_t>(1, std::min(machine.threads / members, steps.B));
    // The largest shares, where they do not divide evenly.
    const double share = double(ceiling(panels, members)) / double(panels);
    const double bytes = weights * share * double(scalar_bytes);
    for (const int64_t groups : {int64_t(1), most}) {
      const double step_rows = rows * double(ceiling(steps.B, groups)) / double(steps.B);
      double step = std::max(step_rows * weights * share / rate, bytes / kNear);
      if (bytes > kFits * double(machine.near_bytes)) step += bytes / kFar;
      if (members > 1) step += kMeeting * double(members);
      const double time = T * step + handing_over(groups * members);
      if (best.time == 0 || time < best.time) best = {groups, members, time};
    }
  }
  return best;
}

bool choose_both_at_once(const Steps& steps, const Machine& machine, int64_t D, int64_t H,
                         int64_t panels, size_t scalar_bytes) {
  if (machine.threads < 2) return false;
  const double shared = choose_plan(steps, machine, D, H, panels, scalar_bytes).time;
  const double alone = choose_plan(steps, {1, machine.near_bytes}, D, H, panels, scalar_bytes).time;
  return alone + handing_over(2) < 2 * shared;
}

// The layers of a wave take a + c for each of n stretches, with a = alone / n of work and c to
// begin it, and so do those that wait for the first to come by: (rounds n + layers - 1) (a + c),
// which is least at n^2 = (layers - 1) alone / (rounds c).
Wave choose_wave(const Steps& steps, const Machine& machine, int64_t H, int64_t panels,
                 size_t scalar_bytes, int64_t layers, Pass pass) {
  const Wave none{1, steps.T};
  const int64_t at_once = std::min(layers, machine.threads);
  if (at_once < 2 || steps.T <= kUnpackedSteps) return none;
  double shared = choose_plan(steps, machine, H, H, panels, scalar_bytes).time;
  double alone = choose_plan(steps, {1, machine.near_bytes}, H, H, panels, scalar_bytes).time;
  double begin = kStretch;
  // Done by the one thread of a layer, or shared out.
  const double packing = kPacking * 2 * double(H) * double(H) / kRate;
  if (pass == Pass::backward) {
    shared *= kBackward;
    alone *= kBackward;
    // The gradients of the weights are read and written once for every stretch.
    begin = kBackward * begin + 2 * 2 * double(H) * double(H) * double(scalar_bytes) / kNear;
  }
  const double rounds = double(ceiling(layers, at_once));
  const double best = std::sqrt(double(at_once - 1) * alone / (rounds * begin));
  const int64_t stretch = ceiling(steps.T, std::max<int64_t>(1, std::min(steps.T, int64_t(best))));
  const double stretches = double(ceiling(steps.T, stretch));
  const double time = (rounds * stretches + double(at_once - 1)) * (alone / stretches + begin) +
                      rounds * packing + handing_over(at_once);
  const double otherwise =
      double(layers) * (shared + packing / double(std::min(machine.threads, panels)));
  return stretches > 1 && time < kWorth * otherwise ? Wave{at_once, stretch} : none;
}

int64_t choose_workers(double multiply_adds, const Machine& machine) {
  const double serial = multiply_adds / kRate;
  const double shared = serial / double(machine.threads) + handing_over(machine.threads);
  return shared < serial ? machine.threads : 1;
}

}  // namespace namernn_fast
