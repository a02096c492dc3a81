// Lets threads wait until another thread sets the value of a Signal. Both the kernels and
// csrc/library/ use this header. Everything in it has internal linkage because the kernels are
// compiled for instruction sets other than the library's.
//
// A waiting thread spins at first and then yields its processor. A yield costs next to nothing if
// no other program wants the processor. But if a yield gives the processor to another program, the
// thread gets the processor back only after a time slice of milliseconds. If two waiting threads
// both yielded, they would take turns with the other program and advance by one step per time
// slice. So after such a yield, waiting threads sleep until the thread that they wait for wakes
// them: a thread that has slept gets a processor at once. Threads that share a processor spin only
// briefly.
#pragma once

#include "contract.h"

namespace namernn_fast {
namespace {

constexpr int kSpins = 2000;   // spins before the first yield; 20 to 40 us
constexpr int kFewSpins = 20;  // spins if the awaited thread needs this processor
constexpr int kForEver = -1;   // value of `rounds` for waiting without a limit

// A number that one thread announces and other threads wait for. All fields start at zero.
struct Signal {
  alignas(64) uint32_t value;
  uint32_t sleepers;  // number of threads that sleep until the value changes
  uint32_t crowded;   // nonzero once a yield has given a processor to another program
  uint32_t waiter;    // the processor of a thread that has spun without success; 0 if there is none
  uint32_t shared;    // nonzero if the last `waiter` was the announcer's processor
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

// Wakes the threads that sleep until the value changes. A thread that falls asleep just as the
// value changes may be missed, and then sleeps until its time limit. A fence between the change and
// this read of `sleepers` would prevent that, but would cost every barrier more than it saves.
inline void wake_sleepers(const Signal& signal, const Runtime& runtime) {
  if (__atomic_load_n(&signal.sleepers, __ATOMIC_RELAXED) > 0) runtime.wake(&signal.value);
}

// Sets the value. A thread that sees the new value also sees everything that the caller wrote
// before the call.
inline void announce(Signal& signal, uint32_t value, const Runtime& runtime) {
  __atomic_store_n(&signal.value, value, __ATOMIC_RELEASE);
  if (const uint32_t waiter = __atomic_load_n(&signal.waiter, __ATOMIC_RELAXED)) {
    const uint32_t shared = waiter == runtime.processor();
    __atomic_store_n(&signal.shared, shared, __ATOMIC_RELAXED);
    __atomic_store_n(&signal.waiter, 0u, __ATOMIC_RELAXED);
  }
  wake_sleepers(signal, runtime);
}

// Waits until done(value) is true or, unless `rounds` is kForEver, until the caller has yielded
// `rounds` times or slept once. Returns the last result of done().
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
