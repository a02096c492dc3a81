// The recurrence, forward and backward, written once on the vector type of whichever ISA includes
// it. Legend and argument structs: kernel.h.
#pragma once

#include <type_traits>

#include "kernel.h"
#include "product-inl.h"
#include "team-inl.h"

namespace namernn_fast {
namespace {

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- Naming rows: which sequences are alive, where their rows lie, what came before them ----

// Sequences begin .. end of a batch.
struct Slice {
  int64_t begin;
  int64_t end;
};

inline int64_t count_at(const Steps& steps, int64_t t) {
  if (t < 0 || t >= steps.T) return 0;
  return steps.count ? steps.count[t] : steps.B;
}

// The end of the slice's sequences that are alive at t; slice.begin when none is.
inline int64_t alive_end(const Steps& steps, int64_t t, Slice slice) {
  return max64(slice.begin, min64(slice.end, count_at(steps, t)));
}

inline int64_t rows_before(const Steps& steps, int64_t t) {
  if (t == steps.T) return steps.N;
  return steps.start ? steps.start[t] : t * steps.B;
}

// The caller's number for sequence b, under which its states lie.
inline int64_t place_of(const Steps& steps, int64_t b) { return steps.order ? steps.order[b] : b; }

template <class Scalar>
inline Scalar* row_at(const Rows<Scalar>& rows, const Steps& steps, int64_t t, int64_t b) {
  return steps.start ? rows.data + (steps.start[t] + b) * rows.row_stride
                     : rows.data + t * rows.time_stride +
                           (steps.origin ? steps.origin[b] : b) * rows.row_stride;
}

// The s-th time in the order of the recurrence, and the times on either side of t in that order.
template <class Scalar>
inline int64_t time_of(const Layer<Scalar>& layer, int64_t s) {
  return layer.reverse ? layer.steps.T - 1 - s : s;
}
template <class Scalar>
inline int64_t time_before(const Layer<Scalar>& layer, int64_t t) {
  return layer.reverse ? t + 1 : t - 1;
}
template <class Scalar>
inline int64_t time_after(const Layer<Scalar>& layer, int64_t t) {
  return layer.reverse ? t - 1 : t + 1;
}

// The sequences alive at t whose previous state is a row of the output; those from here to
// alive_end(t) start at t, from hx.
template <class Scalar>
inline int64_t continued_end(const Layer<Scalar>& layer, int64_t t, Slice slice) {
  return min64(alive_end(layer.steps, t, slice),
               alive_end(layer.steps, time_before(layer, t), slice));
}

// Whether a cut keeps sequence b's state from reaching t. One that starts at t, from hx, meets no
// cut but one before the first time.
template <class Scalar>
inline bool is_cut(const Layer<Scalar>& layer, int64_t t, int64_t b) {
  if (!layer.resets.at) return false;
  const int64_t border = layer.reverse ? t + 1 : t;  // lies between times border - 1 and border
  return border < layer.steps.T && b < count_at(layer.steps, border) &&
         layer.resets.at[border * layer.resets.time_stride + b];
}

// Splits sequences begin .. end into runs alike in whether their state at t is cut off:
// f(begin, end, cut).
template <class Scalar, class F>
inline void for_each_cut(const Layer<Scalar>& layer, int64_t t, int64_t begin, int64_t end, F&& f) {
  if (!layer.resets.at) return f(begin, end, false);
  for (int64_t b = begin; b < end;) {
    const int64_t first = b;
    const bool cut = is_cut(layer, t, first);
    while (b < end && is_cut(layer, t, b) == cut) ++b;
    f(first, b, cut);
  }
}

// The initial state of sequence b, or null: zeros.
template <class Scalar>
inline const Scalar* initial_state(const Layer<Scalar>& layer, int64_t b) {
  return layer.hx ? layer.hx + place_of(layer.steps, b) * layer.hx_stride : nullptr;
}

// Rows that lie evenly: the i-th is (t + i, b) along time, else the i-th after (t, b) in a
// tensor's own order, which may run on through later times.
struct Run {
  int64_t t;
  int64_t b;
  int64_t rows;
  bool along_time;
};

template <class Scalar>
inline int64_t run_stride(const Rows<Scalar>& rows, const Run& run) {
  return run.along_time ? rows.time_stride : rows.row_stride;
}

template <class Scalar>
inline bool is_flat(const Rows<Scalar>& rows, const Steps& steps) {
  return steps.start ||
         (!steps.count && !steps.origin && rows.time_stride == steps.B * rows.row_stride);
}

// Covers the slice's rows at times first .. last with runs, as long as the layout allows. `flat`:
// the tensors concerned hold the rows of one time right after those of the time before; `along`: a
// sequence's rows lie evenly in them, too.
template <class F>
inline void for_each_run(const Steps& steps, int64_t first, int64_t last, Slice slice, bool flat,
                         bool along, F&& f) {
  const int64_t width = slice.end - slice.begin;
  if (flat && width == steps.B) {
    f(Run{first, 0, rows_before(steps, last) - rows_before(steps, first), false});
  } else if (along && last - first > width) {
    for (int64_t b = slice.begin; b < slice.end; ++b) {
      int64_t end = last;
      while (end > first && count_at(steps, end - 1) <= b) --end;
      if (end > first) f(Run{first, b, end - first, true});
    }
  } else {
    for (int64_t t = first; t < last; ++t) {
      f(Run{t, slice.begin, alive_end(steps, t, slice) - slice.begin, false});
    }
  }
}

// ---- Sharing work ----

// The columns first .. last that one of `workers` gets: whole panels of a matrix `width` wide.
struct Columns {
  int64_t first;
  int64_t last;
};

template <class Scalar>
inline Columns columns_of(int64_t width, int64_t worker, int64_t workers) {
  const int64_t panels = panel_count<Scalar>(width);
  constexpr int64_t w = Shape<Scalar>::panel_width;
  return {min64(width, panels * worker / workers * w),
          min64(width, panels * (worker + 1) / workers * w)};
}

// The first sequence of the worker's share when every worker gets about as many rows.
inline int64_t slice_start(const Steps& steps, int64_t worker, int64_t workers) {
  if (!steps.count) return steps.B * worker / workers;
  const int64_t wanted = steps.N * worker / workers;
  int64_t rows = 0;
  int64_t length = steps.T;  // of sequence b: sequences are sorted, longest first
  for (int64_t b = 0; b < steps.B; ++b) {
    while (length > 0 && steps.count[length - 1] <= b) --length;
    if (rows + length / 2 >= wanted) return b;
    rows += length;
  }
  return steps.B;
}

inline Slice slice_of(const Steps& steps, int64_t worker, int64_t workers) {
  return {slice_start(steps, worker, workers), slice_start(steps, worker + 1, workers)};
}

// Runs body(begin, end) over a partition of 0 .. n.
template <class Body>
inline void run_parallel(const Runtime& runtime, int64_t n, Body&& body) {
  if (n == 1) {
    body(0, 1);
  } else {
    runtime.parallel(
        n,
        [](void* context, int64_t begin, int64_t end) {
          (*static_cast<Body*>(context))(begin, end);
        },
        &body);
  }
}

// Hands out the units of a loop that all workers walk through alike; each is done once, with the
// same result by whomever. Dynamic shares go one by one to whoever is free, so that a slow worker
// holds nobody up; fixed shares need nothing in common.
struct Share {
  int64_t* counter;  // of the units taken, or null: fixed
  int64_t step;
  int64_t mine;
  int64_t unit;
};

inline Share dynamic_share(int64_t* counter) {
  return {counter, 0, __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED), 0};
}
inline Share fixed_share(int64_t worker, int64_t workers) { return {nullptr, workers, worker, 0}; }

inline bool take(Share& share) {
  if (share.unit++ != share.mine) return false;
  share.mine = share.counter ? __atomic_fetch_add(share.counter, 1, __ATOMIC_RELAXED)
                             : share.mine + share.step;
  return true;
}

// A worker's part in the recurrence, from the plan: sequences and hidden units.
struct Part {
  Slice slice;
  Columns columns;
  int64_t group;
  int64_t member;  // of the team; 0 of 1 where there is none
  int64_t members;
  Team* team;
};

// Runs body(part) for every part of the plan. `teams`: one for each group, where groups have
// members.
template <class Storage, class Body>
inline void run_plan(const Plan& plan, const Layer<Storage>& layer, const Runtime& runtime,
                     Team* teams, Body&& body) {
  const int64_t workers = plan.groups * plan.members;
  for (int64_t g = 0; plan.members > 1 && g < plan.groups; ++g) teams[g] = Team{};
  run_parallel(runtime, workers, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) {
      const int64_t group = w / plan.members;
      const Slice slice = slice_of(layer.steps, group, plan.groups);
      if (plan.members == 1) {
        body(Part{slice, Columns{0, layer.H}, group, 0, 1, nullptr});
        continue;
      }
      Team& team = teams[group];
      // Members that this thread stands for itself will not come while it waits.
      const int64_t expected = plan.members / (end - begin);
      const int64_t member = join(team, max64(1, expected), runtime);
      if (member < 0) continue;
      body(Part{slice, columns_of<Compute<Storage>>(layer.H, member, team.members), group, member,
                team.members, &team});
    }
  });
}

template <class Scalar>
inline Scalar* scratch(const Runtime& runtime, int64_t elements) {
  return static_cast<Scalar*>(runtime.scratch(size_t(elements) * sizeof(Scalar)));
}

template <class Scalar>
inline Scalar* zeros(const Runtime& runtime, int64_t elements) {
  Scalar* memory = scratch<Scalar>(runtime, elements);
  std::memset(memory, 0, elements * sizeof(Scalar));
  return memory;
}

// While one lives, its thread takes subnormal numbers for zero and makes none. Gradients that fade
// away over many steps pass through them, and there some processors are a hundred times slower.
class FlushSubnormals {
 public:
#if defined(__x86_64__)
  FlushSubnormals() : before_(__builtin_ia32_stmxcsr()) { set(before_ | 0x8040u); }
#elif defined(__aarch64__)
  FlushSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    set(before_ | (uint64_t(1) << 24));
  }
#else
  FlushSubnormals() : before_(0) {}
#endif
  ~FlushSubnormals() { set(before_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
#if defined(__x86_64__)
  static void set(unsigned state) { asm volatile("ldmxcsr %0" : : "m"(state) : "memory"); }
  unsigned before_;
#elif defined(__aarch64__)
  static void set(uint64_t state) { asm volatile("msr fpcr, %0" : : "r"(state) : "memory"); }
  uint64_t before_;
#else
  static void set(int) {}
  int before_;
#endif
};

// ---- The cell: what is particular to the vanilla RNN ----

// h = act(z).
template <class Scalar>
inline Vec<Scalar> activate(Activation activation, Vec<Scalar> z) {
  const Vec<Scalar> zero = {};
  return activation == Activation::tanh ? tanh<Scalar>(z) : z < zero ? zero : z;
}

// The same in place.
template <class Scalar>
inline void activate(Activation activation, Scalar* z, int64_t width) {
  for_each_vector<Scalar>(width, [&](int64_t j, int64_t n) {
    store_upto(z + j, activate<Scalar>(activation, load_upto(z + j, n)), n);
  });
}

// dz = (grad_h + grad_output) act'(z), with act' from h = act(z).
template <class Storage, class Scalar, class Element>
inline void activate_backward(Activation activation, const Storage* h, const Scalar* grad_h,
                              const Storage* grad_output, Element* dz, int64_t width) {
  for_each_vector<Scalar>(width, [&](int64_t j, int64_t n) {
    Vec<Scalar> g = load_upto(grad_h + j, n);
    if (grad_output) g += load_upto(grad_output + j, n);
    const Vec<Scalar> v = load_upto(h + j, n);
    const Vec<Scalar> zero = {};
    // Bits, not numbers: a subnormal number is compared as zero here.
    const auto is_zero = ((typename Simd<Scalar>::I)v << 1) == 0;
    store_upto(dz + j,
               activation == Activation::tanh ? g * (Scalar(1) - v * v)
               : is_zero                      ? zero
                                              : g,
               n);
  });
}

// ---- Forward ----

// Whether a single sequence is so short that packing the weights would cost more than it gains,
// which is mostly the input projection of several steps at once. Rows of whole vectors only.
template <class Scalar>
inline bool leaves_weights_unpacked(const Layer<Scalar>& layer) {
  constexpr int64_t lanes = Simd<Scalar>::lanes;
  return layer.steps.B == 1 && !layer.batch_invariant && !layer.resets.at &&
         layer.steps.T <= kUnpackedSteps && layer.steps.T * layer.D <= 4 * (layer.D + layer.H) &&
         layer.D % lanes == 0 && layer.H % lanes == 0;
}

// Both biases summed, for a panel's columns first ...
template <class Storage, class Scalar>
inline void pack_bias(const Layer<Storage>& layer, int64_t first, Scalar* bias) {
  constexpr int64_t w = Shape<Scalar>::panel_width;
  alignas(64) Scalar other[w];
  pack_row(layer.bias_ih, layer.H, first, bias);
  pack_row(layer.bias_hh, layer.H, first, other);
  for (int64_t j = 0; j < w; ++j) bias[j] += other[j];
}

// The weights of a layer as the forward pass reads them, in one piece of memory, panel by panel.
template <class Storage>
struct PackedWeights {
  using Scalar = Compute<Storage>;
  static constexpr int64_t w = Shape<Scalar>::panel_width;

  Scalar* weights;  // panels of [D + H, H]: W_ih^T over W_hh^T
  Scalar* bias;     // [panels * panel_width], both biases summed
  bool* finite;     // [panels], weight_hh: then zeros need no product, as zero times it is zero

  static size_t bytes(int64_t D, int64_t H) {
    return panel_count<Scalar>(H) * ((D + H + 1) * w * sizeof(Scalar) + sizeof(bool));
  }
  PackedWeights(void* memory, int64_t D, int64_t H)
      : weights(static_cast<Scalar*>(memory)),
        bias(weights + panels_size<Scalar>(D + H, H)),
        finite(reinterpret_cast<bool*>(bias + panel_count<Scalar>(H) * w)) {}

  void pack(const Layer<Storage>& layer, int64_t p) const {
    Scalar* panel = weights + p * (layer.D + layer.H) * w;
    pack_transposed(layer.weight_ih, layer.D, layer.H, p * w, panel);
    pack_transposed(layer.weight_hh, layer.H, layer.H, p * w, panel + layer.D * w);
    pack_bias(layer, p * w, bias + p * w);
    finite[p] = all_finite(panel + layer.D * w, layer.H * w);
  }
};

// Packing an element takes about as long as so many multiply-adds.
constexpr double kPackingCost = 8;

// Packs all of a layer's weights.
template <class Packing, class Storage>
void pack_all(const Layer<Storage>& layer, void* memory, const Runtime& runtime) {
  const Packing packed(memory, layer.D, layer.H);
  const int64_t panels = (layer.H + Packing::w - 1) / Packing::w;
  const double elements = double(layer.D + layer.H) * double(layer.H);
  const int64_t workers = min64(panels, choose_workers(kPackingCost * elements, runtime.machine));
  run_parallel(runtime, workers, [&](int64_t begin, int64_t end) {
    for (int64_t p = panels * begin / workers; p < panels * end / workers; ++p) {
      packed.pack(layer, p);
    }
  });
}

// Where the parts of a plan find the weights packed: all in one place, or, where they fit into the
// cores' own caches, each group in a copy that it packs itself and need not fetch from elsewhere.
struct WeightCopies {
  char* memory;
  size_t stride;  // from a group's copy to the next
  bool packed;    // already
};

constexpr size_t kMaxCopies = size_t(4) << 20;  // bytes

template <class Packing, class Storage>
inline WeightCopies weight_copies(const Layer<Storage>& layer, const Plan& plan,
                                  const Runtime& runtime) {
  if (layer.packed) return {static_cast<char*>(const_cast<void*>(layer.packed)), 0, true};
  const size_t bytes = (Packing::bytes(layer.D, layer.H) + 63) / 64 * 64;
  if (plan.groups == 1 ||
      (bytes <= runtime.machine.near_bytes && bytes * plan.groups <= kMaxCopies)) {
    return {static_cast<char*>(runtime.scratch(bytes * plan.groups)), bytes, false};
  }
  void* memory = runtime.scratch(bytes);
  pack_all<Packing>(layer, memory, runtime);
  return {static_cast<char*>(memory), 0, true};
}

// The weights for one part, whose columns it packs if nobody has.
template <class Packing, class Storage>
inline Packing weights_for(const Part& part, const Layer<Storage>& layer,
                           const WeightCopies& copies) {
  const Packing packed(copies.memory + part.group * copies.stride, layer.D, layer.H);
  for (int64_t j = part.columns.first; !copies.packed && j < part.columns.last; j += Packing::w) {
    packed.pack(layer, j / Packing::w);
  }
  return packed;
}

// What a part reads besides its arguments.
template <class Scalar>
struct ForwardWork {
  const Scalar* weights;
  const Scalar* bias;
  bool finite;          // weight_hh, as far as it is the part's
  const Scalar* zeros;  // [H]: the initial state where there is no hx
};

template <class Storage, class Scalar>
inline ForwardWork<Scalar> forward_work(const Part& part, const Layer<Storage>& layer,
                                        const WeightCopies& copies, const Scalar* zeros) {
  const auto packed = weights_for<PackedWeights<Storage>>(part, layer, copies);
  bool finite = true;
  for (int64_t j = part.columns.first; j < part.columns.last; j += packed.w) {
    finite &= packed.finite[j / packed.w];
  }
  return {packed.weights, packed.bias, finite, zeros};
}

// Where the input projection is done ahead of the recurrence: so many rows of it at once, about.
constexpr int64_t kProjectedRows = 256;

template <class Scalar>
inline void forward_part(const Forward<Scalar>& args, const ForwardWork<Scalar>& work,
                         const Part& part, const Runtime& runtime) {
  const Layer<Scalar>& layer = args.layer;
  const Steps& steps = layer.steps;
  const Slice slice = part.slice;
  const Columns columns = part.columns;
  if (slice.begin == slice.end || columns.first == columns.last) {
    // No rows; but a member without columns still meets the others at every step.
    for (int64_t s = 0; part.team && s + 1 < steps.T; ++s) barrier(*part.team, runtime);
    return;
  }

  constexpr int64_t w = Shape<Scalar>::panel_width;
  const int64_t panel_size = (layer.D + layer.H) * w;
  const bool flat = is_flat(layer.input, steps) && is_flat(args.output, steps);
  // The projection is parallel in time. Done ahead, several steps at once, it has better tiles
  // where few sequences make thin ones, and leaves the nearest caches to weight_hh where both
  // weights would not fit.
  const int64_t width = slice.end - slice.begin;
  const size_t weights =
      size_t(layer.D + layer.H) * (columns.last - columns.first) * sizeof(Scalar);
  const bool project_first =
      (width < Shape<Scalar>::max_rows && (!steps.count || width == steps.B)) ||
      weights > runtime.machine.near_bytes / 2;
  const int64_t projected_steps = max64(1, kProjectedRows / width);
  const Scalar* weight_hh = work.weights + layer.D * w;
  const auto projection = [&](const Scalar* x, int64_t stride) {
    return Operand<Scalar>{
        x, stride, 1, work.weights, panel_size, layer.D, layer.chains.projection};
  };
  const auto recurrence = [&](const Scalar* h, int64_t stride) {
    return Operand<Scalar>{h, stride, 1, weight_hh, panel_size, layer.H, layer.chains.recurrence};
  };

  for (int64_t s = 0; s < steps.T; ++s) {
    const int64_t t = time_of(layer, s);
    if (project_first && s % projected_steps == 0) {
      const int64_t ahead = time_of(layer, min64(s + projected_steps, steps.T) - 1);
      const bool along = !steps.start;
      for_each_run(
          steps, min64(t, ahead), max64(t, ahead) + 1, slice, flat, along, [&](const Run& run) {
            const Operand<Scalar> operand =
                projection(row_at(layer.input, steps, run.t, run.b), run_stride(layer.input, run));
            const Target<Scalar> target{row_at(args.output, steps, run.t, run.b),
                                        run_stride(args.output, run), work.bias, 0, false};
            product<Scalar, false>(&operand, 1, target, run.rows, columns.first, columns.last,
                                   Nothing());
          });
    }

    // Sequences begin .. end at t, from their states `h`, or from nothing.
    const auto advance = [&](int64_t begin, int64_t end, const Scalar* h, int64_t h_stride) {
      if (begin == end) return;
      Scalar* out = row_at(args.output, steps, t, begin);
      const int64_t out_stride = args.output.row_stride;
      Operand<Scalar> operands[2];
      int count = 0;
      if (!project_first) {
        operands[count++] =
            projection(row_at(layer.input, steps, t, begin), layer.input.row_stride);
      }
      if (h) operands[count++] = recurrence(h, h_stride);
      const Target<Scalar> target{out, out_stride, project_first ? out : work.bias,
                                  project_first ? out_stride : 0, false};
      product<Scalar, false>(operands, count, target, end - begin, columns.first, columns.last,
                             [&](int64_t i, int64_t j, int64_t rows, int64_t width) {
                               for (int64_t r = i; r < i + rows; ++r) {
                                 activate(layer.activation, out + r * out_stride + j, width);
                               }
                             });
    };
    const int64_t continued = continued_end(layer, t, slice);
    const int64_t end = alive_end(steps, t, slice);
    const Scalar* no_state = work.finite ? nullptr : work.zeros;
    for_each_cut(layer, t, slice.begin, continued, [&](int64_t first, int64_t last, bool cut) {
      if (cut) {
        advance(first, last, no_state, 0);
      } else if (first < last) {
        advance(first, last, row_at(args.output, steps, time_before(layer, t), first),
                args.output.row_stride);
      }
    });
    for_each_cut(layer, t, continued, end, [&](int64_t first, int64_t last, bool cut) {
      if (cut || !layer.hx) {
        advance(first, last, no_state, 0);
      } else {
        advance(first, last, layer.hx + first * layer.hx_stride, layer.hx_stride);
      }
    });

    for (int64_t b = alive_end(steps, time_after(layer, t), slice); b < end; ++b) {
      std::memcpy(args.h_n + b * layer.H + columns.first,
                  row_at(args.output, steps, t, b) + columns.first,
                  (columns.last - columns.first) * sizeof(Scalar));
    }
    if (part.team && s + 1 < steps.T) barrier(*part.team, runtime);
  }
}

// The same for one sequence, from the weights as they are stored.
template <class Scalar>
inline void forward_unpacked_part(const Forward<Scalar>& args, const Scalar* zeros,
                                  const Part& part, const Runtime& runtime) {
  const Layer<Scalar>& layer = args.layer;
  const Steps& steps = layer.steps;
  const auto [first, last] = part.columns;
  const Scalar* h = layer.hx ? layer.hx : zeros;
  for (int64_t s = 0; s < steps.T; ++s) {
    const int64_t t = time_of(layer, s);
    Scalar* out = row_at(args.output, steps, t, 0);
    const Scalar* x = row_at(layer.input, steps, t, 0);
    for (int64_t j = first; j < last; j += Simd<Scalar>::lanes) {
      Vec<Scalar> acc[Simd<Scalar>::lanes] = {};
      accumulate_rows(layer.weight_ih + j * layer.D, layer.D, x, acc);
      accumulate_rows(layer.weight_hh + j * layer.H, layer.H, h, acc);
      Vec<Scalar> z = sum_lanes<Scalar>(acc);
      if (layer.bias_ih) z += load(layer.bias_ih + j);
      if (layer.bias_hh) z += load(layer.bias_hh + j);
      store(out + j, z);
    }
    activate(layer.activation, out + first, last - first);
    h = out;
    if (part.team && s + 1 < steps.T) barrier(*part.team, runtime);
  }
  std::memcpy(args.h_n + first, h + first, (last - first) * sizeof(Scalar));
}

template <class Storage>
inline Plan forward_plan(const Layer<Storage>& layer, const Runtime& runtime) {
  return choose_plan(layer.steps, runtime.machine, layer.D, layer.H,
                     panel_count<Compute<Storage>>(layer.H), sizeof(Compute<Storage>));
}

// ---- Forward on copies, block by block through time: of rows that are stored in 16 bits, or in an
// order that a product cannot follow ----

constexpr int64_t kCopiedBytes = int64_t(1) << 20;

template <class Scalar>
struct CopiedRows {
  int64_t steps;   // of a block
  Scalar* input;   // [steps, B, D]
  Scalar* output;  // [steps, B, H]
  Scalar* state;   // [B, H], at the block's begin
  Scalar* h_n;     // [B, H], at its end
};

template <class Storage, class Scalar>
inline void forward_copied_part(const Forward<Storage>& args, const ForwardWork<Scalar>& work,
                                const CopiedRows<Scalar>& copies, const Part& part,
                                const Runtime& runtime) {
  const Layer<Storage>& layer = args.layer;
  const Steps& steps = layer.steps;
  const int64_t D = layer.D;
  const int64_t H = layer.H;
  const Slice slice = part.slice;
  const Columns columns = part.columns;
  const int64_t width = columns.last - columns.first;
  for (int64_t b = slice.begin; b < slice.end; ++b) {
    Scalar* state = copies.state + b * H + columns.first;
    if (layer.hx) {
      convert(initial_state(layer, b) + columns.first, state, width);
    } else {
      std::memset(state, 0, width * sizeof(Scalar));
    }
  }
  for (int64_t s = 0; s < steps.T; s += copies.steps) {
    const int64_t s_end = min64(s + copies.steps, steps.T);
    const int64_t first = min64(time_of(layer, s), time_of(layer, s_end - 1));
    const int64_t last = first + (s_end - s);
    const int64_t alive = count_at(steps, first);
    const auto copy = [&](Scalar* rows, int64_t t, int64_t b, int64_t features) {
      return rows + ((t - first) * steps.B + b) * features;
    };
    Forward<Scalar> inner{};
    inner.layer.steps = {last - first, alive, (last - first) * alive};
    if (steps.count) inner.layer.steps.count = steps.count + first;
    inner.layer.D = D;
    inner.layer.H = H;
    inner.layer.reverse = layer.reverse;
    inner.layer.activation = layer.activation;
    inner.layer.chains = layer.chains;
    inner.layer.input = {copies.input, steps.B * D, D};
    inner.layer.hx = s == 0 && !layer.hx && work.finite ? nullptr : copies.state;
    inner.layer.hx_stride = H;
    if (layer.resets.at) {
      inner.layer.resets = {layer.resets.at + first * layer.resets.time_stride,
                            layer.resets.time_stride};
    }
    inner.output = {copies.output, steps.B * H, H};
    inner.h_n = copies.h_n;
    for (int64_t t = first; t < last; ++t) {
      const int64_t end = alive_end(steps, t, slice);
      for (int64_t b = slice.begin + part.member; b < end; b += part.members) {
        convert(row_at(layer.input, steps, t, b), copy(copies.input, t, b, D), D);
      }
    }
    // Cuts within the block are seen there.
    const int64_t t_begin = time_of(layer, s);
    for (int64_t b = slice.begin; b < continued_end(layer, t_begin, slice); ++b) {
      if (is_cut(layer, t_begin, b)) {
        std::memset(copies.state + b * H + columns.first, 0, width * sizeof(Scalar));
      }
    }
    if (part.team) barrier(*part.team, runtime);
    Part inside = part;
    inside.slice = {min64(slice.begin, alive), min64(slice.end, alive)};
    forward_part(inner, work, inside, runtime);
    for (int64_t t = first; t < last; ++t) {
      for (int64_t b = slice.begin; b < alive_end(steps, t, slice); ++b) {
        convert(copy(copies.output, t, b, H) + columns.first,
                row_at(args.output, steps, t, b) + columns.first, width);
      }
    }
    if (part.team) barrier(*part.team, runtime);
    for (int64_t b = inside.slice.begin; b < inside.slice.end; ++b) {
      std::memcpy(copies.state + b * H + columns.first, copies.h_n + b * H + columns.first,
                  width * sizeof(Scalar));
    }
  }
  for (int64_t b = slice.begin; b < slice.end; ++b) {
    convert(copies.state + b * H + columns.first, args.h_n + place_of(steps, b) * H + columns.first,
            width);
  }
}

template <class Storage>
void forward_copied(const Forward<Storage>& args, const Runtime& runtime) {
  using Scalar = Compute<Storage>;
  const Layer<Storage>& layer = args.layer;
  const Steps& steps = layer.steps;
  const Plan plan = forward_plan(layer, runtime);
  CopiedRows<Scalar> rows;
  const Scalar* no_state = zeros<Scalar>(runtime, layer.H);
  Team* teams = scratch<Team>(runtime, plan.groups);
  const WeightCopies copies = weight_copies<PackedWeights<Storage>>(layer, plan, runtime);
  rows.steps = kCopiedBytes / (steps.B * (layer.D + layer.H) * int64_t(sizeof(Scalar)));
  rows.steps = max64(1, min64(rows.steps, steps.T));
  rows.input = scratch<Scalar>(runtime, rows.steps * steps.B * layer.D);
  rows.output = scratch<Scalar>(runtime, rows.steps * steps.B * layer.H);
  rows.state = scratch<Scalar>(runtime, steps.B * layer.H);
  rows.h_n = scratch<Scalar>(runtime, steps.B * layer.H);
  run_plan(plan, layer, runtime, teams, [&](const Part& part) {
    const ForwardWork<Scalar> work = forward_work(part, layer, copies, no_state);
    forward_copied_part(args, work, rows, part, runtime);
  });
}

template <class Scalar>
void forward(const Forward<Scalar>& args, const Runtime& runtime) {
  const Layer<Scalar>& layer = args.layer;
  if (layer.steps.origin) return forward_copied(args, runtime);
  const Plan plan = forward_plan(layer, runtime);
  const Scalar* no_state = zeros<Scalar>(runtime, layer.H);
  Team* teams = scratch<Team>(runtime, plan.groups);
  if (!layer.packed && leaves_weights_unpacked(layer)) {
    run_plan(plan, layer, runtime, teams,
             [&](const Part& part) { forward_unpacked_part(args, no_state, part, runtime); });
    return;
  }
  const WeightCopies copies = weight_copies<PackedWeights<Scalar>>(layer, plan, runtime);
  run_plan(plan, layer, runtime, teams, [&](const Part& part) {
    const ForwardWork<Scalar> work = forward_work(part, layer, copies, no_state);
    forward_part(args, work, part, runtime);
  });
}

// ---- Backward ----
//
// A block of time steps at once: first the recurrence dz_t = (grad_output_t + grad_h_t) act'(z_t),
// grad_h_{t-1} = dz_t W_hh, last step first; then, over all rows of the block, the products that
// are parallel in time: dz^T h_{t-1}, dz^T x and dz W_ih. The block's rows fit in cache together.
// Where the plan has groups of sequences, each goes its own way through time with parameter
// gradients of its own, which are summed in the end: no row has to travel between cores.
//
// Each addition to a large sum rounds it, and a parameter's gradient is the sum of a product for
// every kChunkRows rows. So those of kRowsApart rows gather apart, and what rounding takes from
// them when they are added stays there, for the next time.
//
// How the products are computed depends on the type of the work, on which are overloaded:
// block_rows, prepare_input_gradient, pack_input_panel, prepare_rows, keep_row, step_back,
// end_recurrence, backward_weight, backward_input, gradient_size and deliver_gradient.

// weight_hh as the backward recurrence reads it: panels of W_hh [H, H].
template <class Storage>
struct PackedRecurrence {
  using Scalar = Compute<Storage>;
  static constexpr int64_t w = Shape<Scalar>::panel_width;

  Scalar* weights;

  static size_t bytes(int64_t, int64_t H) { return panels_size<Scalar>(H, H) * sizeof(Scalar); }
  PackedRecurrence(void* memory, int64_t, int64_t) : weights(static_cast<Scalar*>(memory)) {}
  void pack(const Layer<Storage>& layer, int64_t p) const {
    namernn_fast::pack(layer.weight_hh, layer.H, layer.H, p * w, weights + p * layer.H * w);
  }
};

// Gradients of the parameters, or those of some rows.
template <class Scalar>
struct Gradients {
  Scalar* weight_ih;
  Scalar* weight_hh;
  Scalar* bias;
};

// What belongs to one group.
template <class Storage, class Operands = Compute<Storage>>
struct BackwardWork {
  using Scalar = Compute<Storage>;
  using Element = Operands;  // of the products
  using Recurrence = PackedRecurrence<Storage>;

  Slice slice;
  const int64_t* start;     // [T + 1], rows of the slice before time t; null: all sequences alive
  Gradients<Scalar> sums;   // if parameter gradients are wanted
  bool accumulate;          // to what they hold from before
  Gradients<Scalar> apart;  // what is not in the sums yet; null: all is
  int64_t capacity;         // rows of a block at most
  Element* dz;              // [capacity, dz_stride], rows of the slice in the order of time
  int64_t dz_stride;
  Element* previous;  // panels of h_{t-1} [capacity, H], if parameter gradients are wanted
  Element* input;     // panels of x [capacity, D], likewise
  // Shared by all groups.
  WeightCopies copies;  // of weight_hh
  Element* weight_ih;   // panels of W_ih [H, D], if grad_input is wanted
  Scalar* grad_h;       // [B, H]
  Scalar* tiles;        // [workers, kTaskRows, D], where grad_input is stored otherwise; or null
};

constexpr int64_t kMinBlockRows = 256;
constexpr int64_t kChunkRows = 256;   // of a product over a block's rows, per pass over C
constexpr int64_t kTaskRows = 96;     // of C in one unit of work
constexpr int64_t kRowsApart = 4096;  // of a group that has more than twice as many

// Rows of a block, about: they fill half of a core's own cache.
template <class Storage>
inline int64_t block_rows(const BackwardWork<Storage>&, const Layer<Storage>& layer,
                          const Runtime& runtime) {
  const int64_t row = (2 * layer.H + layer.D) * int64_t(sizeof(Compute<Storage>));
  return max64(kMinBlockRows, int64_t(runtime.machine.near_bytes / 2) / row);
}

template <class Work>
inline int64_t local_row(const Work& work, int64_t t) {
  return work.start ? work.start[t] : t * (work.slice.end - work.slice.begin);
}

// Times first .. last.
struct Block {
  int64_t first;
  int64_t last;
  bool initial;
};

template <class Storage>
inline Block block_before_all(const Layer<Storage>& layer) {
  const int64_t edge = layer.reverse ? 0 : layer.steps.T;
  return {edge, edge, true};
}

// Turns a block into the one that comes next in the backward order, of about so many rows; false:
// there is none.
template <class Storage, class Work>
inline bool next_block(const Layer<Storage>& layer, const Work& work, int64_t rows, Block& block) {
  const int64_t T = layer.steps.T;
  block.initial = block.first == block.last;
  if (layer.reverse) {
    block.first = block.last;
    while (block.last < T && local_row(work, block.last) - local_row(work, block.first) < rows) {
      ++block.last;
    }
  } else {
    block.last = block.first;
    while (block.first > 0 && local_row(work, block.last) - local_row(work, block.first) < rows) {
      --block.first;
    }
  }
  return block.first < block.last;
}

// Keeps what the products over the block need of a row: h_{t-1}, or null for zeros, and x_t.
template <class Storage>
inline void keep_row(const Backward<Storage>& args, const BackwardWork<Storage>& work, int64_t row,
                     int64_t t, int64_t b, const Storage* h) {
  const Layer<Storage>& layer = args.layer;
  constexpr int64_t w = Shape<Compute<Storage>>::panel_width;
  for (int64_t j = 0; args.grad_weight_ih && j < layer.H; j += w) {
    pack_row(h, layer.H, j, work.previous + j * work.capacity + row * w);
  }
  const Storage* x = row_at(layer.input, layer.steps, t, b);
  for (int64_t j = 0; args.grad_weight_ih && j < layer.D; j += w) {
    pack_row(x, layer.D, j, work.input + j * work.capacity + row * w);
  }
}

// grad_h = dz W_hh for rows of one time, and the columns given.
template <class Storage, class Scalar>
inline void step_back(const BackwardWork<Storage>& work, const Scalar* dz, const Scalar* weight_hh,
                      int64_t H, int64_t rows, Columns columns, Scalar* grad_h) {
  const Operand<Scalar> operand{dz, work.dz_stride, 1, weight_hh, H * Shape<Scalar>::panel_width,
                                H};
  const Target<Scalar> target{grad_h, H, nullptr, 0, false};
  product<Scalar, false>(&operand, 1, target, rows, columns.first, columns.last, Nothing());
}

// What is left to do for the products once the block's rows are known.
template <class Storage>
inline void end_recurrence(const Backward<Storage>&, const BackwardWork<Storage>&, int64_t,
                           const Part&) {}

template <class Storage, class Work>
inline void backward_recurrence(const Backward<Storage>& args, const Work& work, const Block& block,
                                const Part& part, const Runtime& runtime) {
  using Scalar = typename Work::Scalar;
  const Layer<Storage>& layer = args.layer;
  const Steps& steps = layer.steps;
  const Slice slice = part.slice;
  const Columns columns = part.columns;
  const int64_t width = columns.last - columns.first;
  const int64_t H = layer.H;

  WeightCopies copies = work.copies;
  copies.packed |= !block.initial || !(steps.T > 1 || args.grad_hx);  // or never read
  const auto* weight_hh = weights_for<typename Work::Recurrence>(part, layer, copies).weights;
  for (int64_t b = slice.begin; block.initial && b < slice.end; ++b) {
    Scalar* grad_h = work.grad_h + b * H + columns.first;
    if (args.grad_h_n) {
      const Storage* given = args.grad_h_n + place_of(steps, b) * args.grad_h_n_stride;
      for (int64_t j = 0; args.grad_h_n_step != 1 && j < width; ++j) {
        convert(given + (columns.first + j) * args.grad_h_n_step, grad_h + j, 1);
      }
      if (args.grad_h_n_step == 1) convert(given + columns.first, grad_h, width);
    } else {
      std::memset(grad_h, 0, width * sizeof(Scalar));
    }
  }

  const int64_t base = local_row(work, block.first);
  for (int64_t s = block.first; s < block.last; ++s) {
    const int64_t t = layer.reverse ? s : block.last - 1 - (s - block.first);
    const int64_t row = local_row(work, t) - base - slice.begin;  // of sequence b: row + b
    const int64_t continued = continued_end(layer, t, slice);
    const int64_t end = alive_end(steps, t, slice);
    for (int64_t b = slice.begin; b < end; ++b) {
      activate_backward(
          layer.activation, row_at(args.output, steps, t, b) + columns.first,
          work.grad_h + b * H + columns.first,
          args.grad_output.data ? row_at(args.grad_output, steps, t, b) + columns.first : nullptr,
          work.dz + (row + b) * work.dz_stride + columns.first, width);
    }
    if (args.grad_weight_ih || args.grad_input.data) {
      for (int64_t b = slice.begin + part.member; b < end; b += part.members) {
        const Storage* h = is_cut(layer, t, b) ? nullptr
                           : b < continued ? row_at(args.output, steps, time_before(layer, t), b)
                                           : initial_state(layer, b);
        keep_row(args, work, row + b, t, b, h);
      }
    }
    if (part.team) barrier(*part.team, runtime);
    const int64_t wanted = args.grad_hx ? end : continued;
    step_back(work, work.dz + (row + slice.begin) * work.dz_stride, weight_hh, H,
              wanted - slice.begin, columns, work.grad_h + slice.begin * H);
    for_each_cut(layer, t, slice.begin, wanted, [&](int64_t first, int64_t last, bool cut) {
      for (int64_t b = first; cut && b < last; ++b) {
        std::memset(work.grad_h + b * H + columns.first, 0, width * sizeof(Scalar));
      }
    });
  }
  end_recurrence(args, work, local_row(work, block.last) - base, part);
}

// grad [H, width] (+)= dz^T X over the block's rows, with X [rows, width] in panels.
template <class Storage, class Scalar>
inline void backward_weight(const BackwardWork<Storage>& work, bool initial, Share& share,
                            int64_t H, int64_t rows, const Scalar* panels, int64_t width,
                            Scalar* grad) {
  constexpr int64_t w = Shape<Scalar>::panel_width;
  const int64_t task_columns = Shape<Scalar>::panel_width;
  for (int64_t j = 0; j < width; j += task_columns) {
    for (int64_t i = 0; i < H; i += kTaskRows) {
      if (!take(share)) continue;
      for (int64_t k = 0; k < rows; k += kChunkRows) {
        const Operand<Scalar> operand{
            work.dz + k * work.dz_stride + i, 1, work.dz_stride, panels + k * w, work.capacity * w,
            min64(kChunkRows, rows - k)};
        const Target<Scalar> target{grad + i * width, width, nullptr, 0, !(initial && k == 0)};
        product<Scalar, true>(&operand, 1, target, min64(kTaskRows, H - i), j,
                              min64(j + task_columns, width), Nothing());
      }
    }
  }
}

// The sum of n adjacent columns over rows, by halves: its error grows with the logarithm of rows.
template <class Element>
inline Vec<Compute<Element>> sum_rows(const Element* first, int64_t stride, int64_t rows,
                                      int64_t n) {
  if (rows > 16) {
    const int64_t half = rows / 2;
    return sum_rows(first, stride, half, n) +
           sum_rows(first + half * stride, stride, rows - half, n);
  }
  Vec<Compute<Element>> sum = {};
  for (int64_t r = 0; r < rows; ++r) sum += load_upto(first + r * stride, n);
  return sum;
}

template <class Work, class Scalar>
inline void backward_bias(const Work& work, bool initial, Share& share, int64_t H, int64_t rows,
                          Scalar* grad) {
  if (!take(share)) return;
  for_each_vector<Scalar>(H, [&](int64_t j, int64_t n) {
    const Vec<Scalar> sum = sum_rows(work.dz + j, work.dz_stride, rows, n);
    store_upto(grad + j, initial ? sum : load_upto(grad + j, n) + sum, n);
  });
}

// grad_input (+)= dz W_ih over the block's rows; `tile`, if any, holds kTaskRows of them where they
// are not stored as they are computed.
template <class Storage>
inline void backward_input(const Backward<Storage>& args, const BackwardWork<Storage>& work,
                           const Block& block, Share& share, Compute<Storage>* tile) {
  using Scalar = Compute<Storage>;
  const Layer<Storage>& layer = args.layer;
  const Steps& steps = layer.steps;
  const int64_t D = layer.D;
  const int64_t width = work.slice.end - work.slice.begin;
  const int64_t base = local_row(work, block.first);
  for_each_run(
      steps, block.first, block.last, work.slice, is_flat(args.grad_input, steps), !steps.count,
      [&](const Run& run) {
        const int64_t dz_step = work.dz_stride * (run.along_time ? width : 1);
        const int64_t row = local_row(work, run.t) - base + run.b - work.slice.begin;
        const Scalar* dz = work.dz + row * work.dz_stride;
        for (int64_t i = 0; i < run.rows; i += kTaskRows) {
          if (!take(share)) continue;
          const int64_t rows = min64(kTaskRows, run.rows - i);
          const Operand<Scalar> operand{
              dz + i * dz_step, dz_step, 1, work.weight_ih, layer.H * Shape<Scalar>::panel_width,
              layer.H};
          const auto grad = [&](int64_t r) {
            return run.along_time ? row_at(args.grad_input, steps, run.t + i + r, run.b)
                                  : row_at(args.grad_input, steps, run.t, run.b + i + r);
          };
          if constexpr (std::is_same_v<Storage, Scalar>) {
            if (!tile) {
              const int64_t grad_step = run_stride(args.grad_input, run);
              const Target<Scalar> target{grad(0), grad_step, nullptr, 0, args.accumulate_input};
              product<Scalar, false>(&operand, 1, target, rows, 0, D, Nothing());
              continue;
            }
          }
          const Target<Scalar> target{tile, D, nullptr, 0, args.accumulate_input};
          for (int64_t r = 0; args.accumulate_input && r < rows; ++r) {
            convert(grad(r), tile + r * D, D);
          }
          product<Scalar, false>(&operand, 1, target, rows, 0, D, Nothing());
          for (int64_t r = 0; r < rows; ++r) convert(tile + r * D, grad(r), D);
        }
      });
}

// Where the parameter gradients of the next rows gather, and how many rows already have.
struct Gathering {
  bool apart = false;
  int64_t rows = 0;  // since they were last added to the sums
};

template <class Work>
inline int64_t count_rows(const Work& work, const Block& block) {
  return local_row(work, block.last) - local_row(work, block.first);
}

// Counts a block's rows, and calls `join` where enough have gathered apart.
template <class Work, class Join>
inline void gather(const Work& work, const Block& block, Gathering& gathering, Join&& join) {
  gathering.rows += count_rows(work, block);
  if (!work.apart.weight_ih || gathering.rows < kRowsApart) return;
  if (gathering.apart) join();
  gathering = {true, 0};
}

// The products over a block's rows, as far as they fall to this share.
template <class Storage, class Work>
inline void backward_products(const Backward<Storage>& args, const Work& work, const Block& block,
                              const Gathering& gathering, Share share, int64_t worker) {
  const int64_t H = args.layer.H;
  const int64_t D = args.layer.D;
  const int64_t rows = count_rows(work, block);
  if (args.grad_weight_ih) {
    const auto& grad = gathering.apart ? work.apart : work.sums;
    const bool initial = block.initial && !work.accumulate;
    backward_weight(work, initial, share, H, rows, work.previous, H, grad.weight_hh);
    backward_weight(work, initial, share, H, rows, work.input, D, grad.weight_ih);
    if (args.grad_bias) backward_bias(work, initial, share, H, rows, grad.bias);
  }
  if (args.grad_input.data) {
    auto* tile = work.tiles ? work.tiles + worker * kTaskRows * D : nullptr;
    backward_input(args, work, block, share, tile);
  }
}

// Where sums of n elements gather: in `result` itself, or in scratch where it is stored otherwise.
template <class Scalar, class Storage>
inline Scalar* gathering_place(const Runtime& runtime, Storage* result, int64_t n) {
  if constexpr (std::is_same_v<Storage, Scalar>) {
    if (result) return result;
  }
  return scratch<Scalar>(runtime, n);
}

template <class Scalar, class Storage>
inline void deliver(const Scalar* sums, Storage* result, int64_t n) {
  if constexpr (!std::is_same_v<Storage, Scalar>) {
    if (result) convert(sums, result, n);
  }
}

// The elements of the sums of a gradient [H, width], and their way to the caller.
template <class Storage>
inline int64_t gradient_size(const BackwardWork<Storage>&, int64_t H, int64_t width) {
  return H * width;
}
template <class Storage>
inline void deliver_gradient(const BackwardWork<Storage>&, const Compute<Storage>* sums,
                             Storage* result, int64_t H, int64_t width, const Runtime&) {
  deliver(sums, result, H * width);
}

// Where pack_backward puts weight_ih: after weight_hh.
template <class Storage>
inline Compute<Storage>* projection_in(const void* packed, int64_t D, int64_t H) {
  auto* start = static_cast<char*>(const_cast<void*>(packed));
  return reinterpret_cast<Compute<Storage>*>(start + PackedRecurrence<Storage>::bytes(D, H));
}

template <class Storage>
inline void prepare_input_gradient(BackwardWork<Storage>& work, const Layer<Storage>& layer,
                                   const Plan& plan, const Runtime& runtime) {
  using Scalar = Compute<Storage>;
  work.weight_ih = layer.packed ? projection_in<Storage>(layer.packed, layer.D, layer.H)
                                : scratch<Scalar>(runtime, panels_size<Scalar>(layer.H, layer.D));
  if (!std::is_same_v<Storage, Scalar> || layer.steps.origin) {
    const int64_t workers = max64(runtime.machine.threads, plan.groups * plan.members);
    work.tiles = scratch<Scalar>(runtime, workers * kTaskRows * layer.D);
  }
}
template <class Storage>
inline void pack_input_panel(const BackwardWork<Storage>& work, const Layer<Storage>& layer,
                             int64_t p) {
  constexpr int64_t w = Shape<Compute<Storage>>::panel_width;
  pack(layer.weight_ih, layer.H, layer.D, p * w, work.weight_ih + p * layer.H * w);
}

template <class Work, class Storage>
void pack_input_panels(const Work& work, const Layer<Storage>& layer, const Runtime& runtime) {
  const int64_t panels = panel_count<typename Work::Scalar>(layer.D);
  const double packing = kPackingCost / 2 * double(layer.H) * double(layer.D);
  const int64_t workers = min64(panels, choose_workers(packing, runtime.machine));
  run_parallel(runtime, workers, [&](int64_t begin, int64_t end) {
    for (int64_t p = panels * begin / workers; p < panels * end / workers; ++p) {
      pack_input_panel(work, layer, p);
    }
  });
}

// The weights for several calls of the backward pass.
template <class Storage>
size_t backward_bytes(int64_t D, int64_t H) {
  using Scalar = Compute<Storage>;
  return PackedRecurrence<Storage>::bytes(D, H) + panels_size<Scalar>(H, D) * sizeof(Scalar);
}
template <class Storage>
void pack_backward(const Layer<Storage>& layer, void* packed, const Runtime& runtime) {
  pack_all<PackedRecurrence<Storage>>(layer, packed, runtime);
  BackwardWork<Storage> work{};
  work.weight_ih = projection_in<Storage>(packed, layer.D, layer.H);
  pack_input_panels(work, layer, runtime);
}

// Memory for the rows of a group's blocks.
template <class Storage>
inline void prepare_rows(BackwardWork<Storage>& work, const Backward<Storage>& args,
                         const Runtime& runtime) {
  using Scalar = Compute<Storage>;
  // The odd number of vectors keeps a column of dz from falling into few cache sets.
  work.dz_stride =
      panel_count<Scalar>(args.layer.H) * Shape<Scalar>::panel_width + Simd<Scalar>::lanes;
  work.dz = scratch<Scalar>(runtime, work.capacity * work.dz_stride);
  if (args.grad_weight_ih) {
    work.previous = scratch<Scalar>(runtime, panels_size<Scalar>(work.capacity, args.layer.H));
    work.input = scratch<Scalar>(runtime, panels_size<Scalar>(work.capacity, args.layer.D));
  }
}

constexpr double kAddingCost = 16;  // of an element, in multiply-adds

// Shares begin .. end of n elements, in whole vectors.
template <class Scalar>
inline Columns elements_of(int64_t n, int64_t begin, int64_t end, int64_t shares) {
  constexpr int64_t lanes = Simd<Scalar>::lanes;
  const int64_t vectors = (n + lanes - 1) / lanes;
  return {vectors * begin / shares * lanes, min64(n, vectors * end / shares * lanes)};
}

// The n elements of one gradient of all groups, added up in the place of the first group's.
template <class Scalar, class Work>
inline void add_up(const Work* works, int64_t groups, Scalar* Gradients<Scalar>::* gradient,
                   int64_t n, const Runtime& runtime) {
  const double cost = kAddingCost * double(n) * double(groups - 1);
  const int64_t workers = choose_workers(cost, runtime.machine);
  run_parallel(runtime, workers, [&](int64_t begin, int64_t end) {
    const Columns own = elements_of<Scalar>(n, begin, end, workers);
    for_each_vector<Scalar>(own.last - own.first, [&](int64_t i, int64_t m) {
      const auto part = [&](int64_t g) { return works[g].sums.*gradient + own.first + i; };
      Vec<Scalar> sum = load_upto(part(0), m);
      for (int64_t g = 1; g < groups; ++g) sum += load_upto(part(g), m);
      store_upto(part(0), sum, m);
    });
  });
}

// sums += apart, and in `apart` what that lost: exact, by Knuth's TwoSum, for what is finite.
template <class Scalar>
inline void join(Scalar* sums, Scalar* apart, const Columns& elements) {
  for_each_vector<Scalar>(elements.last - elements.first, [&](int64_t i, int64_t n) {
    const Vec<Scalar> a = load_upto(sums + elements.first + i, n);
    const Vec<Scalar> b = load_upto(apart + elements.first + i, n);
    const Vec<Scalar> sum = a + b;
    const Vec<Scalar> added = sum - a;
    const Vec<Scalar> lost = (a - (sum - added)) + (b - added);
    store_upto(sums + elements.first + i, sum, n);
    store_upto(apart + elements.first + i, lost == lost ? lost : Vec<Scalar>{}, n);
  });
}

template <class Work, class Storage>
void backward_with(const Backward<Storage>& args, const Runtime& runtime) {
  using Scalar = typename Work::Scalar;
  constexpr size_t element = sizeof(typename Work::Element);
  const Layer<Storage>& layer = args.layer;
  const Steps& steps = layer.steps;
  const int64_t H = layer.H;
  const int64_t D = layer.D;
  const bool recurrent = steps.T > 1 || args.grad_hx;
  const Plan plan = recurrent
                        ? choose_plan(steps, runtime.machine, 0, H, panel_count<Scalar>(H), element)
                        : Plan{1, 1, 0};
  Team* teams = scratch<Team>(runtime, plan.groups);

  Work common{};
  const int64_t rows = block_rows(common, layer, runtime);
  common.copies = weight_copies<typename Work::Recurrence>(layer, plan, runtime);
  common.grad_h =
      gathering_place<Scalar>(runtime, steps.order ? nullptr : args.grad_hx, steps.B * H);
  if (args.grad_input.data) {
    prepare_input_gradient(common, layer, plan, runtime);
    if (!layer.packed) pack_input_panels(common, layer, runtime);
  }
  const int64_t size_ih = gradient_size(common, H, D);
  const int64_t size_hh = gradient_size(common, H, H);

  auto* works = scratch<Work>(runtime, plan.groups);
  for (int64_t g = 0; g < plan.groups; ++g) {
    Work work = common;
    work.slice = slice_of(steps, g, plan.groups);
    const int64_t width = work.slice.end - work.slice.begin;
    if (steps.count) {
      int64_t* start = scratch<int64_t>(runtime, steps.T + 1);
      start[0] = 0;
      for (int64_t t = 0; t < steps.T; ++t) {
        start[t + 1] = start[t] + alive_end(steps, t, work.slice) - work.slice.begin;
      }
      work.start = start;
    }
    work.capacity = max64(1, min64(rows + width, steps.T * width));
    prepare_rows(work, args, runtime);
    if (args.grad_weight_ih) {
      // The first group gathers where the sum over all groups will be.
      work.sums = {gathering_place<Scalar>(runtime, g ? nullptr : args.grad_weight_ih, size_ih),
                   gathering_place<Scalar>(runtime, g ? nullptr : args.grad_weight_hh, size_hh),
                   gathering_place<Scalar>(runtime, g ? nullptr : args.grad_bias, H)};
      work.accumulate = args.accumulate_weights && g == 0;
      if (width == 0 && !work.accumulate) {  // a long sequence may leave its neighbours nothing
        std::memset(work.sums.weight_ih, 0, size_ih * sizeof(Scalar));
        std::memset(work.sums.weight_hh, 0, size_hh * sizeof(Scalar));
        std::memset(work.sums.bias, 0, H * sizeof(Scalar));
      }
      if (local_row(work, steps.T) > 2 * kRowsApart) {
        work.apart = {zeros<Scalar>(runtime, size_ih), zeros<Scalar>(runtime, size_hh),
                      zeros<Scalar>(runtime, H)};
      }
    }
    works[g] = work;
  }
  const auto join_shares = [&](const Work& work, int64_t begin, int64_t end, int64_t shares) {
    const auto elements = [&](int64_t n) { return elements_of<Scalar>(n, begin, end, shares); };
    join(work.sums.weight_ih, work.apart.weight_ih, elements(size_ih));
    join(work.sums.weight_hh, work.apart.weight_hh, elements(size_hh));
    if (args.grad_bias) join(work.sums.bias, work.apart.bias, elements(H));
  };

  if (plan.groups > 1) {
    run_plan(plan, layer, runtime, teams, [&](const Part& part) {
      const FlushSubnormals flush;
      const Work& work = works[part.group];
      const int64_t worker = part.group * plan.members + part.member;
      const auto join_own = [&] { join_shares(work, part.member, part.member + 1, part.members); };
      Gathering gathering;
      for (Block block = block_before_all(layer); next_block(layer, work, rows, block);) {
        backward_recurrence(args, work, block, part, runtime);
        if (part.team) barrier(*part.team, runtime);
        backward_products(args, work, block, gathering, fixed_share(part.member, part.members),
                          worker);
        if (part.team) barrier(*part.team, runtime);
        gather(work, block, gathering, join_own);
      }
      if (gathering.apart) join_own();
    });
  } else {
    // The products have more to share out than the recurrence.
    const double per_row = double(element) / sizeof(Scalar) * double(H) *
                           ((args.grad_weight_ih ? 1 : 0) * double(H + D) +
                            (args.grad_input.data ? 1 : 0) * double(D));
    const auto join_own = [&] {
      const int64_t workers =
          choose_workers(kAddingCost * double(size_ih + size_hh), runtime.machine);
      run_parallel(runtime, workers, [&](int64_t begin, int64_t end) {
        const FlushSubnormals flush;
        join_shares(*works, begin, end, workers);
      });
    };
    Gathering gathering;
    for (Block block = block_before_all(layer); next_block(layer, *works, rows, block);) {
      run_plan(plan, layer, runtime, teams, [&](const Part& part) {
        const FlushSubnormals flush;
        backward_recurrence(args, *works, block, part, runtime);
      });
      const double cost = per_row * double(count_rows(*works, block));
      int64_t counter = 0;
      run_parallel(runtime, choose_workers(cost, runtime.machine), [&](int64_t begin, int64_t) {
        const FlushSubnormals flush;
        backward_products(args, *works, block, gathering, dynamic_share(&counter), begin);
      });
      gather(*works, block, gathering, join_own);
    }
    if (gathering.apart) join_own();
  }

  if (!std::is_same_v<Storage, Scalar> || steps.order) {
    for (int64_t b = 0; args.grad_hx && b < steps.B; ++b) {
      convert(common.grad_h + b * H, args.grad_hx + place_of(steps, b) * H, H);
    }
  }
  if (args.grad_weight_ih) {
    const Gradients<Scalar>& sums = works[0].sums;
    if (plan.groups > 1) {
      using All = Gradients<Scalar>;
      add_up(works, plan.groups, &All::weight_ih, size_ih, runtime);
      add_up(works, plan.groups, &All::weight_hh, size_hh, runtime);
      if (args.grad_bias) add_up(works, plan.groups, &All::bias, H, runtime);
    }
    deliver_gradient(common, sums.weight_ih, args.grad_weight_ih, H, D, runtime);
    deliver_gradient(common, sums.weight_hh, args.grad_weight_hh, H, H, runtime);
    deliver(sums.bias, args.grad_bias, H);
  }
}

template <class Storage>
void backward(const Backward<Storage>& args, const Runtime& runtime) {
  backward_with<BackwardWork<Storage>>(args, runtime);
}

// All of it, for one instruction set.
template <class Storage>
constexpr KernelsFor<Storage> kernels_for(void (*forward)(const Forward<Storage>&,
                                                          const Runtime&)) {
  return {{&PackedWeights<Storage>::bytes, &pack_all<PackedWeights<Storage>, Storage>},
          forward,
          {&backward_bytes<Storage>, &pack_backward<Storage>},
          &backward<Storage>};
}

constexpr Kernels kernels_named(const char* name) {
  return {kernels_for<float>(&forward<float>),
          kernels_for<double>(&forward<double>),
          kernels_for<BFloat16>(&forward_copied<BFloat16>),
          kernels_for<Half>(&forward_copied<Half>),
          name,
          name,
          Shape<float>::panel_width};
}

}  // namespace
}  // namespace namernn_fast
