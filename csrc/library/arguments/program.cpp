#include "library/arguments/program.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <mutex>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "library/base/check.h"
#include "processor.h"
#include "program.h"
#include "rows.h"

namespace namernn_fast {
namespace {

constexpr size_t kMostSlots = 256;        // each takes a kilobyte of the stack
constexpr size_t kMostKeptPrograms = 64;  // number of parsed programs that are kept

// Reads the tokens of a text.
class Reader {
 public:
  explicit Reader(std::string_view text) : text_(text) {}

  // Returns the next token; empty at the end of the text.
  std::string_view token() {
    const size_t first = std::min(text_.find_first_not_of(" \n"), text_.size());
    const size_t last = std::min(text_.find_first_of(" \n", first), text_.size());
    const std::string_view token = text_.substr(first, last - first);
    text_.remove_prefix(last);
    return token;
  }
  void expect(std::string_view word) {
    const std::string_view found = token();
    check(found == word, "program must have '", word, "' here, got '", found.substr(0, 64), "'");
  }
  static int64_t number_of(std::string_view what, std::string_view token, int64_t least,
                           int64_t most) {
    int64_t number = -1;
    const auto [end, error] = std::from_chars(token.data(), token.data() + token.size(), number);
    const bool is_number = error == std::errc() && end == token.data() + token.size();
    check(is_number && number >= least && number <= most, "program: ", what, " must be between ",
          least, " and ", most, ", got '", token.substr(0, 64), "'");
    return number;
  }
  // Reads `word` and a number.
  int64_t number(std::string_view word, int64_t least, int64_t most) {
    expect(word);
    return number_of(word, token(), least, most);
  }
  void version() {
    expect("equation");
    const std::string_view version = token();
    check(version == "1", "program must be of version 1, got version '", version.substr(0, 64),
          "': it was written by another version of namernn_fast");
  }
  std::string name() {
    const std::string_view name = token();
    bool fits = !name.empty() && name.size() <= 64 && !(name[0] >= '0' && name[0] <= '9');
    for (const char c : name) {
      fits &=
          (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_';
    }
    check(fits, "program: a name must be an identifier of at most 64 letters, got '",
          name.substr(0, 64), "'");
    return std::string(name);
  }
  double constant() {
    const std::string_view token = this->token();
    uint64_t bits = 0;
    const auto [end, error] = std::from_chars(token.data(), token.data() + token.size(), bits, 16);
    check(token.size() == 16 && error == std::errc() && end == token.data() + token.size(),
          "program: a constant must be 16 hexadecimal digits, got '", token.substr(0, 64), "'");
    double value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }

 private:
  std::string_view text_;
};

// A program and what it points to.
struct Parsed {
  Cell cell{};
  Program program{};
  std::string name;
  std::vector<std::string> names;  // of inputs and of the cell's own parameters
  std::vector<double> constants;
  struct Pass {
    std::vector<Instruction> instructions;
    std::vector<Slot> slots;
    std::vector<Phase> phases;
    std::vector<std::vector<int16_t>> phase_slots;
  } passes[2];
};

// Parses and checks the instructions of one pass.
class PassParser {
 public:
  PassParser(Reader& reader, Parsed& parsed, bool is_forward)
      : reader_(reader),
        cell_(parsed.cell),
        constants_(int64_t(parsed.constants.size())),
        pass_(parsed.passes[!is_forward]),
        is_forward_(is_forward) {}

  void parse(int64_t count) {
    for (int64_t i = 0; i < count; ++i) parse_instruction();
    check_results();
    find_only_kept();
    find_phases();
    if (pass_.phases.size() > 1) find_row_registers();
  }

  bool computes_means() const {
    const auto& all = pass_.instructions;
    return std::any_of(all.begin(), all.end(), [](const Instruction& instruction) {
      return instruction.operation == Operation::mean;
    });
  }
  // Whether the pass reads the previous h, and whether it writes the gradient of the previous h.
  bool reads_previous_h() const { return has_slot(Place::previous, 0); }
  bool writes_previous_h() const { return has_slot(Place::grad_previous, 0); }

  PassProgram result() const {
    return {pass_.instructions.data(), pass_.slots.data(),           int64_t(pass_.slots.size()),
            pass_.phases.data(),       int64_t(pass_.phases.size()), row_registers_,
            cell_.kept - cell_.states};
  }

 private:
  struct Operand {
    Place place;
    int64_t index;
  };

  static bool is_register(Place place) { return place <= Place::vector; }
  bool is_constant(const Slot& slot) const {
    return slot.place == Place::constant || slot.place == Place::units;
  }

  // Returns how many values a place has, or 0 if this pass has no such place.
  int64_t count_of(Place place) const {
    switch (place) {
      case Place::full:
        return kMostFull;
      case Place::number:
        return kMostNumbers;
      case Place::vector:
        return kMostVectors;
      case Place::constant:
        return constants_;
      case Place::units:
        return 1;
      case Place::sum:
        return is_forward_ ? cell_.sums : 0;
      case Place::previous:
        return cell_.states;
      case Place::state:
        return is_forward_ ? cell_.states : 0;
      case Place::kept:
        return is_forward_ ? cell_.kept - (cell_.states - 1) : cell_.kept;
      case Place::input:
        return cell_.inputs;
      case Place::own:
        return own_blocks(cell_);
      case Place::output:
        return is_forward_ ? 0 : 1;
      case Place::grad:
        return is_forward_ ? 0 : cell_.states;
      case Place::dz:
        return is_forward_ ? 0 : cell_.sums;
      case Place::grad_previous:
        return is_forward_ ? 0 : cell_.states;
      case Place::grad_input:
        return is_forward_ ? 0 : cell_.inputs;
      case Place::grad_own:
        return is_forward_ ? 0 : own_blocks(cell_);
    }
    return 0;
  }
  // Returns whether a pass must write every value of this place exactly once.
  bool is_result(Place place) const {
    return place == Place::state || place >= Place::dz || (is_forward_ && place == Place::kept);
  }

  Operand operand() {
    const std::string_view token = reader_.token();
    const char* const letter =
        token.size() < 2 ? nullptr : std::strchr(kLetters, token[0] ? token[0] : '?');
    check(letter, "program must have an operand here, got '", token.substr(0, 64), "'");
    const Place place = Place(letter - kLetters);
    const int64_t count = count_of(place);
    check(count > 0, "program: a ", pass_name(), " pass has no ", token.substr(0, 64), " here");
    return {place, Reader::number_of("an index", token.substr(1), 0, count - 1)};
  }
  const char* pass_name() const { return is_forward_ ? "forward" : "backward"; }

  int64_t find_slot(Operand operand) const {
    for (int64_t s = int64_t(pass_.slots.size()) - 1; s >= 0; --s) {
      if (pass_.slots[s].place == operand.place && indices_[s] == operand.index) return s;
    }
    return -1;
  }
  bool has_slot(Place place, int64_t index) const { return find_slot({place, index}) >= 0; }

  int16_t add_slot(Operand operand) {
    check(pass_.slots.size() < kMostSlots, "program: a pass must use at most ", kMostSlots,
          " values");
    const Place place = operand.place;
    const bool is_input = place == Place::input || place == Place::grad_input;
    const bool is_own = place == Place::own || place == Place::grad_own;
    Slot slot{place, false, false, -1, int16_t(operand.index), 0};
    slot.is_number = place == Place::number || place == Place::constant || place == Place::units ||
                     (is_input && cell_.input_is_number[operand.index]);
    slot.is_vector = place == Place::vector || is_own;
    while (is_own && slot.index >= cell_.own_blocks[slot.parameter]) {
      slot.index = int16_t(slot.index - cell_.own_blocks[slot.parameter++]);
    }
    pass_.slots.push_back(slot);
    indices_.push_back(operand.index);
    return int16_t(pass_.slots.size() - 1);
  }

  int16_t source(Operand operand) {
    const Place place = operand.place;
    const int64_t found = find_slot(operand);
    const bool must_be_written = is_register(place) || is_result(place);
    check(!must_be_written || (found >= 0 && (is_register(place) || is_readable(place))),
          "program: ", text_of(operand), " must be written before it is read");
    const bool is_late = (place == Place::previous && has_slot(Place::state, operand.index)) ||
                         (place == Place::sum && has_slot(Place::state, 0)) ||
                         (place == Place::grad && has_slot(Place::grad_previous, operand.index));
    check(!is_late, "program: ", text_of(operand), " must be read before a result replaces it");
    return found >= 0 ? int16_t(found) : add_slot(operand);
  }
  // Returns whether instructions may read this result after it was written.
  static bool is_readable(Place place) {
    return place == Place::state || place == Place::kept || place == Place::dz ||
           place == Place::grad_previous;
  }

  int16_t destination(Operand operand, Operation operation) {
    const Place place = operand.place;
    check(is_register(place) || is_result(place), "program must not write to ", text_of(operand));
    check((operation == Operation::accumulate) == (place == Place::grad_own),
          "program must accumulate gradients of parameters, and nothing else");
    const int64_t found = find_slot(operand);
    check(found < 0 || is_register(place), "program must write ", text_of(operand), " once");
    // Numbers are computed only in the first chunk of a row, so each has its own slot.
    return found >= 0 && place != Place::number ? int16_t(found) : add_slot(operand);
  }
  static std::string text_of(Operand operand) {
    return kLetters[int(operand.place)] + std::to_string(operand.index);
  }

  void parse_instruction() {
    const std::string_view name = reader_.token();
    int index = 0;
    while (index < kOperationCount && name != kOperations[index].name) ++index;
    check(index < kOperationCount, "program must have an operation here, got '", name.substr(0, 64),
          "'");
    Instruction instruction{};
    instruction.operation = Operation(index);
    const Operand to = operand();
    for (int i = 0; i < kOperations[index].sources; ++i) {
      instruction.sources[i] = source(operand());
    }
    instruction.destination = destination(to, instruction.operation);
    const Slot& slot = pass_.slots[instruction.destination];
    instruction.of_numbers = slot.is_number;
    instruction.of_vectors = slot.place == Place::vector;
    const bool is_mean = instruction.operation == Operation::mean;
    check(!is_mean || slot.place == Place::number, "program: a mean must be written to a number");
    for (int i = 0; i < kOperations[index].sources; ++i) {
      const Slot& from = pass_.slots[instruction.sources[i]];
      const bool fits = is_mean || instruction.operation == Operation::accumulate
                            ? !from.is_number
                            : is_constant(from) || ((!slot.is_number || from.is_number) &&
                                                    (!instruction.of_vectors || from.is_vector));
      check(fits, "program: ", text_of(to), " cannot be computed from source ", i);
    }
    if (instruction.operation == Operation::accumulate) {
      instruction.sources[1] = instruction.destination;
    }
    pass_.instructions.push_back(instruction);
  }

  void check_results() const {
    for (size_t letter = 0; letter < sizeof(kLetters) - 1; ++letter) {
      const Place place = Place(letter);
      for (int64_t i = 0; is_result(place) && i < count_of(place); ++i) {
        const bool is_optional = place == Place::grad_previous && i == 0;
        check(is_optional || has_slot(place, i), "program must write ", text_of({place, i}));
      }
    }
  }

  void find_only_kept() {
    std::vector<bool> read(pass_.slots.size());
    for (const Instruction& instruction : pass_.instructions) {
      for_each_source(instruction, [&](int16_t s) { read[s] = true; });
    }
    for (Instruction& instruction : pass_.instructions) {
      const int16_t to = instruction.destination;
      instruction.only_kept = is_forward_ && pass_.slots[to].place == Place::kept && !read[to];
    }
  }

  template <class F>
  static void for_each_source(const Instruction& instruction, F&& f) {
    const int count = kOperations[int(instruction.operation)].sources;
    for (int i = 0; i < count; ++i) f(instruction.sources[i]);
  }

  void add_phase(size_t first, size_t last) {
    std::vector<int16_t> slots;
    const auto add = [&](int16_t s) {
      const Slot& slot = pass_.slots[s];
      if (is_register(slot.place) || is_constant(slot)) return;
      if (std::find(slots.begin(), slots.end(), s) == slots.end()) slots.push_back(s);
    };
    for (size_t n = first; n < last; ++n) {
      const Instruction& instruction = pass_.instructions[n];
      for_each_source(instruction, add);
      add(instruction.destination);
    }
    pass_.phases.push_back({int16_t(first), int16_t(last), nullptr, 0});
    pass_.phase_slots.push_back(std::move(slots));
  }

  // Starts a phase before each instruction that reads a mean of the current phase.
  void find_phases() {
    std::vector<int16_t> means;
    size_t first = 0;
    for (size_t n = 0; n < pass_.instructions.size(); ++n) {
      const Instruction& instruction = pass_.instructions[n];
      bool reads_mean = false;
      for_each_source(instruction, [&](int16_t s) {
        reads_mean |= std::find(means.begin(), means.end(), s) != means.end();
      });
      if (reads_mean) {
        add_phase(first, n);
        first = n;
        means.clear();
      }
      if (instruction.operation == Operation::mean) means.push_back(instruction.destination);
    }
    add_phase(first, pass_.instructions.size());
  }

  // Finds the values that a phase reads, but an earlier phase wrote.
  void find_row_registers() {
    for (size_t p = 0; p < pass_.phases.size(); ++p) {
      std::vector<bool> written(pass_.slots.size());
      for (int64_t n = pass_.phases[p].first; n < pass_.phases[p].last; ++n) {
        const Instruction& instruction = pass_.instructions[n];
        for_each_source(instruction, [&](int16_t s) {
          Slot& slot = pass_.slots[s];
          const bool is_private = slot.place == Place::full || slot.place == Place::vector ||
                                  (is_forward_ && slot.place == Place::kept);
          if (is_private && !written[s] && slot.row_register < 0) {
            slot.row_register = row_registers_++;
          }
        });
        written[instruction.destination] = true;
      }
    }
    for (size_t p = 0; p < pass_.phases.size(); ++p) {
      for (size_t s = 0; s < pass_.slots.size(); ++s) {
        const Slot& slot = pass_.slots[s];
        if (is_register(slot.place) && slot.row_register >= 0) {
          pass_.phase_slots[p].push_back(int16_t(s));
        }
      }
    }
  }

  Reader& reader_;
  const Cell& cell_;
  const int64_t constants_;
  Parsed::Pass& pass_;
  const bool is_forward_;
  std::vector<int64_t> indices_;  // the index in the text of each slot
  int16_t row_registers_ = 0;
};

void read_lists(Reader& reader, Parsed& parsed) {
  Cell& cell = parsed.cell;
  reader.version();
  reader.expect("name");
  parsed.name = reader.name();
  cell.gates = reader.number("gates", 1, kMostGates);
  const int64_t separate = reader.number("separate", 0, cell.gates);
  cell.has_weight_hh = reader.number("weight_hh", 0, 1);
  cell.can_have_heads = reader.number("heads", 0, cell.has_weight_hh);
  check(cell.has_weight_hh || separate == 0,
        "program without weight_hh must have no separate sums");
  cell.sums = cell.gates + separate;
  cell.first_state_sum = separate;
  for (int64_t g = 0; g < cell.gates; ++g) {
    cell.input_block[g] = (g + cell.gates - separate) % cell.gates;
  }
  cell.states = reader.number("states", 1, kMostStates);
  cell.inputs = reader.number("inputs", 0, kMostInputs);
  for (int64_t i = 0; i < cell.inputs; ++i) {
    parsed.names.push_back(reader.name());
    const std::string_view size = reader.token();
    check(size == "hidden" || size == "number", "program: an input is 'hidden' or 'number', got '",
          size.substr(0, 64), "'");
    cell.input_is_number[i] = size == "number";
  }
  cell.own = reader.number("own", 0, kMostOwn);
  for (int64_t i = 0; i < cell.own; ++i) {
    parsed.names.push_back(reader.name());
    cell.own_blocks[i] = Reader::number_of("blocks", reader.token(), 1, cell.gates);
    check(cell.own_blocks[i] == 1 || cell.own_blocks[i] == cell.gates,
          "program: a parameter has one block or one for each gate, got ", cell.own_blocks[i]);
  }
  cell.kept = reader.number("kept", cell.states - 1, kMostKept);
  const int64_t constants = reader.number("constants", 0, kMostConstants);
  for (int64_t i = 0; i < constants; ++i) parsed.constants.push_back(reader.constant());
  cell.activations = 1;
  cell.one_bias_gradient = separate == 0;
}

// Returns the FNV-1a hash of a text.
uint64_t digest_of(std::string_view text) {
  uint64_t hash = 0xcbf29ce484222325;
  for (const char c : text) hash = (hash ^ uint8_t(c)) * 0x100000001b3;
  return hash;
}

std::shared_ptr<const Parsed> parse(std::string_view text) {
  const auto parsed = std::make_shared<Parsed>();
  Cell& cell = parsed->cell;
  cell = kernels().equation;
  Reader reader(text);
  read_lists(reader, *parsed);
  PassParser forward(reader, *parsed, true), backward(reader, *parsed, false);
  const int64_t count = reader.number("forward", 1, kMostInstructions - 1);
  forward.parse(count);
  backward.parse(reader.number("backward", 1, kMostInstructions - count));
  reader.expect("end");
  check(reader.token().empty(), "program must have nothing after 'end'");
  const bool reads_h = forward.reads_previous_h() || backward.reads_previous_h();
  check(!reads_h || backward.writes_previous_h(), "program must write q0, because it reads p0");
  cell.only_through_sums = !backward.writes_previous_h();
  cell.states_need_rows = forward.computes_means();
  cell.gradients_need_rows = backward.computes_means();
  parsed->program = {forward.result(), backward.result(), parsed->constants.data(),
                     digest_of(text)};
  for (Parsed::Pass& pass : parsed->passes) {
    for (size_t p = 0; p < pass.phases.size(); ++p) {
      pass.phases[p].slots = pass.phase_slots[p].data();
      pass.phases[p].slot_count = int16_t(pass.phase_slots[p].size());
    }
  }
  cell.name = parsed->name.c_str();
  for (int64_t i = 0; i < cell.inputs; ++i) {
    cell.input_names[i] = parsed->names[size_t(i)].c_str();
    cell.gradients_need_rows |= cell.input_is_number[i];
  }
  for (int64_t i = 0; i < cell.own; ++i) {
    cell.own_names[i] = parsed->names[size_t(cell.inputs + i)].c_str();
  }
  cell.program = &parsed->program;
  return parsed;
}

}  // namespace

std::shared_ptr<const Cell> cell_of_program(std::string_view text) {
  using Entry = std::pair<std::string, std::shared_ptr<const Parsed>>;
  thread_local Entry last;
  if (!last.second || last.first != text) {
    static std::mutex mutex;
    static std::unordered_map<std::string, std::shared_ptr<const Parsed>> programs;
    const std::lock_guard<std::mutex> lock(mutex);
    std::string key(text);
    auto found = programs.find(key);
    if (found == programs.end()) {
      std::shared_ptr<const Parsed> parsed = parse(text);
      if (programs.size() >= kMostKeptPrograms) programs.clear();
      found = programs.emplace(std::move(key), std::move(parsed)).first;
    }
    last = *found;
  }
  return {last.second, &last.second->cell};
}

}  // namespace namernn_fast
