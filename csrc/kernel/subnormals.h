// Flushing subnormal numbers to zero, for one thread and for a while.
#pragma once

#include <cstdint>

namespace namernn_fast {
namespace {

// While an object of this class lives, its thread reads subnormal numbers as zero and writes none:
// each operand and each result may be off by the smallest normal number. Gradients that fade away
// over many steps pass through subnormal numbers, and there some processors are a hundred times
// slower.
class FlushSubnormals {
 public:
#if defined(__x86_64__)
  FlushSubnormals() : before_(__builtin_ia32_stmxcsr()) { set(before_ | 0x8040u); }
#elif defined(__aarch64__)
  FlushSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    set(before_ | (uint64_t(1) << 24));
  }
#else
  FlushSubnormals() : before_(0) {}
#endif
  ~FlushSubnormals() { set(before_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
#if defined(__x86_64__)
  static void set(unsigned state) { asm volatile("ldmxcsr %0" : : "m"(state) : "memory"); }
  unsigned before_;
#elif defined(__aarch64__)
  static void set(uint64_t state) { asm volatile("msr fpcr, %0" : : "r"(state) : "memory"); }
  uint64_t before_;
#else
  static void set(int) {}
  int before_;
#endif
};

}  // namespace
}  // namespace namernn_fast
