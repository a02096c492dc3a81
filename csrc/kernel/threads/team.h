// A team is a set of threads that compute the time steps together, with a barrier after every step.
//
// A parallel region may run with fewer threads than requested if it is inside another region or if
// the pool is busy. So a team consists of the threads that arrive in time. The first thread waits
// briefly for the others and then closes the team; threads that arrive later do not join. Results
// do not depend on the number of members.
#pragma once

#include "contract.h"
#include "wait.h"

namespace namernn_fast {
namespace {

// The counters are on separate cache lines, to avoid false sharing between the members.
struct Team {
  Signal joined;                 // members so far; at least kClosed once the team is closed
  Signal members;                // number of members; 0 until the team is closed
  Signal round;                  // number of completed barriers, modulo 2^32
  alignas(64) uint32_t arrived;  // number of members waiting at the barrier
};

constexpr uint32_t kClosed = uint32_t(1) << 30;
constexpr int kFormationRounds = 64;  // maximum yields while the first member waits for others

// Joins the team. Returns the caller's member number, or -1 if the team is already closed. The
// first member waits until the team has `expected` members, but only for a limited time.
inline int64_t join(Team& team, int64_t expected, const Runtime& runtime) {
  const uint32_t place = __atomic_fetch_add(&team.joined.value, 1u, __ATOMIC_ACQ_REL);
  if (place >= kClosed) return -1;
  if (place == 0) {
    wait_until(team.joined, runtime, kFormationRounds,
               [&](uint32_t joined) { return int64_t(joined) >= expected; });
    announce(team.members, __atomic_fetch_add(&team.joined.value, kClosed, __ATOMIC_ACQ_REL),
             runtime);
  } else {
    wake_sleepers(team.joined, runtime);
    wait_until(team.members, runtime, kForEver, [](uint32_t members) { return members > 0; });
  }
  return place;
}

// Returns the number of members of a closed team.
inline int64_t members_of(const Team& team) { return value_of(team.members); }

// Waits until all members have called barrier(). Each member then sees everything that the other
// members wrote before the barrier.
inline void barrier(Team& team, const Runtime& runtime) {
  const uint32_t members = team.members.value;  // constant once the team is closed
  if (members == 1) return;
  const uint32_t round = value_of(team.round);
  if (__atomic_add_fetch(&team.arrived, 1u, __ATOMIC_ACQ_REL) == members) {
    __atomic_store_n(&team.arrived, 0u, __ATOMIC_RELAXED);
    announce(team.round, round + 1, runtime);
  } else {
    wait_until(team.round, runtime, kForEver, [&](uint32_t now) { return now != round; });
  }
}

}  // namespace
}  // namespace namernn_fast
