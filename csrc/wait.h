// How a thread waits for another one: it spins, then yields its core. Both the kernels and
// csrc/library/ use this header. Everything in it has internal linkage because the kernels are
// compiled for other instruction sets than the library.
#pragma once

#include "contract.h"

namespace namernn_fast {
namespace {

constexpr int kSpins = 2000;  // before the first yield; 20 to 40 us
constexpr int kForEver = -1;  // `rounds` of wait_until() without a limit

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until done() is true or, unless `rounds` is kForEver, until it has yielded `rounds` times.
// Returns the last done().
template <class Done>
inline bool wait_until(const Runtime& runtime, int rounds, Done&& done) {
  for (int spin = 0; spin < kSpins; ++spin) {
    if (done()) return true;
    relax();
  }
  for (int round = 0; rounds == kForEver || round < rounds; ++round) {
    if (done()) return true;
    runtime.yield();
  }
  return done();
}

}  // namespace
}  // namespace namernn_fast
