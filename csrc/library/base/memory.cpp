#include "library/base/memory.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace namernn_fast {
namespace {

// A reserved segment is unmapped if it has not been reused while this many other segments were
// added: calls that need a segment of this size have probably ended.
constexpr uint64_t kMostIdle = 64;

// Maps memory that starts and ends at huge-page boundaries. Returns null on failure.
char* map(size_t bytes) {
  void* mapped =
      mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  const size_t past_start = reinterpret_cast<uintptr_t>(mapped) % kHugePage;
  const size_t before = past_start > 0 ? kHugePage - past_start : 0;
  char* const data = static_cast<char*>(mapped) + before;
  if (before > 0) munmap(mapped, before);
  munmap(data + bytes, kHugePage - before);
  advise_huge_pages(data, bytes);
  return data;
}

// Holds the reserved segments.
class Pool {
 public:
  struct Reserved {
    char* data;
    size_t bytes;
    uint64_t number;  // number of segments added before this one
  };

  // Allocates the maximum capacity: destructors call add(), which must not throw.
  Pool() { segments_.reserve(kMostReserved / kHugePage + 1); }

  // Removes and returns the smallest segment of `bytes` to 2 * `bytes` bytes (the newest in
  // a tie). Returns null data if none fits. Larger segments stay for larger requests.
  Reserved take(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = segments_.end();
    for (auto segment = segments_.begin(); segment != segments_.end(); ++segment) {
      if (segment->bytes < bytes || segment->bytes > 2 * bytes) continue;
      if (best == segments_.end() || segment->bytes <= best->bytes) best = segment;
    }
    if (best == segments_.end()) return {};
    const Reserved taken = *best;
    segments_.erase(best);
    bytes_ -= taken.bytes;
    return taken;
  }

  // Adds a segment, and unmaps the oldest segments if there are too many.
  void add(char* data, size_t bytes) {
    if (bytes > kMostReserved) {
      munmap(data, bytes);
      return;
    }
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      segments_.push_back({data, bytes, count_++});
      bytes_ += bytes;
    }
    unmap_oldest(
        [this] { return bytes_ > kMostReserved || segments_.front().number + kMostIdle < count_; });
  }

  void unmap_all() {
    unmap_oldest([] { return true; });
  }

  size_t bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return bytes_;
  }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  // Unmaps segments, the oldest first, while is_surplus() returns true. Holds the lock during
  // is_surplus() but not during munmap(), which may take a millisecond.
  template <class F>
  void unmap_oldest(F&& is_surplus) {
    for (;;) {
      Reserved oldest;
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (segments_.empty() || !is_surplus()) return;
        oldest = segments_.front();
        segments_.erase(segments_.begin());
        bytes_ -= oldest.bytes;
      }
      munmap(oldest.data, oldest.bytes);
    }
  }

  std::mutex mutex_;
  std::vector<Reserved> segments_;  // oldest first
  size_t bytes_ = 0;                // total size of the segments
  uint64_t count_ = 0;              // number of segments added so far
};

// Returns the process's pool, which is never destroyed, because threads may still use it at exit.
Pool& pool() {
  static Pool* const pool = [] {
    // If another thread held the lock during fork(), the child would wait for the lock forever.
    pthread_atfork([] { namernn_fast::pool().lock(); }, [] { namernn_fast::pool().unlock(); },
                   [] { namernn_fast::pool().unlock(); });
    return new Pool;
  }();
  return *pool;
}

}  // namespace

#if defined(NAMERNN_FAST_SANITIZE)

// Allocates each segment separately, so that sanitizers catch overflows and uses after free.
Segment::Segment(size_t bytes) : bytes_(bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, 64, std::max<size_t>(bytes, 1)) != 0) throw std::bad_alloc();
  data_ = static_cast<char*>(p);
}

Segment::~Segment() { std::free(data_); }

#else

Segment::Segment(size_t bytes) {
  bytes_ = std::max<size_t>(1, (bytes + kHugePage - 1) / kHugePage) * kHugePage;
  const Pool::Reserved reserved = pool().take(bytes_);
  if (reserved.data) {
    data_ = reserved.data;
    bytes_ = reserved.bytes;
    return;
  }
  data_ = map(bytes_);
  if (data_) return;
  empty_cache();
  data_ = map(bytes_);
  if (!data_) throw std::bad_alloc();
}

Segment::~Segment() {
  if (data_) pool().add(data_, bytes_);
}

#endif

int64_t memory_reserved() { return int64_t(pool().bytes()); }

void empty_cache() { pool().unmap_all(); }

void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(MADV_HUGEPAGE)
  const auto page = uintptr_t(sysconf(_SC_PAGESIZE));
  const auto address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = address / page * page;
  const uintptr_t last = (address + bytes + page - 1) / page * page;
  // Errors are ignored: without huge pages, memory accesses are only slower.
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace namernn_fast
