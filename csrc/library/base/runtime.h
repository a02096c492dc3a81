// Provides kernels with scratch memory and with torch's thread pool.
#pragma once

#include <cstdlib>
#include <memory>
#include <vector>

#include "contract.h"
#include "library/base/memory.h"

namespace namernn_fast {

// Scratch memory for one call. Each thread keeps a small region between calls, so that small calls
// neither allocate nor cause page faults. Memory beyond that region comes from segments that all
// threads share.
class Scratch {
 public:
  static constexpr size_t kAlignment = 64;
#if defined(NAMERNN_FAST_SANITIZE)
  static constexpr size_t kRegion = 0;  // sharing a region would hide out-of-bounds accesses
#else
  static constexpr size_t kRegion = size_t(1) << 20;
#endif

  // `outer` is the scratch memory of the enclosing call on the same thread, or null. The new memory
  // starts after the memory that the enclosing call has taken from the region.
  explicit Scratch(const Scratch* outer) : used_(outer ? outer->used_ : 0) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* take(size_t bytes);

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  void* take_from_segments(size_t bytes);
  // The region that the thread keeps. Only pages that a call has touched use physical memory.
  static thread_local std::unique_ptr<char, Free> region_;
  size_t used_;                 // bytes taken from the region
  size_t used_of_segment_ = 0;  // bytes taken from the last segment
  std::vector<Segment> segments_;
};

// The scratch memory and the threads that one kernel call may use. Calls may nest on a thread; the
// inner call ends first.
class Resources {
 public:
  explicit Resources(const Machine& machine);
  ~Resources();
  Resources(const Resources&) = delete;
  Resources& operator=(const Resources&) = delete;
  Runtime runtime() const;

 private:
  Machine machine_;
  Scratch* outer_;
  Scratch scratch_;
};

// Returns a Machine with torch's number of threads.
Machine this_machine();

// Returns a Machine with one thread, the calling thread.
Machine one_thread();

}  // namespace namernn_fast
