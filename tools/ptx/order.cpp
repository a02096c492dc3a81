// The happens-before order and race detection. An access by another program happened before the
// current access if the other program released the epoch of its access and this thread then
// acquired that epoch. An access by the same program happened before the current access if a
// barrier separates the two accesses or the same thread made them.
#include <algorithm>
#include <string>

#include "machine.h"

namespace ptx {

namespace {

Access access_of(const Thread& by) {
  Access access;
  access.program = by.program().index;
  access.epoch = by.program().epoch;
  access.meeting = by.warp.meetings;
  access.instruction = static_cast<uint16_t>(by.warp.at);
  access.warp = static_cast<uint8_t>(by.warp.number);
  access.lane = static_cast<uint8_t>(by.lane);
  return access;
}

// Merges a read into `known`, an earlier read by the same program.
void add_read(Access& known, const Access& read) {
  if (known.epoch < read.epoch) {
    known = read;
  } else if (known.warp != read.warp) {
    known.warp = known.lane = Access::kSeveral;
  } else if (known.meeting < read.meeting) {
    known = read;
  } else if (known.lane != read.lane) {
    known.lane = Access::kSeveral;
  }
}

void join(Clock& clock, const Clock& other) {
  for (size_t i = 0; i < clock.size(); ++i) clock[i] = std::max(clock[i], other[i]);
}

const char* distance(const Access& access, const Thread& by) {
  if (access.program != by.program().index) return "between programs";
  return access.warp == by.warp.number ? "within a warp" : "between warps";
}

}  // namespace

const Clock& Machine::known_to(const Thread& thread) const {
  const Program& program = thread.program();
  const auto found = program.learned.find(thread.warp.number * kLanes + thread.lane);
  return found == program.learned.end() ? program.known : found->second;
}

std::string Machine::place_of(const Access& access) const {
  return ", accessed before by program " + std::to_string(access.program) + " at line " +
         std::to_string(kernel.code[access.instruction].line);
}

// Releases the thread's accesses, and all accesses that its program made before the last barrier.
void Machine::release(const Thread& by, uint64_t address) {
  publish_before(by);
  Clock clock = known_to(by);
  clock[by.program().index] = by.program().epoch;
  join(released.try_emplace(address, clock.size(), 0).first->second, clock);
}

void Machine::acquire(const Thread& by, uint64_t address) {
  by.warp.acquired[by.lane] = now;
  const auto found = released.find(address);
  if (found == released.end()) return;
  Program& program = by.program();
  const int number = by.warp.number * kLanes + by.lane;
  join(program.learned.try_emplace(number, program.known).first->second, found->second);
}

// At a barrier, all threads of the program acquire what any of them acquired before.
void Machine::acquire_at_barrier(Program& program) {
  for (const auto& [thread, clock] : program.learned) join(program.known, clock);
  program.learned.clear();
  for (const Warp& warp : program.warps) {
    for (const uint64_t when : warp.acquired) program.acquired = std::max(program.acquired, when);
  }
}

bool Machine::happened_before(const Access& access, const Thread& thread) const {
  const Program& program = thread.program();
  if (access.program != program.index) return known_to(thread)[access.program] > access.epoch;
  if (access.epoch < program.epoch) return true;
  if (access.warp != thread.warp.number) return false;
  return access.meeting < thread.warp.meetings || access.lane == thread.lane;
}

void Machine::note_read(Slot& slot, const Thread& by, const char* memory) {
  const Access read = access_of(by);
  if (slot.written.program != Access::kNobody && !happened_before(slot.written, by)) {
    report(std::string("race ") + distance(slot.written, by) + ": read after write", by,
           memory + place_of(slot.written));
  }
  if (slot.read.program == read.program) return add_read(slot.read, read);
  if (slot.read.program == Access::kNobody || happened_before(slot.read, by)) {
    slot.read = read;
    return;
  }
  if (!slot.read_by_others) slot.read_by_others = std::make_unique<std::vector<Access>>();
  for (Access& other : *slot.read_by_others) {
    if (other.program == read.program) return add_read(other, read);
  }
  slot.read_by_others->push_back(read);
}

void Machine::note_write(Slot& slot, const Thread& by, bool is_same, const char* memory) {
  const auto check = [&](const Access& earlier, const char* kind) {
    if (earlier.program == Access::kNobody || happened_before(earlier, by)) return;
    report(std::string("race ") + distance(earlier, by) + kind, by, memory + place_of(earlier));
  };
  if (!is_same) {  // rewriting the current value is harmless
    const Access& earlier = slot.written;
    const bool at_once = earlier.instruction == by.warp.at &&
                         earlier.program == by.program().index && earlier.warp == by.warp.number;
    check(earlier, at_once ? ": lanes store different values" : ": write after write");
  }
  check(slot.read, ": write after read");
  if (slot.read_by_others) {
    for (const Access& other : *slot.read_by_others) check(other, ": write after read");
    slot.read_by_others.reset();
  }
  slot.written = access_of(by);
}

}  // namespace ptx
