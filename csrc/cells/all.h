// Lists all cells in the order of CellKind.
#pragma once

#include <cstddef>

#include "cells/equation.h"
#include "cells/gru.h"
#include "cells/leaky.h"
#include "cells/lstm.h"
#include "cells/vanilla.h"
#if defined(NAMERNN_FAST_TEST_CELLS)
#include "test_cells.h"
#endif

namespace namernn_fast {
namespace {

template <class... Cells>
struct CellList {
  static constexpr bool is_in_order() {
    size_t index = 0;
    return ((size_t(Cells::kind) == index++) && ...) && index == size_t(kCells);
  }
  static constexpr void add_to(Kernels& kernels) {
    size_t index = 0;
    ((kernels.cells[index++] = with_code<CodeOf<Cells>>(Cells::lists())), ...);
  }
};
#if defined(NAMERNN_FAST_TEST_CELLS)
using AllCells =
    CellList<Vanilla, Gru, Lstm, Leaky, FourStates<false>, FourStates<true>, Independent>;
#else
using AllCells = CellList<Vanilla, Gru, Lstm, Leaky>;
#endif
static_assert(AllCells::is_in_order());

}  // namespace
}  // namespace namernn_fast
