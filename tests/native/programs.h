// Cells that tests write as programs, see csrc/program.h.
#pragma once

#include <string>

#include "contract.h"

namespace namernn_fast {

struct TestedProgram {
  CellKind twin;  // computes and keeps the same values in C++; plain.h has its equation
  const char* text;
};
extern const TestedProgram programs[3];

// Returns the cell of a valid program. Its functions are those of `kernels`.
Cell cell_of_text(const std::string& text, const Kernels& kernels);

// Returns a description of an invalid program for which the parser does not give the right error.
// Empty if there is none.
std::string misjudged_program();

}  // namespace namernn_fast
