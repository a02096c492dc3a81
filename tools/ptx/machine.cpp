// Schedules the warps of all programs at random, a few instructions at a time. When the lanes of a
// warp diverge, the lanes whose next instruction comes first in the code run first.
#include "machine.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "instructions.h"

namespace ptx {

uint64_t Warp::get(const Operand& of, int lane) {
  switch (of.size) {
    case 1:
      return predicate(of) >> lane & 1;
    case 2:
      return lanes<uint16_t>(of)[lane];
    case 4:
      return lanes<uint32_t>(of)[lane];
    case 8:
      return lanes<uint64_t>(of)[lane];
  }
  return 0;
}

void Warp::set(const Operand& of, int lane, uint64_t bits) {
  switch (of.size) {
    case 2:
      lanes<uint16_t>(of)[lane] = static_cast<uint16_t>(bits);
      break;
    case 4:
      lanes<uint32_t>(of)[lane] = static_cast<uint32_t>(bits);
      break;
    case 8:
      lanes<uint64_t>(of)[lane] = bits;
      break;
  }
}

uint32_t Machine::random(uint32_t below) {  // xorshift64*
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return static_cast<uint32_t>((random_state * 2685821657736338717u >> 33) % below);
}

void Machine::report(const std::string& kind, const Thread& by, const std::string& text) {
  const uint32_t line = kernel.code[by.warp.at].line;
  Fault& fault = faults[kind + "@" + std::to_string(line)];
  if (fault.count++ != 0) return;
  fault.kind = kind;
  fault.line = line;
  fault.text = "program " + std::to_string(by.program().index) + ", warp " +
               std::to_string(by.warp.number) + ", lane " + std::to_string(by.lane) +
               (text.empty() ? "" : ": " + text);
}

void Machine::stop(const std::string& kind, const Thread& by, const std::string& text) {
  report(kind, by, text);
  throw Stop();
}

void Machine::branch(Warp& warp, Mask lanes, uint32_t target) {
  if (lanes == warp.mask) {
    warp.next = target;
    return;
  }
  each_lane(lanes, [&](int lane) { warp.parted[lane] = target; });
  warp.mask &= ~lanes;
}

void Machine::end(Warp& warp, Mask lanes) {
  warp.live &= ~lanes;
  warp.mask &= ~lanes;
  if (warp.live != 0) return;
  warp.state = Warp::kEnded;
  Program& program = *warp.program;
  ++program.ended;
  if (program.waiting != 0) stop("barrier: a warp has ended while others wait", {warp, 0});
}

void Machine::meet(Warp& warp) {
  Program& program = *warp.program;
  if (program.ended != 0) stop("barrier: another warp has already ended", {warp, 0});
  warp.state = Warp::kWaiting;
  if (++program.waiting < program.warps.size()) return;
  acquire_at_barrier(program);
  ++program.epoch;
  program.waiting = 0;
  for (Warp& other : program.warps) {
    other.state = Warp::kReady;
    ++other.meetings;
  }
}

// Chooses which lanes of a diverged warp run next. Lanes at an instruction for the whole warp wait
// for the other lanes.
void Machine::gather(Warp& warp) {
  each_lane(warp.mask, [&](int lane) { warp.parted[lane] = warp.next; });
  std::pair<bool, uint32_t> first{true, ~uint32_t{0}};  // (whether lanes wait there, instruction)
  each_lane(warp.live, [&](int lane) {
    const uint32_t at = warp.parted[lane];
    first = std::min(first, {kernel.code[at].is_whole, at});
  });
  warp.mask = 0;
  warp.next = first.second;
  each_lane(warp.live, [&](int lane) {
    if (warp.parted[lane] == warp.next) warp.mask |= Mask{1} << lane;
  });
}

void Machine::advance(Warp& warp, uint32_t turns) {
  for (; turns > 0 && warp.state == Warp::kReady; --turns) {
    if (warp.mask != warp.live) gather(warp);
    ++now;
    warp.at = warp.next++;
    const Instruction& instruction = kernel.code[warp.at];
    Mask mask = warp.mask;
    if (instruction.guard >= 0) {
      const Mask guard = *reinterpret_cast<const Mask*>(warp.registers + instruction.guard);
      mask &= instruction.is_guard_negated ? ~guard : guard;
    }
    if (mask == 0) continue;
    if (instruction.is_whole && mask != kWholeWarp) stop("divergence", {warp, 0});
    (*instruction.run)(*this, warp, instruction, mask);
  }
}

void Machine::start(uint32_t index) {
  programs.push_back(std::make_unique<Program>());
  Program& program = *programs.back();
  program.index = index;
  const uint32_t place[] = {index % grid[0], index / grid[0] % grid[1], index / grid[0] / grid[1]};
  program.shared.assign(shared_bytes, 0xff);  // NaN in every format
  program.slots.resize(shared_bytes / kernel.slot_size + 1);
  program.known.assign(programs_in_all(), 0);
  program.registers.resize(static_cast<size_t>(warps) * kernel.registers, 0xcd);
  program.warps.resize(warps);
  for (int number = 0; number < warps; ++number) {
    Warp& warp = program.warps[number];
    warp.program = &program;
    warp.number = number;
    warp.registers = program.registers.data() + number * kernel.registers;
    std::copy(kernel.constants.begin(), kernel.constants.end(), warp.registers);
    const auto fill = [&](const Operand& of, int64_t value, int64_t step) {
      for (int lane = 0; lane < kLanes; ++lane) warp.set(of, lane, value + step * lane);
    };
    fill(kernel.specials[0], number * kLanes, 1);
    fill(kernel.specials[1], 0, 1);
    fill(kernel.specials[2], warps * kLanes, 0);
    for (int axis = 0; axis < 3; ++axis) {
      fill(kernel.specials[3 + axis], place[axis], 0);
      fill(kernel.specials[6 + axis], grid[axis], 0);
    }
  }
}

void Machine::run() {
  std::vector<uint32_t> order(programs_in_all());
  std::iota(order.begin(), order.end(), 0);
  for (uint32_t i = programs_in_all(); i > 1; --i) std::swap(order[i - 1], order[random(i)]);
  const size_t window = options.cooperative ? order.size() : static_cast<size_t>(options.window);
  size_t begun = 0;
  // To reach unusual interleavings, favor one program for a while and freeze another.
  uint32_t favored = 0, frozen = 0;
  for (uint64_t turn = 0;; ++turn) {
    while (begun < order.size() && programs.size() < window) start(order[begun++]);
    if (programs.empty()) return;
    const uint32_t count = static_cast<uint32_t>(programs.size());
    if (turn % 512 == 0) favored = random(count), frozen = random(2 * count);
    uint32_t chosen = random(4) == 0 ? favored % count : random(count);
    if (chosen == frozen && turn % 512 < 384) chosen = random(count);
    Warp* ready = nullptr;
    for (uint32_t i = 0; i < count && ready == nullptr; ++i) {
      auto& all = programs[(chosen + i) % count]->warps;
      const uint32_t first = random(static_cast<uint32_t>(all.size()));
      for (size_t k = 0; k < all.size() && ready == nullptr; ++k) {
        Warp& warp = all[(first + k) % all.size()];
        if (warp.state == Warp::kReady) ready = &warp;
      }
    }
    if (ready == nullptr) stop("deadlock", {programs[0]->warps[0], 0}, "no warp can run");
    advance(*ready, 1 + random(static_cast<uint32_t>(options.quantum)));
    if (now - progress > static_cast<uint64_t>(options.patience)) {
      stop("deadlock", {*ready, 0}, "nothing has changed for too long");
    }
    if (now > static_cast<uint64_t>(options.limit)) stop("endless", {*ready, 0});
    Program& program = *ready->program;
    if (program.ended == program.warps.size()) {
      publish_all(program);
      progress = now;
      const auto is_same = [&](const auto& other) { return other.get() == &program; };
      programs.erase(std::find_if(programs.begin(), programs.end(), is_same));
    }
  }
}

const Table& table() {
  static const Table all = [] {
    Table made;
    add_arithmetic(made);
    add_memory(made);
    add_warp(made);
    add_tensor_cores(made);
    return made;
  }();
  return all;
}

}  // namespace ptx

// The interface to driver.py.

extern "C" {

// Writes the sizes of an instruction's results, then -1, then the sizes of its sources. Returns the
// number of values written, or -1 if the instruction is unknown.
int64_t ptx_signature(const char* name, int64_t* out) {
  const auto found = ptx::table().find(name);
  if (found == ptx::table().end()) return -1;
  const ptx::Entry& entry = found->second;
  int64_t* end = std::copy(entry.results.begin(), entry.results.end(), out);
  *end++ = -1;
  end = std::copy(entry.sources.begin(), entry.sources.end(), end);
  return end - out;
}

// Creates a kernel. `names` holds a zero-terminated name per instruction. For each instruction,
// `code` holds six values: the line, the guard, whether the guard is negated, and the number of
// results, sources and numbers. Each operand's place and size follow, and then the numbers.
ptx::Kernel* ptx_new(const char* names, const int64_t* code, int64_t count,
                     const uint8_t* constants, int64_t constant_bytes, int64_t registers,
                     const int64_t* specials, int64_t special_count) {
  auto* kernel = new ptx::Kernel();
  kernel->constants.assign(constants, constants + constant_bytes);
  kernel->registers = registers;
  const auto read_operands = [](const int64_t*& from, int64_t n) {
    std::vector<ptx::Operand> operands;
    for (; n > 0; --n, from += 2) operands.push_back({from[0], from[1]});
    return operands;
  };
  kernel->specials = read_operands(specials, special_count);
  for (; count > 0; --count) {
    const ptx::Entry& entry = ptx::table().at(names);
    const bool is_store = std::strncmp(names, "st.", 3) == 0;
    names += std::strlen(names) + 1;
    ptx::Instruction made;
    made.run = &entry.run;
    made.is_whole = entry.is_whole;
    made.line = static_cast<uint32_t>(code[0]);
    made.guard = code[1];
    made.is_guard_negated = code[2] != 0;
    const int64_t* rest = code + 6;
    made.results = read_operands(rest, code[3]);
    made.sources = read_operands(rest, code[4]);
    made.numbers.assign(rest, rest + code[5]);
    if (is_store)
      kernel->slot_size = std::min(kernel->slot_size, static_cast<uint64_t>(made.numbers[1]));
    code = rest + code[5];
    kernel->code.push_back(std::move(made));
  }
  return kernel;
}

void ptx_delete(ptx::Kernel* kernel) { delete kernel; }

// Runs a kernel and returns one line per fault, with tab-separated kind, PTX line, count and text.
// The returned text is valid until the thread's next call.
const char* ptx_run(const ptx::Kernel* kernel, const uint8_t* parameters, int64_t parameter_bytes,
                    const int64_t* grid, int64_t warps, int64_t shared_bytes,
                    const int64_t* tensors, int64_t tensor_count, const ptx::Options* options) {
  ptx::Machine machine(*kernel, *options);
  machine.grid = {static_cast<uint32_t>(grid[0]), static_cast<uint32_t>(grid[1]),
                  static_cast<uint32_t>(grid[2])};
  machine.warps = static_cast<int>(warps);
  machine.parameters.assign(parameters, parameters + parameter_bytes);
  machine.shared_bytes = static_cast<size_t>(shared_bytes);
  for (int64_t i = 0; i < tensor_count; ++i) {
    machine.tensors.emplace_back();
    ptx::Tensor& tensor = machine.tensors.back();
    tensor.begin = static_cast<uint64_t>(tensors[2 * i]);
    tensor.end = tensor.begin + static_cast<uint64_t>(tensors[2 * i + 1]);
    tensor.slots.resize((tensor.end - tensor.begin) / kernel->slot_size + 1);
  }
  machine.random_state =
      static_cast<uint64_t>(options->seed) * 0x9e3779b97f4a7c15u + 88172645463325252u;
  for (int i = 0; i < 8; ++i) machine.random(2);
  try {
    machine.run();
  } catch (const ptx::Stop&) {
  }
  static thread_local std::string text;
  text.clear();
  for (const auto& [key, fault] : machine.faults) {
    text += fault.kind + "\t" + std::to_string(fault.line) + "\t" + std::to_string(fault.count) +
            "\t" + fault.text + "\n";
  }
  return text.c_str();
}

}  // extern "C"
