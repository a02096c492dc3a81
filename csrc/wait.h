// How a thread waits for another: it spins, then gives its core away. For the kernels and for
// csrc/library/ alike; everything here has internal linkage, since the kernels' objects are
// compiled for other instruction sets than the library.
#pragma once

#include "contract.h"

namespace namernn_fast {
namespace {

constexpr int kSpins = 2000;  // about 20 to 40 us, then the core is given away
constexpr int kForEver = -1;  // rounds of wait_until

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until `done()`: spins, then yields, for ever or for so many rounds. Returns `done()`.
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
