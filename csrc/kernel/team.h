// A team: threads that walk through the time steps together, with a barrier after every step.
//
// A parallel region may run with fewer threads than requested, inside another region or when the
// pool is busy. So a team consists of the threads that arrive: the first one waits briefly for the
// others and closes the team; threads that arrive later leave again. No result depends on the
// number of members.
#pragma once

#include "contract.h"
#include "wait.h"

namespace namernn_fast {
namespace {

// Each counter has its own cache line, because all members write or poll it.
struct Team {
  alignas(64) int64_t joined;   // members so far; at least kClosed once the team is closed
  alignas(64) int64_t members;  // 0 until the team is closed
  alignas(64) int64_t arrived;  // members waiting at the barrier
  alignas(64) int64_t round;    // barriers completed
};

constexpr int64_t kClosed = int64_t(1) << 62;
constexpr int kFormationRounds = 64;  // yields before the first member starts without the others

// Joins the team. Returns the caller's member number, or -1 if the team is closed already. The
// first member waits for `expected` members, for a limited time.
inline int64_t join(Team& team, int64_t expected, const Runtime& runtime) {
  const int64_t place = __atomic_fetch_add(&team.joined, 1, __ATOMIC_ACQ_REL);
  if (place >= kClosed) return -1;
  if (place == 0) {
    wait_until(runtime, kFormationRounds,
               [&] { return __atomic_load_n(&team.joined, __ATOMIC_ACQUIRE) >= expected; });
    const int64_t members = __atomic_fetch_add(&team.joined, kClosed, __ATOMIC_ACQ_REL);
    __atomic_store_n(&team.members, members, __ATOMIC_RELEASE);
  } else {
    wait_until(runtime, kForEver,
               [&] { return __atomic_load_n(&team.members, __ATOMIC_ACQUIRE) > 0; });
  }
  return place;
}

// Returns once every member has called it. What the members wrote before is then visible to all.
inline void barrier(Team& team, const Runtime& runtime) {
  if (team.members == 1) return;
  const int64_t round = __atomic_load_n(&team.round, __ATOMIC_ACQUIRE);
  if (__atomic_add_fetch(&team.arrived, 1, __ATOMIC_ACQ_REL) == team.members) {
    __atomic_store_n(&team.arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&team.round, round + 1, __ATOMIC_RELEASE);
  } else {
    wait_until(runtime, kForEver,
               [&] { return __atomic_load_n(&team.round, __ATOMIC_ACQUIRE) != round; });
  }
}

}  // namespace
}  // namespace namernn_fast
