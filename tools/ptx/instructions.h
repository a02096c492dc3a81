// The table of known instructions, keyed by their names in PTX.
#pragma once

#include <map>
#include <string>
#include <tuple>
#include <utility>

#include "machine.h"

namespace ptx {

struct Entry {
  Handler run;
  std::vector<int> results, sources;  // sizes in bytes per lane; 1 for a predicate
  bool is_whole = false;
};

using Table = std::map<std::string, Entry>;

void add_arithmetic(Table& table);
void add_memory(Table& table);
void add_warp(Table& table);
void add_tensor_cores(Table& table);

inline void nothing(Machine&, Warp&, const Instruction&, Mask) {}

// Returns an instruction that works on each lane separately, with `count` packed numbers per lane.
template <int count, class Result, class... Sources, class Work, size_t... k>
Entry packed(Work work, std::index_sequence<k...>) {
  const auto run = [work](Machine&, Warp& warp, const Instruction& at, Mask mask) {
    Result* result = warp.lanes<Result>(at.results[0]);
    const std::tuple<const Sources*...> from{warp.lanes<Sources>(at.sources[k])...};
    each_lane(mask, [&](int lane) {
      for (int i = count * lane; i < count * (lane + 1); ++i) {
        result[i] = work(std::get<k>(from)[i]...);
      }
    });
  };
  return {run, {count * sizeof(Result)}, {static_cast<int>(count * sizeof(Sources))...}};
}

template <class Result, class... Sources, class Work>
Entry lanewise(Work work) {
  return packed<1, Result, Sources...>(work, std::index_sequence_for<Sources...>());
}

template <class Result, class... Sources, class Work>
Entry in_pairs(Work work) {
  return packed<2, Result, Sources...>(work, std::index_sequence_for<Sources...>());
}

}  // namespace ptx
