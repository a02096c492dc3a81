// Threads that walk through the time steps together.
//
// A parallel region may run with fewer threads than asked for: inside another region, or when the
// pool is busy. So the team is whoever shows up: the first to come waits a little for the others,
// then closes it, and late comers leave. No result depends on the number of members.
#pragma once

#include "kernel.h"

namespace namernn_fast {
namespace {

struct Team {
  alignas(64) int64_t joined;   // members so far; negative once closed
  alignas(64) int64_t members;  // 0 until closed
  alignas(64) int64_t arrived;
  alignas(64) int64_t round;
};

constexpr int64_t kClosed = int64_t(1) << 62;
constexpr int kSpins = 2000;          // about 20 to 40 us, then the core is given away
constexpr int kFormationRounds = 64;  // yields before the first member starts without the others

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until `done()`: spins, then yields, for ever or `rounds` times.
template <class Done>
inline bool wait_until(const Runtime& runtime, int rounds, Done&& done) {
  for (int spin = 0; spin < kSpins; ++spin) {
    if (done()) return true;
    relax();
  }
  for (int round = 0; rounds < 0 || round < rounds; ++round) {
    if (done()) return true;
    runtime.yield();
  }
  return done();
}

// The caller's place in the team, or -1: it was closed already. `expected` members may come.
inline int64_t join(Team& team, int64_t expected, const Runtime& runtime) {
  const int64_t place = __atomic_fetch_add(&team.joined, 1, __ATOMIC_ACQ_REL);
  if (place >= kClosed) return -1;
  if (place == 0) {
    wait_until(runtime, kFormationRounds,
               [&] { return __atomic_load_n(&team.joined, __ATOMIC_ACQUIRE) >= expected; });
    const int64_t members = __atomic_fetch_add(&team.joined, kClosed, __ATOMIC_ACQ_REL);
    __atomic_store_n(&team.members, members, __ATOMIC_RELEASE);
  } else {
    wait_until(runtime, -1, [&] { return __atomic_load_n(&team.members, __ATOMIC_ACQUIRE) > 0; });
  }
  return place;
}

// Returns once every member has called it this round; what they wrote before is visible then.
inline void barrier(Team& team, const Runtime& runtime) {
  if (team.members == 1) return;
  const int64_t round = __atomic_load_n(&team.round, __ATOMIC_ACQUIRE);
  if (__atomic_add_fetch(&team.arrived, 1, __ATOMIC_ACQ_REL) == team.members) {
    __atomic_store_n(&team.arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&team.round, round + 1, __ATOMIC_RELEASE);
  } else {
    wait_until(runtime, -1,
               [&] { return __atomic_load_n(&team.round, __ATOMIC_ACQUIRE) != round; });
  }
}

}  // namespace
}  // namespace namernn_fast
