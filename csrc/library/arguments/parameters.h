// Lists the parameters of one direction of a layer.
#pragma once

#include "contract.h"
#include "library/arguments/options.h"

namespace namernn_fast {

// Parameters in the order in which operators take them: weight_ih first unless the sums are given,
// then weight_hh unless the cell lacks it.
struct ParameterList {
  Parameter roles[kParameters];
  int64_t count;

  const Parameter* begin() const { return roles; }
  const Parameter* end() const { return roles + count; }
};

inline ParameterList parameters_of(const Cell& cell, const Options& options) {
  ParameterList list{};
  for (int p = 0; p < kParameters; ++p) {
    const bool is_bias = p == kBiasIh || p == kBiasHh;
    const bool absent = (is_bias && !options.bias) || (p == kWeightHr && !options.projections) ||
                        (p == kWeightIh && options.sums) || p >= kOwn + cell.own ||
                        (!cell.has_weight_hh && (p == kWeightHh || p == kBiasHh));
    if (!absent) list.roles[list.count++] = Parameter(p);
  }
  return list;
}

// Returns the name of a parameter for error messages.
inline const char* name_of(const Cell& cell, Parameter parameter) {
  constexpr const char* names[] = {"weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"};
  return parameter < kOwn ? names[parameter] : cell.own_names[parameter - kOwn];
}

}  // namespace namernn_fast
