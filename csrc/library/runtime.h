// What the kernels get from the process: scratch memory, torch's thread pool, its number of
// threads.
#pragma once

#include <cstdlib>
#include <memory>
#include <vector>

#include "contract.h"

namespace namernn_fast {

// Scratch memory of one call: a region kept by each thread from call to call, so that small calls
// neither allocate nor fault pages in; memory that a call needs beyond it is freed with the call.
class Scratch {
 public:
  static constexpr size_t kAlignment = 64;
#if defined(NAMERNN_FAST_SANITIZE)
  static constexpr size_t kKept = 0;  // pieces of one region would hide an access past their ends
#else
  static constexpr size_t kKept = size_t(16) << 20;
#endif

  // Behind what a call of the same thread that is not over has taken, or null.
  explicit Scratch(const Scratch* outer) : used_(outer ? outer->used_ : 0) {}
  ~Scratch() {
    for (void* p : extra_) std::free(p);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* take(size_t bytes);

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  static char* allocate(size_t bytes);
  // Pages of it that no call has touched cost nothing.
  static thread_local std::unique_ptr<char, Free> kept_;
  size_t used_;
  std::vector<void*> extra_;
};

// What one call of a kernel may use: its own scratch memory, and a number of threads. The calls of
// a thread may nest; the inner one ends first.
class Call {
 public:
  explicit Call(const Machine& machine);
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
  Runtime runtime() const;

 private:
  Machine machine_;
  Scratch* outer_;
  Scratch scratch_;
};

// Whether this process was forked from one with several threads: an operator of torch's that uses
// its thread pool may wait there for ever.
bool is_pool_lost();

// This machine with the threads that torch is set to, one where a fork has lost them.
Machine this_machine();

// This machine with the calling thread alone.
Machine one_thread();

}  // namespace namernn_fast
