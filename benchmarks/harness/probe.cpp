// Measures the limits of a core, and the rate of the kernels' products. machine.py compiles this
// file for the instruction set that the kernels use.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <ctime>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
#define NAMERNN_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define NAMERNN_VECTOR_BYTES 32
#else
#define NAMERNN_VECTOR_BYTES 16
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
#define NAMERNN_REGISTERS 32
#else
#define NAMERNN_REGISTERS 16
#endif
#include "kernel/products/product.h"

namespace {

typedef float Vector __attribute__((vector_size(NAMERNN_VECTOR_BYTES)));
constexpr int lanes = sizeof(Vector) / sizeof(float);

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// Hides a value from the compiler, so that it is neither assumed nor optimised away.
template <class T>
void hide(T& value) {
  asm volatile("" : "+m"(value) : : "memory");
}

struct Rates {
  double best, mean;
};

// Calls f for `seconds`, and returns the highest and the mean `amount / duration` of its calls.
template <class F>
Rates rates(double seconds, double amount, F&& f) {
  double best = 0, total = 0;
  const double begin = now();
  double end = begin;
  do {
    const double start = end;
    f();
    end = now();
    total += amount;
    best = std::max(best, amount / (end - start));
  } while (end - begin < seconds);
  return {best, total / (end - begin)};
}

}  // namespace

// Returns the operations per second of independent float multiply-adds in registers. This is the
// mean over `seconds`, because the core may not sustain its highest clock.
extern "C" double multiply_add_rate(double seconds) {
  constexpr int chains = 12, steps = 20000;
  const double amount = 2.0 * chains * steps * lanes;
  const Rates found = rates(seconds, amount, [] {
    Vector a[chains], b = Vector{} + 0.999f, c = Vector{} + 0.001f;
    for (int j = 0; j < chains; ++j) a[j] = Vector{} + float(j);  // equal chains would be merged
    hide(b);
    hide(c);
    for (int i = 0; i < steps; ++i) {
#pragma GCC unroll 12
      for (int j = 0; j < chains; ++j) a[j] = a[j] * b + c;
    }
    Vector sum = {};
    for (int j = 0; j < chains; ++j) sum += a[j];
    hide(sum);
  });
  return found.mean;
}

// Returns the bytes per second at which a core rereads a block of `bytes` bytes.
extern "C" double read_rate(int64_t bytes, double seconds) {
  constexpr int64_t line = 8;  // vectors per iteration
  const int64_t vectors = bytes / int64_t(sizeof(Vector)) / line * line;
  std::vector<Vector> block(vectors, Vector{} + 1.0f);
  const int64_t passes = 1 + (int64_t(1) << 22) / bytes;
  const double amount = double(passes * vectors * int64_t(sizeof(Vector)));
  const Rates found = rates(seconds, amount, [&] {
    Vector sum[line] = {};
    for (int64_t pass = 0; pass < passes; ++pass) {
      for (int64_t i = 0; i < vectors; i += line) {
#pragma GCC unroll 8
        for (int j = 0; j < line; ++j) sum[j] += block[i + j];
      }
      hide(block[0]);
    }
    Vector total = {};
    for (int j = 0; j < line; ++j) total += sum[j];
    hide(total);
  });
  return found.best;
}

// The size of a core's L2 cache, found as in csrc/processor.cpp. Python's os.sysconf has no name
// for it.
extern "C" int64_t l2_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  if (const long size = sysconf(_SC_LEVEL2_CACHE_SIZE); size > 0) return size;
#endif
  return int64_t(1) << 20;
}

// Returns the operations per second of the forward pass's product of a [rows, K] and a [K, width]
// matrix. The matrices are in the caches that hold them, because they are multiplied repeatedly.
extern "C" double product_rate(int64_t rows, int64_t K, int64_t width, double seconds) {
  using namespace namernn_fast;
  constexpr int64_t panel_width = Shape<float>::panel_width;
  std::vector<float> a(rows * K, 0.5f), c(rows * width), bias(width, 1.0f);
  std::vector<float> panels(panels_size<float>(K, width), 0.001f);
  Operand<float> operand{a.data(), K, panels.data(), K * panel_width, K};
  const bool is_large = int64_t(panels.size() * sizeof(float)) > l2_bytes() / 2;
  if (is_large) operand.after = panels.data();  // the passes prefetch such weights, too
  const Target<float> target{c.data(), width, bias.data(), 0, false};
  const double amount = 2.0 * double(rows) * double(K) * double(width);
  const Rates found = rates(seconds, amount, [&] {
    product<float>(&operand, 1, target, rows, 0, width, NoFinish());
    hide(c[0]);
  });
  return found.mean;
}

// Measures the minimum and median seconds for a word to reach another thread that waits for it.
extern "C" void hop_seconds(double* least, double* median) {
  constexpr int hops = 2000, tries = 25;
  double measured[tries];
  for (double& seconds : measured) {
    std::atomic<int> word{0};
    std::thread other([&] {
      for (int i = 1; i <= hops; i += 2) {
        while (word.load(std::memory_order_acquire) != i) {
        }
        word.store(i + 1, std::memory_order_release);
      }
    });
    const double start = now();
    for (int i = 0; i < hops; i += 2) {
      word.store(i + 1, std::memory_order_release);
      while (word.load(std::memory_order_acquire) != i + 2) {
      }
    }
    seconds = (now() - start) / hops;
    other.join();
  }
  std::sort(measured, measured + tries);
  *least = measured[0];
  *median = measured[tries / 2];
}
