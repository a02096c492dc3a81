// The state of a running kernel: its instructions, programs, warps and memory.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace ptx {

constexpr int kLanes = 32;
using Mask = uint32_t;  // one bit per lane of a warp
constexpr Mask kWholeWarp = ~Mask{0};

struct Machine;
struct Program;
struct Warp;
struct Instruction;

// Executes an instruction for the lanes in the mask.
using Handler = std::function<void(Machine&, Warp&, const Instruction&, Mask)>;

struct Operand {
  int64_t place;  // byte offset of lane 0 in the registers of a warp
  int64_t size;   // bytes per lane; 1 for a predicate, which is a Mask; 0 for an unused operand
};

struct Instruction {
  const Handler* run;
  uint32_t line;  // line of the PTX
  bool is_whole;  // all lanes of the warp must execute it together
  int64_t guard;  // the place of a predicate, or -1 if there is none
  bool is_guard_negated;
  std::vector<Operand> results, sources;
  std::vector<int64_t> numbers;
};

// Which thread accessed memory, and when.
struct Access {
  static constexpr uint32_t kNobody = ~uint32_t{0};
  static constexpr uint8_t kSeveral = 255;  // value of `warp` or `lane` if several accessed

  uint32_t program = kNobody;
  uint32_t epoch = 0;    // number of program barriers before the access
  uint32_t meeting = 0;  // number of warp and program barriers before the access
  uint16_t instruction = 0;
  uint8_t warp = 0, lane = 0;
};

// The access history of a few bytes of memory.
struct Slot {
  Access written, read;
  std::unique_ptr<std::vector<Access>> read_by_others;  // concurrent reads by other programs
  bool is_written = false;
  bool is_awaited = false;  // the destination of an unfinished cp.async
};

// A vector clock: for each program, how many of the program's epochs happened before the current
// access.
using Clock = std::vector<uint32_t>;

struct Copy {  // one lane's cp.async
  uint64_t from;
  uint32_t to, size, taken;  // writes `size` bytes: `taken` bytes from `from`, then zeros
  int lane;
  bool is_done;
};

struct MatrixProduct {  // an issued wgmma
  void (*multiply)(Machine&, Warp&, const MatrixProduct&);
  const Instruction* at;
  uint64_t left, right;  // shared-memory descriptors
  bool adds;             // accumulates into the result registers
};

struct Warp {
  enum State { kReady, kWaiting, kEnded };

  Program* program;
  int number;
  State state = kReady;
  uint8_t* registers;
  Mask live = kWholeWarp;                 // lanes that have not exited
  Mask mask = kWholeWarp;                 // lanes that run now
  uint32_t at = 0;                        // the instruction that `mask` executes
  uint32_t next = 0;                      // the instruction that follows
  std::array<uint32_t, kLanes> parted{};  // `next` of the lanes not in `mask`
  uint32_t meetings = 0;
  std::array<uint64_t, kLanes> acquired{};  // time of each lane's last acquire

  std::vector<Copy> copies;  // not yet committed to a group
  std::deque<std::vector<Copy>> copy_groups;
  std::vector<MatrixProduct> products;
  std::deque<std::vector<MatrixProduct>> product_groups;

  template <class Value>
  Value* lanes(const Operand& of) {
    return reinterpret_cast<Value*>(registers + of.place);
  }
  Mask& predicate(const Operand& of) { return *lanes<Mask>(of); }
  // Returns one lane's value, of any size.
  uint64_t get(const Operand& of, int lane);
  void set(const Operand& of, int lane, uint64_t bits);
};

struct Thread {
  Warp& warp;
  int lane;
  Program& program() const { return *warp.program; }
};

// The differences between one program's view of global memory and the memory itself.
struct View {
  struct Store {
    uint64_t address;
    uint32_t size, epoch;
    int warp, lane;
    uint8_t bytes[16];
  };
  struct Line {
    uint8_t bytes[32];
    uint64_t fetched;
  };
  // `pending` holds the stores not yet visible to other programs, in order, and `lines` holds the
  // L1 cache. Both maps are keyed by cache line.
  std::unordered_map<uint64_t, std::vector<Store>> pending;
  std::unordered_map<uint64_t, Line> lines;
};

struct Program {
  uint32_t index;
  uint32_t epoch = 0;
  std::vector<Warp> warps;
  size_t waiting = 0, ended = 0;  // number of warps at the barrier, and of warps that ended
  std::vector<uint8_t> registers, shared;
  std::vector<Slot> slots;  // access history of shared memory
  View view;
  Clock known;                   // what happened before the program's last barrier
  std::map<int, Clock> learned;  // the clock that each thread acquired since the last barrier
  uint64_t acquired = 0;         // time of the program's last acquire before its last barrier
};

struct Tensor {
  uint64_t begin, end;
  std::vector<Slot> slots;
};

struct Options {  // as in driver.py
  int64_t seed, cooperative, window, quantum, patience, limit, flush, forget;
};

struct Kernel {
  std::vector<Instruction> code;
  std::vector<uint8_t> constants;  // initial values of each warp's first registers
  int64_t registers;               // bytes per warp
  uint64_t slot_size = 4;          // bytes per Slot: the size of the smallest store
  std::vector<Operand> specials;   // thread, lane, thread count, position in the grid, grid size
};

struct Fault {
  std::string kind, text;
  uint32_t line;
  uint64_t count;
};

struct Stop {};  // thrown by Machine::stop

struct Machine {
  Machine(const Kernel& kernel, const Options& options) : kernel(kernel), options(options) {}

  const Kernel& kernel;
  Options options;
  std::array<uint32_t, 3> grid;
  int warps;
  std::vector<uint8_t> parameters;
  size_t shared_bytes;
  std::vector<Tensor> tensors;

  std::vector<std::unique_ptr<Program>> programs;  // started but not ended
  std::unordered_map<uint64_t, Clock> released;    // the clock released at each address
  std::map<std::string, Fault> faults;
  uint64_t now = 0;       // number of executed instructions
  uint64_t progress = 0;  // `now` at the last visible change
  uint64_t random_state;

  void run();
  uint32_t programs_in_all() const { return grid[0] * grid[1] * grid[2]; }
  uint32_t random(uint32_t below);
  bool chance(int64_t percent) { return random(100) < static_cast<uint64_t>(percent); }

  // Defined in machine.cpp. `report` records a fault; `stop` also ends the kernel.
  void report(const std::string& kind, const Thread& by, const std::string& text = "");
  [[noreturn]] void stop(const std::string& kind, const Thread& by, const std::string& text = "");
  void branch(Warp& warp, Mask lanes, uint32_t target);
  void meet(Warp& warp);  // bar.sync
  void end(Warp& warp, Mask lanes);

  // Defined in order.cpp.
  bool happened_before(const Access& access, const Thread& thread) const;
  void note_read(Slot& slot, const Thread& by, const char* memory);
  void note_write(Slot& slot, const Thread& by, bool is_same, const char* memory);
  void release(const Thread& by, uint64_t address);
  void acquire(const Thread& by, uint64_t address);
  void acquire_at_barrier(Program& program);

  // Defined in global_memory.cpp.
  void load(const Thread& by, uint64_t address, uint32_t size, void* out);
  void store(const Thread& by, uint64_t address, uint32_t size, const void* in);
  void load_counter(const Thread& by, uint64_t address, uint32_t size, void* out);
  void add_to_counter(const Thread& by, uint64_t address, uint32_t addend);
  void publish_before(const Thread& by);
  void publish_all(Program& program);

  // Defined in shared_memory.cpp.
  void load_shared(const Thread& by, uint64_t address, uint32_t size, void* out);
  void store_shared(const Thread& by, uint64_t address, uint32_t size, const void* in);
  void begin_copy(const Thread& by, Copy copy);
  void finish_copies(Warp& warp, size_t groups_left);

 private:
  void start(uint32_t index);
  void gather(Warp& warp);
  void advance(Warp& warp, uint32_t turns);
  std::string place_of(const Access& access) const;
  const Clock& known_to(const Thread& thread) const;
  Tensor& tensor_of(const Thread& by, uint64_t address, uint32_t size, const char* what);
  void note_global(Tensor& tensor, const Thread& by, uint64_t address, uint32_t size,
                   const void* in);
  void peek(const Program& program, uint64_t address, uint32_t size, uint8_t* out) const;
  void publish(std::vector<View::Store>& stores,
               const std::function<bool(const View::Store&)>& which);
  uint8_t* shared_at(const Thread& by, uint64_t address, uint32_t size);
  void read_copy(const Thread& by, Copy& copy);
  template <class Work>
  void each_shared_slot(const Thread& by, uint64_t address, uint32_t size, Work work);
};

// Calls `work` for each lane in the mask. A separate loop covers whole warps, because compilers can
// vectorize that loop.
template <class Work>
inline void each_lane(Mask mask, Work work) {
  if (mask == kWholeWarp) {
    for (int lane = 0; lane < kLanes; ++lane) work(lane);
  } else {
    for (int lane = 0; lane < kLanes; ++lane) {
      if (mask >> lane & 1) work(lane);
    }
  }
}

}  // namespace ptx
