// Shared memory and the asynchronous copies into it.
#include <algorithm>
#include <string>

#include "machine.h"

namespace ptx {

uint8_t* Machine::shared_at(const Thread& by, uint64_t address, uint32_t size) {
  if (address + size > shared_bytes) {
    stop("shared memory: out of bounds", by,
         std::to_string(size) + " bytes at " + std::to_string(address) + " of " +
             std::to_string(shared_bytes));
  }
  if (address % size != 0) stop("shared memory: misaligned", by, std::to_string(address));
  return by.program().shared.data() + address;
}

template <class Work>
void Machine::each_shared_slot(const Thread& by, uint64_t address, uint32_t size, Work work) {
  const uint64_t width = kernel.slot_size;
  for (uint64_t at = address / width; at * width < address + size; ++at) {
    Slot& slot = by.program().slots[at];
    if (slot.is_awaited) report("shared memory: an asynchronous copy has not finished", by);
    work(slot, at * width - std::min(address, at * width));
  }
}

void Machine::load_shared(const Thread& by, uint64_t address, uint32_t size, void* out) {
  std::memcpy(out, shared_at(by, address, size), size);
  each_shared_slot(by, address, size, [&](Slot& slot, uint64_t) {
    if (!slot.is_written) report("shared memory: read before it was written", by);
    note_read(slot, by, "shared memory");
  });
}

void Machine::store_shared(const Thread& by, uint64_t address, uint32_t size, const void* in) {
  uint8_t* to = shared_at(by, address, size);
  const uint8_t* from = static_cast<const uint8_t*>(in);
  each_shared_slot(by, address, size, [&](Slot& slot, uint64_t offset) {
    const uint64_t bytes = std::min<uint64_t>(kernel.slot_size, size - offset);
    const bool is_same = slot.is_written && std::memcmp(to + offset, from + offset, bytes) == 0;
    note_write(slot, by, is_same, "shared memory");
    slot.is_written = true;
  });
  std::memcpy(to, in, size);
}

void Machine::read_copy(const Thread& by, Copy& copy) {
  uint8_t bytes[16] = {};
  if (copy.taken != 0) load(by, copy.from, copy.taken, bytes);
  std::memcpy(by.program().shared.data() + copy.to, bytes, copy.size);
  copy.is_done = true;
}

// Starts an asynchronous copy. The bytes arrive now or, at random, only when the warp waits for the
// copy.
void Machine::begin_copy(const Thread& by, Copy copy) {
  shared_at(by, copy.to, copy.size);
  if (copy.taken != 0) tensor_of(by, copy.from, copy.taken, "asynchronous copy");
  each_shared_slot(by, copy.to, copy.size, [&](Slot& slot, uint64_t) {
    note_write(slot, by, false, "shared memory");
    slot.is_awaited = true;
  });
  if (random(2) == 0) read_copy(by, copy);
  by.warp.copies.push_back(copy);
}

void Machine::finish_copies(Warp& warp, size_t groups_left) {
  while (warp.copy_groups.size() > groups_left) {
    for (Copy& copy : warp.copy_groups.front()) {
      const Thread by{warp, copy.lane};
      if (!copy.is_done) read_copy(by, copy);
      for (uint64_t at = copy.to / kernel.slot_size; at * kernel.slot_size < copy.to + copy.size;
           ++at) {
        Slot& slot = warp.program->slots[at];
        slot.is_awaited = false;
        slot.is_written = true;
        note_write(slot, by, true, "shared memory");
      }
    }
    warp.copy_groups.pop_front();
  }
}

}  // namespace ptx
