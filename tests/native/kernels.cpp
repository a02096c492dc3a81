// Runs the kernels without torch, on threads that sanitizers can follow.
//
// Divides the work in several ways, among threads that start together, late or not at all. Results
// that must not depend on how work is divided are compared bit by bit with the results of one
// thread. To build this file with the kernels' static libraries, run `make sanitize` or, for ARM,
// `make compatibility ONLY=arm`. Sanitizers run a sample of the problems, because they slow down
// kernels about 20 times.
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "problem.h"
#include "programs.h"
#include "rows.h"

namespace namernn_fast {
namespace {

std::string selected;  // what the titles of tested cells must contain
unsigned sampled = 1;  // one in this many problems is run; above 1, accuracy is not checked

template <class Storage>
Results<Storage> results_of(const KernelsFor<Storage>& kernels, const Problem& p,
                            const Runtime& runtime) {
  Random random;
  const Shape shape(p);
  const Arguments<Storage> arguments(p, shape, random);
  Results<Storage> results(p, shape, random);
  run(kernels, p, arguments, results, runtime);
  return results;
}

template <class Storage>
void check(const TestedCell& cell, const KernelsFor<Storage>& kernels) {
  // Some shapes fill whole panels in several chunks of rows. In the last shape, one thread splits
  // the sequences, and each of two groups accumulates gradients in a separate buffer.
  static const int64_t shapes[][4] = {
      {1, 1, 1, 1},     {5, 7, 6, 3},   {16, 48, 5, 1},   {9, 130, 4, 7},  {3, 200, 25, 3},
      {20, 33, 40, 30}, {4, 65, 3, 26}, {12, 140, 1, 37}, {6, 128, 3, 14}, {2, 5, 57, 300}};
  static const Plan plans[] = {{2, 1, 0}, {1, 2, 0}, {3, 1, 0}, {1, 3, 0}, {2, 2, 0}, {2, 3, 0}};
  unsigned round = 0;
  for (const auto& shape : shapes) {
    for (unsigned options = 0; options < kOptions; ++options) {
      // Counts on from cell to cell, so that cells run different samples.
      static unsigned problem = 0;
      if (problem++ % sampled != 0) continue;
      Problem p = problem_of<Storage>(cell, shape, options, bits_of(round));
      if (!kernels.backward_panels.pack) p.accumulate_weights = false;
      forced_plan = {1, 1, 0};
      const Results<Storage> alone = results_of(kernels, p, runtime_of(1, p.l2_bytes));
      const char* error = alone.error();
      for (const Plan& plan : plans) {
        if (error) break;
        forced_plan = plan;
        arrival = Arrival(round++ % 4);
        const Results<Storage> shared =
            results_of(kernels, p, runtime_of(plan.groups * plan.members, p.l2_bytes));
        error = shared.error();
        if (!error) error = shared.difference(alone, plan.groups);
      }
      if (!error) continue;
      std::fprintf(stderr,
                   "%s, %zu bytes, (D, V, H, T, B) = (%d, %d, %d, %d, %d), options %u, %d x %d: ",
                   cell.title.c_str(), sizeof(Storage), int(p.D), int(p.V), int(p.H), int(p.T),
                   int(p.B), options, int(forced_plan.groups), int(forced_plan.members));
      fail(error);
    }
  }
  std::printf("%s, %zu bytes: %u runs\n", cell.title.c_str(), sizeof(Storage), round);
  std::fflush(stdout);
}

void check_cell(const TestedCell& cell, const Kernels& kernels) {
  if (cell.title.find(selected) == std::string::npos) return;
  if (sampled == 1) check_accuracy(cell, kernels);
  check<float>(cell, kernels);
  check<double>(cell, kernels);
  check<BFloat16>(cell, kernels);
  check<Half>(cell, kernels);
  if (!cell.projects) check_trees(cell, kernels);
}

// Returns the cells of `kernels`, in C++ and as programs. Their titles start with `instructions`.
std::vector<TestedCell> cells_of(const std::string& instructions, const Kernels& kernels,
                                 bool in_floats) {
  std::vector<TestedCell> cells;
  const auto add = [&](const Cell& cell, CellKind kind) {
    cells.push_back({cell, instructions + ", " + cell.name, kind, false, in_floats});
  };
  for (int64_t i = 0; i < kCells; ++i) add(kernels.cells[i], CellKind(i));
  for (const auto& [twin, text] : programs) add(cell_of_text(text, kernels), twin);
  return cells;
}

void check_all(const Kernels& kernels) {
  const std::string title = std::string(kernels.name) + ", functions";
  if (title.find(selected) != std::string::npos) check_functions(kernels, title);
  for (TestedCell& cell : cells_of(kernels.name, kernels, true)) {
    check_cell(cell, kernels);
    if (!cell.can_project) continue;
    cell.title += " with projections";
    cell.projects = true;
    check_cell(cell, kernels);
  }
}

// Checks kernels that multiply pairs of bfloat16, with the cells of `in_float`. For float kernels,
// `bits` is the number of significant bits that the kernels multiply; otherwise `bits` is empty.
template <class Storage, class... Bits>
void check_pairs(const std::string& name, const KernelsFor<Storage>& kernels,
                 const Kernels& in_float, Bits... bits) {
  for (const TestedCell& cell : cells_of(name, in_float, false)) {
    if (needs_floats(cell)) continue;
    if (cell.title.find(selected) == std::string::npos) continue;
    if (sampled == 1) check_accuracy(cell, kernels, bits...);
    check(cell, kernels);
  }
}

void check_terms(const std::string& name, const KernelsFor<float> (&kernels)[kMostTerms],
                 const Kernels& in_float) {
  check_pairs(name + ", one term", kernels[0], in_float, 8);
  check_pairs(name + ", two terms", kernels[1], in_float, 16);
}

}  // namespace
}  // namespace namernn_fast

// The arguments, which are optional: a text such as "avx512, gru" that selects the cells whose
// titles contain it, and N to run one in N problems, without checks of accuracy.
int main(int argc, char** argv) {
  using namespace namernn_fast;
  if (argc > 1) selected = argv[1];
  if (argc > 2) sampled = unsigned(std::max(1, std::atoi(argv[2])));
  if (const std::string error = misjudged_program(); !error.empty()) fail(error.c_str());
  check_all(kernels_baseline);
  check_pairs("emulated pairs", kernels_emulated_pairs, kernels_baseline);
  check_terms("emulated pairs", kernels_emulated_float, kernels_baseline);
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) check_all(kernels_avx2);
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")) {
    check_all(kernels_avx512);
  }
  if (__builtin_cpu_supports("avx512bf16")) {
    check_pairs("avx512_bf16", kernels_avx512_bf16, kernels_avx512);
  }
#if defined(__linux__)
  constexpr long request_permission = 0x1023, tile_data = 18;
  if (__builtin_cpu_supports("amx-bf16") &&
      syscall(SYS_arch_prctl, request_permission, tile_data) == 0) {
    check_pairs("amx", kernels_amx, kernels_avx512);
    check_terms("amx", kernels_amx_float, kernels_avx512);
  }
#endif
#endif
}
