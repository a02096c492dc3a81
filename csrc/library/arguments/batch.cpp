#include "library/arguments/batch.h"

#include <algorithm>
#include <cstring>

#include "library/base/runtime.h"
#include "rows.h"

namespace namernn_fast {
namespace {

using torch::headeronly::ScalarType;

// Returns the layout of B sequences with N rows over T time steps. By default, rows are evenly
// spaced and all sequences are alive at every step. The caller may set other members.
SequenceLayout layout_of(int64_t T, int64_t B, int64_t N) {
  SequenceLayout layout{};
  layout.T = T;
  layout.B = B;
  layout.N = N;
  return layout;
}

// Reads the batch_sizes of a PackedSequence: the number of sequences alive at each step.
void read_batch_sizes(const Tensor& batch_sizes, int64_t data_rows, Batch& batch) {
  check(batch_sizes.is_cpu() && batch_sizes.scalar_type() == ScalarType::Long &&
            batch_sizes.dim() == 1,
        "batch_sizes must be a 1-D int64 tensor on the CPU");
  const Tensor contiguous = dense(batch_sizes);
  const int64_t T = contiguous.numel();
  const int64_t* values = const_data<int64_t>(contiguous);
  batch.count.assign(values, values + T);
  batch.start.resize(T);
  int64_t rows = 0;
  for (int64_t t = 0; t < T; ++t) {
    const int64_t limit = t ? batch.count[t - 1] : data_rows;
    check(batch.count[t] >= 1, "batch_sizes must be positive, got ", batch.count[t], " at step ",
          t);
    check(batch.count[t] <= limit,
          t ? "batch_sizes must not increase, got "
            : "batch_sizes must not exceed the rows of data, got ",
          batch.count[t], t ? " after " : " instead of at most ", limit, " at step ", t);
    batch.start[t] = rows;
    rows = std::min(rows + batch.count[t], 2 * kMostElements);  // prevents overflow
  }
  check(rows == data_rows, "batch_sizes must sum to ", data_rows,
        " (the rows of data), got a sum of ", rows);
  batch.T = T;
  batch.B = T ? batch.count[0] : 0;
  batch.layout = layout_of(T, batch.B, rows);
  batch.layout.count = batch.count.data();
  batch.layout.start = batch.start.data();
}

// Sorts the sequences by length, longest first, without moving rows: sets batch.count, batch.order
// and batch.layout. `values` holds the B lengths in any order, each between 0 and batch.T.
void sort_sequences(const int64_t* values, Batch& batch) {
  std::vector<int64_t> length_counts(batch.T + 1, 0);  // number of sequences of each length
  bool sorted = true;
  int64_t rows = 0;
  for (int64_t b = 0; b < batch.B; ++b) {
    const int64_t length = values[b];
    ++length_counts[length];
    rows += length;
    sorted = sorted && (b == 0 || length <= values[b - 1]);
  }
  // The sort is stable: sequences of equal length keep their order.
  int64_t T = batch.T;
  while (T > 0 && length_counts[T] == 0) --T;
  batch.count.resize(T);
  int64_t longer = 0;
  for (int64_t length = T; length > 0; --length) {
    longer += length_counts[length];
    batch.count[length - 1] = longer;
  }
  if (!sorted) {
    batch.order.resize(batch.B);
    std::vector<int64_t>& place = length_counts;
    place[0] = longer;
    for (int64_t length = 1; length <= T; ++length) {
      place[length] = length < T ? batch.count[length] : 0;
    }
    for (int64_t b = 0; b < batch.B; ++b) batch.order[place[values[b]]++] = b;
  }
  batch.layout = layout_of(T, longer, rows);
  const bool lengths_differ = T > 0 && batch.count[T - 1] != longer;
  if (lengths_differ) batch.layout.count = batch.count.data();
  if (!sorted) batch.layout.order = batch.order.data();
}

// Reads the lengths of padded sequences. The lengths may be in any order.
void read_lengths(const Tensor& lengths, Batch& batch) {
  check(lengths.is_cpu() && lengths.scalar_type() == ScalarType::Long && lengths.dim() == 1,
        "lengths must be a 1-D int64 tensor on the CPU");
  check(lengths.numel() == batch.B, "lengths must have one length for each of the ", batch.B,
        " sequences, got ", lengths.numel());
  const Tensor contiguous = dense(lengths);
  const int64_t* values = const_data<int64_t>(contiguous);
  for (int64_t b = 0; b < batch.B; ++b) {
    check(values[b] >= 0 && values[b] <= batch.T, "lengths must be between 0 and ", batch.T,
          " (the steps in input), got ", values[b], " for sequence ", b);
  }
  sort_sequences(values, batch);
  batch.origin = batch.order;
}

// Reads the offsets of a jagged batch: sequence b has the rows offsets[b] to offsets[b + 1] - 1.
void read_offsets(const Tensor& offsets, int64_t data_rows, Batch& batch) {
  check(offsets.is_cpu() && offsets.scalar_type() == ScalarType::Long && offsets.dim() == 1 &&
            offsets.numel() > 0,
        "offsets must be a 1-D int64 tensor on the CPU with at least one element");
  const Tensor contiguous = dense(offsets);
  const int64_t* values = const_data<int64_t>(contiguous);
  batch.B = contiguous.numel() - 1;
  check(values[0] == 0 && values[batch.B] == data_rows, "offsets must start with 0 and end with ",
        data_rows, " (the rows of data), got ", values[0], " and ", values[batch.B]);
  std::vector<int64_t> lengths(size_t(batch.B));
  for (int64_t b = 0; b < batch.B; ++b) {
    check(values[b + 1] >= values[b], "offsets must not decrease, got ", values[b + 1], " after ",
          values[b], " at index ", b + 1);
    lengths[size_t(b)] = values[b + 1] - values[b];
    batch.T = std::max(batch.T, lengths[size_t(b)]);
  }
  sort_sequences(lengths.data(), batch);
  batch.origin.resize(size_t(batch.layout.B));
  for (int64_t i = 0; i < batch.layout.B; ++i) {
    batch.origin[size_t(i)] = values[place_of(batch.layout, i)];
  }
}

// Copies the caller's reset mask to `batch`. The mask has shape (T, B), or (B, T) with batch_first.
// The copy lists the sequences in the layout's order.
void read_resets(const Tensor& reset, Batch& batch) {
  check(reset.is_cpu() && reset.scalar_type() == ScalarType::Bool,
        "reset must be a bool tensor on the CPU");
  const std::vector<int64_t> shape =
      batch.batch_first ? std::vector{batch.B, batch.T} : std::vector{batch.T, batch.B};
  const auto got = reset.sizes();
  if (got.size() != 2 || !std::equal(shape.begin(), shape.end(), got.begin())) {
    fail("reset must have shape ", shape_text(shape), ", got ", shape_text(got));
  }
  const bool* at = const_data<bool>(reset);
  const int64_t time_stride = reset.stride(batch.batch_first ? 1 : 0);
  const int64_t stride = reset.stride(batch.batch_first ? 0 : 1);
  const SequenceLayout& layout = batch.layout;
  const int64_t size = product_of("a tensor", {layout.T, layout.B});
  batch.resets_in_order.reset(new bool[size_t(std::max<int64_t>(1, size))]);
  bool any = false;
  for (int64_t t = 0; t < layout.T; ++t) {
    for (int64_t b = 0; b < layout.B; ++b) {
      const bool cut = at[t * time_stride + place_of(layout, b) * stride];
      batch.resets_in_order[size_t(t * layout.B + b)] = cut;
      any = any || cut;
    }
  }
  if (any) batch.resets = {batch.resets_in_order.get(), layout.B};
}

// Returns the shape of a tensor with the batch's rows and `features` features per row.
std::vector<int64_t> shape_of_rows(const Batch& batch, int64_t features) {
  if (batch.kind != Batch::Kind::padded) return {batch.layout.N, features};
  return batch.batch_first ? std::vector{batch.B, batch.T, features}
                           : std::vector{batch.T, batch.B, features};
}

}  // namespace

Batch read_batch(const Tensor& input, const std::optional<Tensor>& sequence_layout,
                 const std::optional<Tensor>& reset, const Options& options) {
  check(!(options.packed && options.jagged), "options must not say both packed and jagged");
  Batch batch{};
  batch.kind = options.packed   ? Batch::Kind::packed
               : options.jagged ? Batch::Kind::jagged
                                : Batch::Kind::padded;
  batch.batch_first = options.batch_first;
  const int64_t dimensions = (batch.kind == Batch::Kind::padded ? 2 : 1) + (has_ids(input) ? 0 : 1);
  check(input.dim() == dimensions, "input must have ", dimensions, " dimensions, got ",
        input.dim());
  if (batch.kind != Batch::Kind::padded) {
    check(sequence_layout.has_value(), "sequence_layout must be the ",
          options.packed ? "batch_sizes" : "offsets", " of input, got none");
    product_of("a tensor", {input.size(0)});
    if (options.packed) {
      read_batch_sizes(*sequence_layout, input.size(0), batch);
    } else {
      read_offsets(*sequence_layout, input.size(0), batch);
    }
  } else {
    batch.T = input.size(options.batch_first ? 1 : 0);
    batch.B = input.size(options.batch_first ? 0 : 1);
    batch.layout = layout_of(batch.T, batch.B, product_of("a tensor", {batch.T, batch.B}));
  }
  check(batch.T > 0 || options.jagged, "Expected sequence length to be larger than 0 in RNN");
  if (sequence_layout && batch.kind == Batch::Kind::padded) read_lengths(*sequence_layout, batch);
  if (!batch.origin.empty()) batch.layout.origin = batch.origin.data();
  if (reset) read_resets(*reset, batch);
  return batch;
}

void check_ids(const Batch& batch, const Tensor& ids, int64_t V) {
  const RowStrides<const int64_t> rows =
      rows_of<const int64_t>(batch, ids, const_data<int64_t>(ids), 0);
  const SequenceLayout& layout = batch.layout;
  for (int64_t t = 0; t < layout.T; ++t) {
    const int64_t alive = count_at(layout, t);
    for (int64_t b = 0; b < alive; ++b) {
      const int64_t id = *row_at(rows, layout, t, b);
      if (uint64_t(id) < uint64_t(V)) continue;
      fail("input must hold ids from 0 to ", V - 1, ", got ", id, " at step ", t, " of sequence ",
           place_of(layout, b));
    }
  }
}

Tensor empty_rows(const Batch& batch, int64_t features, int32_t dtype) {
  return empty(shape_of_rows(batch, features), dtype);
}

Tensor empty_rows_in(Segment& segment, const Batch& batch, int64_t features, int32_t dtype) {
  return empty_in(segment, shape_of_rows(batch, features), dtype);
}

Tensor with_rows_of(const Batch& batch, const Tensor& tensor) {
  return torch::stable::view(tensor, shape_of_rows(batch, tensor.size(1)));
}

void clear_padding(const Batch& batch, const Tensor& tensor) {
  if (batch.kind != Batch::Kind::padded || batch.layout.N == batch.T * batch.B) return;
  const int64_t element = element_size(dtype_of(tensor));
  const RowStrides<char> rows = rows_of<char>(batch, tensor, mutable_data<char>(tensor), 0);
  const int64_t bytes = tensor.size(2) * element;
  if (bytes == 0) return;
  const SequenceLayout& layout = batch.layout;
  constexpr int64_t worth_a_thread = int64_t(1) << 19;  // minimum bytes per thread
  const int64_t grain = std::max<int64_t>(1, worth_a_thread / (batch.B * bytes + 1));
  const auto clear = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t b = count_at(layout, t); b < batch.B; ++b) {
        const int64_t row = t * rows.time_stride + place_of(layout, b) * rows.row_stride;
        std::memset(rows.data + row * element, 0, size_t(bytes));
      }
    }
  };
  if (this_machine().threads == 1) return clear(0, batch.T);
  torch::stable::parallel_for(0, batch.T, grain, clear);
}

}  // namespace namernn_fast
