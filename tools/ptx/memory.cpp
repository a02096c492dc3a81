// Instructions that read or write memory.
#include "instructions.h"

namespace ptx {

namespace {

// The place in memory that a lane reads or writes. Source 0 of the instruction is the address. The
// instruction's `numbers` hold the byte offset, the number of bytes per value and, for loads,
// whether to extend the sign.
struct Place {
  uint64_t address;
  uint32_t size;  // bytes of all values together

  Place(Warp& warp, const Instruction& at, int lane, size_t values)
      : address(warp.get(at.sources[0], lane) + at.numbers[0]),
        size(static_cast<uint32_t>(at.numbers[1] * values)) {}
};

// Returns the handler of a load. `read` is a function or a member function of Machine.
template <class Read>
Handler load(Read read) {
  return [read](Machine& machine, Warp& warp, const Instruction& at, Mask mask) {
    const int64_t size = at.numbers[1];
    each_lane(mask, [&](int lane) {
      uint8_t bytes[16];
      const Place place(warp, at, lane, at.results.size());
      std::invoke(read, machine, Thread{warp, lane}, place.address, place.size, bytes);
      for (size_t i = 0; i < at.results.size(); ++i) {
        uint64_t value = 0;
        std::memcpy(&value, bytes + i * size, size);
        if (at.numbers[2]) {
          const int64_t spare = 64 - 8 * size;
          value = static_cast<uint64_t>(static_cast<int64_t>(value << spare) >> spare);
        }
        warp.set(at.results[i], lane, value);
      }
    });
  };
}

// Returns the handler of a store. Lanes store in random order: if several lanes store to one
// address, it is undefined which value remains.
Handler store(void (Machine::*write)(const Thread&, uint64_t, uint32_t, const void*)) {
  return [write](Machine& machine, Warp& warp, const Instruction& at, Mask mask) {
    const int first = static_cast<int>(machine.random(kLanes));
    const bool is_backward = machine.random(2) == 0;
    for (int i = 0; i < kLanes; ++i) {
      const int lane = (is_backward ? first - i + kLanes : first + i) % kLanes;
      if (!(mask >> lane & 1)) continue;
      uint8_t bytes[16];
      const size_t values = at.sources.size() - 1;
      for (size_t k = 0; k < values; ++k) {
        const uint64_t value = warp.get(at.sources[k + 1], lane);
        std::memcpy(bytes + k * at.numbers[1], &value, at.numbers[1]);
      }
      const Place place(warp, at, lane, values);
      (machine.*write)(Thread{warp, lane}, place.address, place.size, bytes);
    }
  };
}

void load_parameter(Machine& machine, const Thread& by, uint64_t address, uint32_t size,
                    uint8_t* out) {
  if (address + size > machine.parameters.size()) machine.stop("out of parameters", by);
  std::memcpy(out, machine.parameters.data() + address, size);
}

void load_and_acquire(Machine& machine, const Thread& by, uint64_t address, uint32_t size,
                      uint8_t* out) {
  machine.load_counter(by, address, size, out);
  machine.acquire(by, address);
}

template <bool releases>
void add_to_global(Machine& machine, Warp& warp, const Instruction& at, Mask mask) {
  each_lane(mask, [&](int lane) {
    const Place place(warp, at, lane, 1);
    if (releases) machine.release(Thread{warp, lane}, place.address);
    machine.add_to_counter(Thread{warp, lane}, place.address,
                           static_cast<uint32_t>(warp.get(at.sources[1], lane)));
  });
}

// Starts a cp.async. The instruction's sources are the address to write, the address to read and
// optionally the number of bytes to read. The instruction's `numbers` hold the offsets of these two
// addresses and the number of bytes to write.
void copy(Machine& machine, Warp& warp, const Instruction& at, Mask mask) {
  each_lane(mask, [&](int lane) {
    Copy request{};
    request.to = static_cast<uint32_t>(warp.get(at.sources[0], lane) + at.numbers[0]);
    request.from = warp.get(at.sources[1], lane) + at.numbers[1];
    request.size = static_cast<uint32_t>(at.numbers[2]);
    request.taken =
        at.sources.size() > 2 ? static_cast<uint32_t>(warp.get(at.sources[2], lane)) : request.size;
    request.lane = lane;
    machine.begin_copy(Thread{warp, lane}, request);
  });
}

void commit_copies(Machine&, Warp& warp, const Instruction&, Mask) {
  warp.copy_groups.push_back(std::move(warp.copies));
  warp.copies.clear();
}

void wait_for_copies(Machine& machine, Warp& warp, const Instruction& at, Mask) {
  machine.finish_copies(warp, static_cast<size_t>(at.numbers[0]));
}

}  // namespace

void add_memory(Table& table) {
  table["ld.param"] = {load(load_parameter), {}, {}};
  table["ld.global"] = {load(&Machine::load), {}, {}};
  table["ld.global.acquire"] = {load(load_and_acquire), {}, {}};
  table["ld.global.relaxed"] = {load(&Machine::load_counter), {}, {}};
  table["ld.shared"] = {load(&Machine::load_shared), {}, {}};
  table["st.global"] = {store(&Machine::store), {}, {}};
  table["st.shared"] = {store(&Machine::store_shared), {}, {}};
  table["red.global.release.add"] = {add_to_global<true>, {}, {}};
  table["red.global.relaxed.add"] = {add_to_global<false>, {}, {}};
  table["cp.async"] = {copy, {}, {}};
  table["cp.async.commit_group"] = {commit_copies, {}, {}};
  table["cp.async.wait_group"] = {wait_for_copies, {}, {}};
}

}  // namespace ptx
