// Parses the text of a program, and checks it like any other argument of an operator.
#pragma once

#include <memory>
#include <optional>
#include <string_view>

#include "library/arguments/options.h"

namespace namernn_fast {

// Returns the cell that a program describes, for this processor's instruction set. Every text that
// is not exactly a valid program fails. namernn_fast/equations/program.py documents the text. The
// cells of recent programs are kept, because parsing takes longer than a small call.
std::shared_ptr<const Cell> cell_of_program(std::string_view text);

// Value of an operator's argument `cell` if `program` describes the cell.
constexpr int64_t kEquation = -1;

// Returns the cell for the arguments `cell` and `program` of an operator.
inline std::shared_ptr<const Cell> cell_of(int64_t cell, std::optional<std::string_view> program) {
  if (!program) return {std::shared_ptr<const Cell>(), &cell_of(cell)};
  check(cell == kEquation, "cell must be ", kEquation, " if a program is given, got ", cell);
  return cell_of_program(*program);
}

}  // namespace namernn_fast
