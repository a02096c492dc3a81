// Flushes subnormal numbers to zero on one thread, for the lifetime of an object.
#pragma once

#include <cstdint>

namespace namernn_fast {
namespace {

// While an object of this class exists, the thread that created it treats subnormal operands and
// results as zero, so each operand and result may be off by up to the smallest normal number.
// Gradients that vanish over many steps become subnormal, and some processors are a hundred times
// slower with such numbers.
class FlushSubnormals {
 public:
#if defined(__x86_64__)
  FlushSubnormals() : before_(__builtin_ia32_stmxcsr()) { set(before_ | 0x8040u); }  // FTZ, DAZ
#elif defined(__aarch64__)
  FlushSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    set(before_ | (uint64_t(1) << 24));  // FZ: flush to zero
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
