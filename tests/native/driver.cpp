#include "driver.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) (void(address), void(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) (void(address), void(size))
#endif

namespace namernn_fast {

Plan forced_plan{1, 1, 0};
Arrival arrival = Arrival::together;

// The following functions replace plan.cpp, so that tests decide how work is divided.
Plan choose_plan(const PlanArguments& arguments) {
  if (arguments.blocks < 1) fail("a plan needs at least one weight block");
  return {std::min(forced_plan.groups, arguments.layout.B),
          std::min(forced_plan.members, arguments.panels), 0};
}
bool leave_cache(int64_t bytes, const Machine& machine) {
  return bytes > int64_t(machine.l2_bytes / 2);
}
int64_t choose_projected_steps(const PlanArguments& arguments, const Plan&, int64_t,
                               InPlace in_place) {
  constexpr size_t small_cache = 1 << 14;
  // If a weight is read in place, the recurrence must start from sums that contain the projection.
  const bool ahead = in_place.weight_ih || in_place.weight_hh;
  return arguments.D && (ahead || arguments.machine.l2_bytes <= small_cache) ? 3 : 0;
}
int64_t choose_encoded_steps(const PlanArguments& arguments, const Plan&, int64_t) {
  constexpr size_t small_cache = 1 << 14;
  const bool ahead = arguments.layout.T > 1 && arguments.machine.l2_bytes <= small_cache;
  return arguments.D && ahead ? 2 : 0;
}
int64_t choose_projected_rows(const PlanArguments&) {
  return 24;  // some slices project all steps at once, other slices only one or two steps
}
int64_t choose_whole_rows(const PlanArguments& arguments, int64_t) {
  return arguments.machine.l2_bytes <= 1 << 14 ? 5 : 40;  // a step has one chunk of rows or several
}
int64_t choose_parts(const SequenceLayout& layout, const Plan& plan, int64_t row_bytes,
                     const Machine& machine) {
  if (layout.tree || plan.members > 1) return 1;
  const int64_t most = plan.groups * std::max<int64_t>(64, int64_t(machine.l2_bytes) / row_bytes);
  return (layout.B + most - 1) / most;
}
bool choose_row_prefetch(const SequenceLayout& layout, int64_t, int64_t, const Machine&) {
  return !layout.tree;
}
bool choose_copies(size_t bytes, const Plan& plan, const Machine& machine) {
  return plan.groups == 1 || bytes <= machine.l2_bytes;
}
int64_t choose_block_rows(int64_t row_bytes, int64_t least, const Machine& machine) {
  return std::max(least, int64_t(machine.l2_bytes / 2) / row_bytes);
}
int64_t choose_workers(double, const Machine& machine) { return machine.threads; }

void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

Guarded::Guarded(size_t bytes, size_t alignment) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
  mapped_ = (rounded + page - 1) / page * page + page;
  map_ = static_cast<char*>(
      mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (map_ == MAP_FAILED) fail("out of memory");
  char* const end = map_ + mapped_ - page;
  mprotect(end, page, PROT_NONE);
  data_ = end - rounded;
  std::memset(data_, 0xff, rounded);
  ASAN_POISON_MEMORY_REGION(map_, data_ - map_);
  ASAN_POISON_MEMORY_REGION(data_ + bytes, rounded - bytes);
}

Guarded::~Guarded() {
  ASAN_UNPOISON_MEMORY_REGION(map_, mapped_);
  munmap(map_, mapped_);
}

namespace {

thread_local bool in_region = false;
std::vector<std::unique_ptr<Guarded>> taken;

void parallel(int64_t n, void (*body)(void*, int64_t, int64_t), void* context) {
  const int64_t chunk = arrival == Arrival::alone ? n : arrival == Arrival::in_pairs ? 2 : 1;
  std::vector<std::thread> threads;
  for (int64_t begin = chunk; begin < n; begin += chunk) {
    threads.emplace_back([=] {
      in_region = true;
      if (arrival == Arrival::late) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      body(context, begin, std::min(begin + chunk, n));
    });
  }
  in_region = true;
  body(context, 0, std::min(chunk, n));
  in_region = false;
  for (std::thread& thread : threads) thread.join();
}

void* scratch(size_t bytes) {
  // In a parallel region, a failed allocation would leave other threads waiting at a barrier.
  if (in_region) fail("scratch memory was requested inside a parallel region");
  taken.push_back(std::make_unique<Guarded>(bytes, 64));
  return taken.back()->data();
}

// Pretends that every third yield took long, so that threads also sleep.
bool yield_processor() {
  static std::atomic<unsigned> yields{0};
  std::this_thread::yield();
  return ++yields % 3 == 0;
}

// Pretends that threads move between two processors.
uint32_t processor() {
  static std::atomic<uint32_t> calls{0};
  return 1 + ++calls / 3 % 2;
}

std::mutex sleeping;
std::condition_variable woken;

void sleep_at(const uint32_t* address, uint32_t value) {
  std::unique_lock<std::mutex> lock(sleeping);
  if (__atomic_load_n(address, __ATOMIC_SEQ_CST) != value) return;
  woken.wait_for(lock, std::chrono::milliseconds(1));
}

void wake_all(const uint32_t*) {
  const std::lock_guard<std::mutex> lock(sleeping);
  woken.notify_all();
}

}  // namespace

Runtime runtime_of(int64_t threads, size_t l2_bytes) {
  return {{threads, l2_bytes}, &parallel, &scratch,  &yield_processor,
          &sleep_at,           &wake_all, &processor};
}

void free_scratch() { taken.clear(); }

}  // namespace namernn_fast
