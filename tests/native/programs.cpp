#include "programs.h"

// The native tests link only kernels, so the parser, which needs no torch, is compiled here.
#include "library/arguments/program.cpp"

namespace namernn_fast {

// Replaces processor.cpp. The parser copies functions of these kernels, which cell_of_text()
// replaces.
const Kernels& kernels() { return kernels_baseline; }

namespace {

// Each line of a pass computes one value of the equation, or its gradient.
constexpr const char kGru[] = R"(
equation 1 name gru_program gates 3 separate 1 weight_hh 1 heads 1
states 1 inputs 0 own 0 kept 4 constants 0
forward 7
sigmoid k1 s1
sigmoid k2 s2
copy k3 s3
fma r0 k1 k3 s0  tanh k0 r0
sub r1 p0 k0  fma h0 k2 r1 k0
backward 9
sub r0 p0 k0  mul r0 g0 r0  sigmoid_grad d2 r0 k2
fnma r1 g0 k2 g0  tanh_grad d0 r1 k0
mul d3 d0 k1
mul r2 d0 k3  sigmoid_grad d1 r2 k1
mul q0 g0 k2
end)";

constexpr const char kIndependent[] = R"(
equation 1 name independent_program gates 2 separate 0 weight_hh 0 heads 0
states 2 inputs 0 own 0 kept 2 constants 0
forward 3
sigmoid k0 s0
fma h1 k0 p1 s1
tanh h0 h1
backward 6
tanh_grad r0 g0 y0  add r0 r0 g1
mul r1 r0 p1  sigmoid_grad d0 r1 k0
copy d1 r0
mul q1 r0 k0
end)";

// The constants are 1/2 and 1/16.
constexpr const char kMeans[] = R"(
equation 1 name means_program gates 2 separate 0 weight_hh 1 heads 1
states 4 inputs 2 drive hidden attention number own 2 rate 1 shift 2
kept 5 constants 2 3fe0000000000000 3fb0000000000000
forward 23
sigmoid v0 o0
add r0 s0 s1  mean m0 r0  mul m1 m0 c0
sub r1 s0 m1  add r1 r1 o1  sigmoid k0 r1
sub r2 s1 m1  add r2 r2 o2  tanh k1 r2
mul r3 c0 k1  fnma r3 k0 r3 r3  fma h1 k0 p1 r3
add r4 p2 k0  mul h2 c0 r4
fma r5 c0 p0 i0  fma h3 k1 p3 r5
fma r6 v0 h3 i1
sub r7 c1 h1  mean m2 r7
fma r8 r6 h2 h1  add r8 r8 m2  tanh h0 r8
backward 36
sigmoid v0 o0
tanh_grad r0 g0 y0
mul r1 r0 k3
mean m0 r0  mean m1 r1  mul j1 m1 n0
sub r2 r0 m0  add r2 r2 g1
fma r3 v0 k4 i1  fma r3 r0 r3 g2
mul r4 v0 k3  fma r4 r0 r4 g3
mul r5 c0 k1  sub r5 p1 r5  mul r6 c0 r3  fma r5 r2 r5 r6
mul r7 c0 r2  fnma r7 r7 k0 r7  fma r7 r4 p3 r7
sigmoid_grad r8 r5 k0
tanh_grad r9 r7 k1
mul r10 r1 k4  sigmoid_grad r10 r10 v0
accumulate w0 r10  accumulate w1 r8  accumulate w2 r9
mul q0 c0 r4  mul q1 r2 k0  copy q2 r6  mul q3 r4 k1
copy j0 r4
add r11 r8 r9  mean m2 r11  mul m3 m2 c0
sub d0 r8 m3  sub d1 r9 m3
end)";

}  // namespace

// Together these programs have what the interpreter treats differently: registers of all three
// kinds, means in both passes, both kinds of inputs, parameters with one and several blocks,
// separate sums, and layers without weight_hh.
const TestedProgram programs[] = {
    {CellKind::gru, kGru}, {CellKind::independent, kIndependent}, {CellKind::with_means, kMeans}};

Cell cell_of_text(const std::string& text, const Kernels& kernels) {
  static std::vector<std::shared_ptr<const Cell>> parsed;  // the cells point to their programs
  parsed.push_back(cell_of_program(text));
  Cell cell = *parsed.back();
  static_cast<CellCode<float>&>(cell) = kernels.equation;
  static_cast<CellCode<double>&>(cell) = kernels.equation;
  static_cast<CellCode<BFloat16>&>(cell) = kernels.equation;
  static_cast<CellCode<Half>&>(cell) = kernels.equation;
  return cell;
}

std::string misjudged_program() {
  // A part of kMeans, what replaces it, and the error.
  static const char* const faults[][3] = {
      {"tanh k1 r2", "tan k1 r2", "must have an operation here, got 'tan'"},
      {"tanh k1 r2", "tanh x1 r2", "must have an operand here, got 'x1'"},
      {"tanh k1 r2", "tanh k1 g0", "a forward pass has no g0 here"},
      {"tanh k1 r2", "tanh k2 r2", "an index must be between 0 and 1, got '2'"},
      {"tanh k1 r2", "tanh k1 r9", "r9 must be written before it is read"},
      {"tanh k1 r2", "tanh p1 r2", "must not write to p1"},
      {"tanh k1 r2", "tanh k0 r2", "must write k0 once"},
      {"tanh k1 r2", "mean r9 r2", "a mean must be written to a number"},
      {"tanh k1 r2", "tanh m9 r2", "m9 cannot be computed from source 0"},
      {"tanh k1 r2", "tanh v0 r2", "v0 cannot be computed from source 0"},
      {"sub r7 c1 h1", "sub r7 c1 p1", "p1 must be read before a result replaces it"},
      {"mul q1 r2 k0", "mul r1 r2 k0", "must write q1"},
      {"accumulate w1 r8", "copy w1 r8", "must accumulate gradients of parameters"},
      {"constants 2", "constants 1", "must have 'forward' here"},
      {"\nend", "\nend end", "must have nothing after 'end'"},
      {"\nend", "", "must have 'end' here, got ''"}};
  for (const auto& [part, replacement, message] : faults) {
    std::string text = kMeans;
    text.replace(text.find(part), std::strlen(part), replacement);
    std::string error = "no error";
    try {
      cell_of_program(text);
    } catch (const std::runtime_error& thrown) {
      error = thrown.what();
    }
    if (error.find(message) == std::string::npos) {
      return "program with '" + std::string(replacement) + "': " + error;
    }
  }
  return {};
}

}  // namespace namernn_fast
