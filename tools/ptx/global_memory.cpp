// Global memory. In a cooperative kernel, a program's stores stay invisible to other programs until
// the program releases them (except for a few stores, at random), and its loads may return stale
// cache lines until the program acquires.
#include <algorithm>
#include <string>

#include "machine.h"

namespace ptx {

namespace {

constexpr uint64_t kLine = sizeof(View::Line::bytes);

uint64_t last_acquire(const Thread& by) {
  return std::max(by.program().acquired, by.warp.acquired[by.lane]);
}

}  // namespace

Tensor& Machine::tensor_of(const Thread& by, uint64_t address, uint32_t size, const char* what) {
  if (address % size != 0) {
    stop("misaligned", by, std::string(what) + " of " + std::to_string(size) + " bytes");
  }
  int64_t nearest = INT64_MAX;
  size_t at = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    Tensor& tensor = tensors[i];
    if (address >= tensor.begin && address + size <= tensor.end) return tensor;
    const int64_t beyond = address < tensor.begin
                               ? static_cast<int64_t>(address - tensor.begin)
                               : static_cast<int64_t>(address + size - tensor.end);
    if (std::llabs(beyond) < std::llabs(nearest)) nearest = beyond, at = i;
  }
  stop("out of bounds", by,
       std::string(what) + " of " + std::to_string(size) + " bytes, " + std::to_string(nearest) +
           " bytes from tensor " + std::to_string(at));
}

// Makes the stores that `which` selects visible to other programs.
void Machine::publish(std::vector<View::Store>& stores,
                      const std::function<bool(const View::Store&)>& which) {
  const auto becomes_visible = [&](const View::Store& store) {
    if (!which(store)) return false;
    std::memcpy(reinterpret_cast<void*>(store.address), store.bytes, store.size);
    return true;
  };
  stores.erase(std::remove_if(stores.begin(), stores.end(), becomes_visible), stores.end());
}

// Publishes the thread's stores, and all stores that its program made before the last barrier.
void Machine::publish_before(const Thread& by) {
  auto& pending = by.program().view.pending;
  for (auto line = pending.begin(); line != pending.end();) {
    publish(line->second, [&](const View::Store& store) {
      return store.epoch < by.program().epoch ||
             (store.warp == by.warp.number && store.lane == by.lane);
    });
    line = line->second.empty() ? pending.erase(line) : std::next(line);
  }
}

void Machine::publish_all(Program& program) {
  for (auto& [line, stores] : program.view.pending) {
    publish(stores, [](const View::Store&) { return true; });
  }
}

// Reads memory as the program sees it, including the program's pending stores. The range must be in
// one cache line.
void Machine::peek(const Program& program, uint64_t address, uint32_t size, uint8_t* out) const {
  std::memcpy(out, reinterpret_cast<const void*>(address), size);
  const auto line = program.view.pending.find(address / kLine * kLine);
  if (line == program.view.pending.end()) return;
  for (const View::Store& store : line->second) {
    const uint64_t begin = std::max(store.address, address);
    const uint64_t end = std::min(store.address + store.size, address + size);
    if (begin < end) {
      std::memcpy(out + (begin - address), store.bytes + (begin - store.address), end - begin);
    }
  }
}

// Records a write of `in`, or a read if `in` is null.
void Machine::note_global(Tensor& tensor, const Thread& by, uint64_t address, uint32_t size,
                          const void* in) {
  const uint64_t begin = address - tensor.begin, width = kernel.slot_size;
  for (uint64_t at = begin / width; at * width < begin + size; ++at) {
    if (in == nullptr) {
      note_read(tensor.slots[at], by, "global memory");
    } else {
      uint8_t previous[4];
      const uint64_t offset = at * width - begin;
      peek(by.program(), address + offset, width, previous);
      const bool is_same =
          std::memcmp(previous, static_cast<const uint8_t*>(in) + offset, width) == 0;
      note_write(tensor.slots[at], by, is_same, "global memory");
    }
  }
}

void Machine::load(const Thread& by, uint64_t address, uint32_t size, void* out) {
  Tensor& tensor = tensor_of(by, address, size, "load");
  note_global(tensor, by, address, size, nullptr);
  if (!options.cooperative) {
    std::memcpy(out, reinterpret_cast<const void*>(address), size);
    return;
  }
  View& view = by.program().view;
  const uint64_t first = address / kLine * kLine;
  const auto [found, is_new] = view.lines.try_emplace(first);
  View::Line& line = found->second;
  if (is_new || line.fetched < last_acquire(by) || chance(options.forget)) {
    const uint64_t begin = std::max(first, tensor.begin), end = std::min(first + kLine, tensor.end);
    peek(by.program(), begin, static_cast<uint32_t>(end - begin), line.bytes + (begin - first));
    line.fetched = now;
  }
  std::memcpy(out, line.bytes + (address - first), size);
}

void Machine::store(const Thread& by, uint64_t address, uint32_t size, const void* in) {
  Tensor& tensor = tensor_of(by, address, size, "store");
  note_global(tensor, by, address, size, in);
  progress = now;
  if (!options.cooperative) {
    std::memcpy(reinterpret_cast<void*>(address), in, size);
    return;
  }
  Program& program = by.program();
  View::Store store{address, size, program.epoch, by.warp.number, by.lane, {}};
  std::memcpy(store.bytes, in, size);
  const uint64_t first = address / kLine * kLine;
  std::vector<View::Store>& pending = program.view.pending[first];
  pending.push_back(store);
  const auto line = program.view.lines.find(first);
  if (line != program.view.lines.end()) {
    std::memcpy(line->second.bytes + (address - first), in, size);
  }
  if (chance(options.flush)) publish(pending, [](const View::Store&) { return true; });
}

void Machine::load_counter(const Thread& by, uint64_t address, uint32_t size, void* out) {
  tensor_of(by, address, size, "load");
  std::memcpy(out, reinterpret_cast<const void*>(address), size);
}

void Machine::add_to_counter(const Thread& by, uint64_t address, uint32_t addend) {
  tensor_of(by, address, sizeof(addend), "addition");
  *reinterpret_cast<uint32_t*>(address) += addend;
  if (addend != 0) progress = now;
}

}  // namespace ptx
