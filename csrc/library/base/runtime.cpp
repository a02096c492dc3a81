#include "library/base/runtime.h"

#include <torch/csrc/stable/ops.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <chrono>
#include <climits>
#include <ctime>
#include <new>
#include <thread>

#include "processor.h"

// Of torch's OpenMP library, if that has OpenMP 5.0. Otherwise null.
extern "C" [[gnu::weak]] int omp_pause_resource_all(int kind);

namespace namernn_fast {

thread_local std::unique_ptr<char, Scratch::Free> Scratch::region_;

void* Scratch::take(size_t bytes) {
  bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  if (used_ + bytes > kRegion) return take_from_segments(bytes);
  if (!region_) {
    void* p = nullptr;
    if (posix_memalign(&p, kAlignment, kRegion) != 0) throw std::bad_alloc();
    region_.reset(static_cast<char*>(p));
  }
  void* p = region_.get() + used_;
  used_ += bytes;
  return p;
}

void* Scratch::take_from_segments(size_t bytes) {
  if (segments_.empty() || used_of_segment_ + bytes > segments_.back().bytes()) {
    segments_.emplace_back(bytes);
    used_of_segment_ = 0;
  }
  void* p = segments_.back().data() + used_of_segment_;
  used_of_segment_ += bytes;
  return p;
}

namespace {

thread_local Scratch* current_scratch = nullptr;

void run_in_pool(int64_t n, void (*body)(void*, int64_t, int64_t), void* context) {
  torch::stable::parallel_for(0, n, 1,
                              [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

// If a yield takes longer than this, another program has probably run for a whole time slice.
// Threads of this process usually reach their next wait sooner.
constexpr std::chrono::microseconds kLongYield{200};

bool yield_processor() {
  const auto start = std::chrono::steady_clock::now();
  std::this_thread::yield();
  return std::chrono::steady_clock::now() - start > kLongYield;
}

#if defined(__linux__)
void sleep_at(const uint32_t* address, uint32_t value) {
  const timespec millisecond{0, 1000000};
  syscall(SYS_futex, address, FUTEX_WAIT_PRIVATE, value, &millisecond, nullptr, 0);
}
void wake_all(const uint32_t* address) {
  syscall(SYS_futex, address, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}
uint32_t current_processor() { return uint32_t(sched_getcpu() + 1); }
#else
void sleep_at(const uint32_t*, uint32_t) { std::this_thread::yield(); }
void wake_all(const uint32_t*) {}
uint32_t current_processor() { return 0; }
#endif

#if defined(__linux__)
// fork() copies only the calling thread, but GCC's OpenMP, torch's thread pool, would wait in the
// child for the threads of the parent. So the calling thread ends its pool before each fork; the
// next parallel operator starts another. Other OpenMP libraries handle forks themselves.
[[maybe_unused]] const int fork_watched = pthread_atfork(
    [] {
      constexpr int omp_pause_soft = 1;
      if (omp_pause_resource_all) omp_pause_resource_all(omp_pause_soft);
    },
    nullptr, nullptr);
#endif

}  // namespace

Resources::Resources(const Machine& machine)
    : machine_(machine), outer_(current_scratch), scratch_(outer_) {
  current_scratch = &scratch_;
}

Resources::~Resources() { current_scratch = outer_; }

Runtime Resources::runtime() const {
  const auto take = [](size_t bytes) { return current_scratch->take(bytes); };
  return {machine_, &run_in_pool, take, &yield_processor, &sleep_at, &wake_all, &current_processor};
}

Machine this_machine() { return {int64_t(torch::stable::get_num_threads()), l2_bytes()}; }

Machine one_thread() { return {1, l2_bytes()}; }

}  // namespace namernn_fast
