// Defines the kernel tables of an instruction set that multiplies pairs of bfloat16. The files in
// csrc/isa/ that define a PairTile include this header.
#pragma once

#include "kernel/backward/pair_products.h"
#include "kernel/forward/forward_encoded.h"
#include "kernel/weights/pair_panels.h"

namespace namernn_fast {
namespace {

// Rates measured on AMX. Without panels, each bfloat16 weight is converted once per tile of at most
// six rows. With few sequences, the conversion takes three times as long as the product.
template <class Storage>
constexpr PanelGains kPairGains = {{24, INT64_MAX}, {8, INT64_MAX}};
template <>
constexpr PanelGains kPairGains<float> = {{8, INT64_MAX}, {24, INT64_MAX}};

// The format of the panels that layers of type Storage hold. Float layers hold float panels, in the
// format of the float kernels, because rounding to terms would lose bits.
template <class Storage>
constexpr PanelFormat<Storage> kPanelFormat = {};
template <>
constexpr PanelFormat<BFloat16> kPanelFormat<BFloat16> = {
    &PairPanels<BFloat16, 1>::bytes, &pack_all<PairPanels<BFloat16, 1>, BFloat16>,
    &unpack_all<PairPanels<BFloat16, 1>, BFloat16>};

template <class Storage, int kTerms>
void forward_pairs(const Forward<Storage>& args, const Runtime& runtime) {
  const Layer<Storage>& layer = args.layer;
  // Float layers hold float panels (see kPanelFormat), which forward_encoded() cannot read.
  const void* prepared = std::is_same_v<Storage, BFloat16> ? layer.panels : nullptr;
  if (!prepared && layer.in_place.weight_hh && (has_table(layer) || layer.in_place.weight_ih)) {
    // Pair instructions cannot read weights in place, so the float kernels run this call.
    const KernelsFor<Storage>& in_float = kKernelsInFloat;
    Forward<Storage> floats = args;
    if (layer.panels) floats.layer.in_place = {};
    return in_float.forward(floats, runtime);
  }
  forward_encoded<AsTerms<kTerms>>(args, prepared, runtime);
}

// Returns the kernels that split the numbers of Storage tensors into kTerms terms.
// Waves and trees never use pair kernels, so the entries for these are null.
template <class Storage, int kTerms>
constexpr KernelsFor<Storage> kernels_on_pairs() {
  return {kPanelFormat<Storage>,
          &forward_pairs<Storage, kTerms>,
          {nullptr, nullptr, nullptr},
          &backward<PairProducts<Storage, kTerms>>,
          nullptr,
          kPairGains<Storage>};
}

}  // namespace
}  // namespace namernn_fast
