// Shuffles, matrix loads, barriers and control flow.
#include <algorithm>

#include "instructions.h"

namespace ptx {

namespace {

// Returns a shuffle instruction. The sources are the value; a lane, lane offset or lane mask; the
// segment bounds; and the mask of participating lanes.
template <class Choose>
Entry shuffle(Choose choose) {
  const auto run = [choose](Machine& machine, Warp& warp, const Instruction& at, Mask) {
    if (*warp.lanes<uint32_t>(at.sources[3]) != kWholeWarp) {
      machine.stop("unsupported: a shuffle among only some lanes", {warp, 0});
    }
    uint32_t values[kLanes];
    std::memcpy(values, warp.lanes<uint32_t>(at.sources[0]), sizeof(values));
    const uint32_t* selectors = warp.lanes<uint32_t>(at.sources[1]);
    const uint32_t* bounds = warp.lanes<uint32_t>(at.sources[2]);
    uint32_t results[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int segment = bounds[lane] >> 8 & 31,
                last = (lane & segment) | (bounds[lane] & 31 & ~segment);
      results[lane] =
          values[choose(lane, static_cast<int>(selectors[lane] & 31), lane & segment, last)];
    }
    std::memcpy(warp.lanes<uint32_t>(at.results[0]), results, sizeof(results));
  };
  return {run, {4}, {4, 4, 4, 4}, true};
}

template <class Value>
Entry maximum() {
  const auto run = [](Machine&, Warp& warp, const Instruction& at, Mask) {
    const Value* values = warp.lanes<Value>(at.sources[0]);
    const Value result = *std::max_element(values, values + kLanes);
    std::fill_n(warp.lanes<Value>(at.results[0]), kLanes, result);
  };
  return {run, {sizeof(Value)}, {sizeof(Value), 4}, true};
}

void add_shuffles(Table& table) {
  table["shfl.sync.bfly.b32"] = shuffle([](int lane, int flipped, int, int last) {
    return (lane ^ flipped) <= last ? lane ^ flipped : lane;
  });
  table["shfl.sync.idx.b32"] = shuffle([](int lane, int index, int first, int last) {
    return (first | index) <= last ? first | index : lane;
  });
  table["redux.sync.max.s32"] = maximum<int32_t>();
  table["redux.sync.max.u32"] = maximum<uint32_t>();
}

// An 8 x 8 matrix of 16-bit values.
struct Matrix {
  uint16_t rows[8][8];
  // Returns element i (0 or 1) of the pair that a lane holds.
  uint16_t& of(int lane, int i, bool is_transposed) {
    const int row = lane / 4, column = lane % 4 * 2 + i;
    return is_transposed ? rows[column][row] : rows[row][column];
  }
};

// ldmatrix: lane 8 * i + r holds the address of row r of matrix i. The instruction's `numbers` hold
// the byte offset and whether the matrices are transposed.
void load_matrices(Machine& machine, Warp& warp, const Instruction& at, Mask) {
  std::vector<Matrix> matrices(at.results.size());
  for (size_t i = 0; i < matrices.size(); ++i) {
    for (int row = 0; row < 8; ++row) {
      const int lane = static_cast<int>(8 * i) + row;
      const uint64_t address = warp.get(at.sources[0], lane) + at.numbers[0];
      machine.load_shared(Thread{warp, lane}, address, 16, matrices[i].rows[row]);
    }
  }
  for (size_t i = 0; i < matrices.size(); ++i) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint32_t low = matrices[i].of(lane, 0, at.numbers[1]);
      const uint32_t high = matrices[i].of(lane, 1, at.numbers[1]);
      warp.set(at.results[i], lane, low | high << 16);
    }
  }
}

void store_matrices(Machine& machine, Warp& warp, const Instruction& at, Mask) {
  for (size_t i = 1; i < at.sources.size(); ++i) {
    Matrix matrix;
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint64_t both = warp.get(at.sources[i], lane);
      matrix.of(lane, 0, at.numbers[1]) = static_cast<uint16_t>(both);
      matrix.of(lane, 1, at.numbers[1]) = static_cast<uint16_t>(both >> 16);
    }
    for (int row = 0; row < 8; ++row) {
      const int lane = static_cast<int>(8 * (i - 1)) + row;
      const uint64_t address = warp.get(at.sources[0], lane) + at.numbers[0];
      machine.store_shared(Thread{warp, lane}, address, 16, matrix.rows[row]);
    }
  }
}

void branch(Machine& machine, Warp& warp, const Instruction& at, Mask mask) {
  machine.branch(warp, mask, static_cast<uint32_t>(at.numbers[0]));
}

void end(Machine& machine, Warp& warp, const Instruction&, Mask mask) { machine.end(warp, mask); }

void meet(Machine& machine, Warp& warp, const Instruction&, Mask) { machine.meet(warp); }

void meet_in_warp(Machine&, Warp& warp, const Instruction&, Mask) { ++warp.meetings; }

Handler stop(const char* kind) {
  return [kind](Machine& machine, Warp& warp, const Instruction&, Mask mask) {
    machine.stop(kind, Thread{warp, __builtin_ctz(mask)});
  };
}

}  // namespace

void add_warp(Table& table) {
  add_shuffles(table);
  table["ldmatrix"] = {load_matrices, {}, {}, true};
  table["stmatrix"] = {store_matrices, {}, {}, true};
  table["bra"] = {branch, {}, {}};
  table["ret"] = {end, {}, {}};
  table["bar.sync"] = {meet, {}, {}, true};
  table["bar.warp.sync"] = {meet_in_warp, {}, {4}, true};
  // This fence orders accesses through different proxies, which the machine does not distinguish.
  table["fence.proxy.async.shared::cta"] = {nothing, {}, {}};
  table["trap"] = {stop("trap"), {}, {}};
  table["assertion"] = {stop("assertion"), {}, {}};
}

}  // namespace ptx
