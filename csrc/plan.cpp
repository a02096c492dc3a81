// The threading rule: a small cost model in nanoseconds, compared for each way to share the work.
//
// A step of the recurrence costs (rows * H * (D + H)) multiply-adds at `kRate`, or, where few rows
// share a weight, what reading the weights costs. Splitting the batch costs one parallel region;
// splitting the hidden units costs a barrier at every step besides. The constants are those of a
// 2-core Zen 4; the rule needs only their order of magnitude.
#include <algorithm>

#include "kernel.h"

namespace namernn_fast {
namespace {

constexpr double kRate = 25.0;        // float multiply-adds per ns on one core
constexpr double kWeightRate = 25.0;  // weight elements read per ns by one core
constexpr double kRegion = 3000.0;    // ns to hand work to the other threads and get it back
constexpr double kBarrier = 300.0;    // ns for all threads to meet
constexpr double kThinRows = 2.0;     // below this many rows the weights' bandwidth rules

}  // namespace

Plan choose_plan(const Steps& steps, int64_t D, int64_t H, int64_t panels, size_t scalar_bytes,
                 int64_t threads) {
  const Plan serial{Plan::serial, 1};
  if (threads <= 1 || steps.N == 0) return serial;
  const double weights = double(H) * double(D + H) * double(scalar_bytes) / sizeof(float);
  const double T = double(steps.T);
  const double rows = double(steps.N) / T;  // alive at an average step
  const auto cost = [&](double share_of_rows, double share_of_weights) {
    const double step_rows = std::max(kThinRows, rows * share_of_rows);
    return T * weights * share_of_weights * std::max(step_rows / kRate, 1 / kWeightRate);
  };

  Plan best = serial;
  double best_cost = cost(1, 1);
  const auto consider = [&](Plan plan, double plan_cost) {
    if (plan_cost < best_cost) {
      best = plan;
      best_cost = plan_cost;
    }
  };
  if (const int64_t workers = std::min(threads, steps.B); workers > 1) {
    // The largest share of a batch that does not divide evenly.
    const double share = double((steps.B + workers - 1) / workers) / double(steps.B);
    consider({Plan::batch, workers}, kRegion + cost(share, 1));
  }
  if (const int64_t workers = std::min(threads, panels); workers > 1) {
    const double share = double((panels + workers - 1) / workers) / double(panels);
    consider({Plan::hidden, workers}, kRegion + T * kBarrier + cost(1, share));
  }
  return best;
}

}  // namespace namernn_fast
