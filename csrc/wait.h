// Threads wait for each other through the value of a Signal. Both the kernels and csrc/library/
// use this header. Everything in it has internal linkage because the kernels are compiled for other
// instruction sets than the library.
//
// A waiting thread spins at first, then yields its processor, which costs next to nothing as long
// as no other program wants it. Once a yield has given the processor to another program, the thread
// gets it back only after a time slice of milliseconds. Two threads that both yield then take turns
// with that program and advance by one step per slice. So from then on waiting threads sleep, and
// the thread that they wait for wakes them: a thread that has slept gets a processor at once.
// Threads that have to share a processor hardly spin.
#pragma once

#include "contract.h"

namespace namernn_fast {
namespace {

constexpr int kSpins = 2000;   // before the first yield; 20 to 40 us
constexpr int kFewSpins = 20;  // if the thread that is waited for needs this processor
constexpr int kForEver = -1;   // `rounds` for a wait_until() without a limit

// A number that one thread announces and others wait for. Initialized with zeros.
struct Signal {
  alignas(64) uint32_t value;
  uint32_t sleepers;  // threads that sleep until the value changes
  uint32_t crowded;   // nonzero once a yield has given a processor to another program
  uint32_t waiter;    // the processor of a thread that has spun in vain; 0 if there is none
  uint32_t shared;    // nonzero if the last such thread ran on the announcer's processor
};

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

inline uint32_t value_of(const Signal& signal) {
  return __atomic_load_n(&signal.value, __ATOMIC_ACQUIRE);
}

// Wakes the threads that sleep until the value changes. No fence separates the change from this
// read of `sleepers`, because it would cost every barrier more than it saves: without it, a thread
// that falls asleep at that moment sleeps until its time limit.
inline void wake_sleepers(const Signal& signal, const Runtime& runtime) {
  if (__atomic_load_n(&signal.sleepers, __ATOMIC_RELAXED) > 0) runtime.wake(&signal.value);
}

// Sets the value. A thread that sees the value also sees everything that the caller wrote before.
inline void announce(Signal& signal, uint32_t value, const Runtime& runtime) {
  __atomic_store_n(&signal.value, value, __ATOMIC_RELEASE);
  if (const uint32_t waiter = __atomic_load_n(&signal.waiter, __ATOMIC_RELAXED)) {
    const uint32_t shared = waiter == runtime.processor();
    __atomic_store_n(&signal.shared, shared, __ATOMIC_RELAXED);
    __atomic_store_n(&signal.waiter, 0u, __ATOMIC_RELAXED);
  }
  wake_sleepers(signal, runtime);
}

// Waits until done(value) is true or, unless `rounds` is kForEver, until it has yielded `rounds`
// times or slept once. Returns the last done(value).
template <class Done>
inline bool wait_until(Signal& signal, const Runtime& runtime, int rounds, Done&& done) {
  const bool shared = __atomic_load_n(&signal.shared, __ATOMIC_RELAXED) != 0;
  for (int spin = 0; spin < (shared ? kFewSpins : kSpins); ++spin) {
    if (done(value_of(signal))) return true;
    relax();
  }
  __atomic_store_n(&signal.waiter, runtime.processor(), __ATOMIC_RELAXED);
  for (int round = 0; rounds == kForEver || round < rounds; ++round) {
    const uint32_t value = value_of(signal);
    if (done(value)) return true;
    if (!__atomic_load_n(&signal.crowded, __ATOMIC_RELAXED)) {
      if (runtime.yield()) __atomic_store_n(&signal.crowded, 1u, __ATOMIC_RELAXED);
      continue;
    }
    __atomic_fetch_add(&signal.sleepers, 1u, __ATOMIC_SEQ_CST);
    runtime.sleep(&signal.value, value);
    __atomic_fetch_sub(&signal.sleepers, 1u, __ATOMIC_RELAXED);
    if (rounds != kForEver) break;
  }
  return done(value_of(signal));
}

}  // namespace
}  // namespace namernn_fast
