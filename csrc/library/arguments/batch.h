// Describes the batch of a call: which rows exist (from batch_sizes, lengths or offsets), when
// states are reset, and where a tensor stores its rows.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "contract.h"
#include "library/arguments/options.h"
#include "library/base/tensors.h"

namespace namernn_fast {

// The batch of one call. The pointers in `layout` point into the vectors of this struct.
struct Batch {
  enum class Kind { padded, packed, jagged };

  int64_t T;  // number of steps, including padding
  int64_t B;  // number of sequences, including sequences without rows
  Kind kind;
  bool batch_first;
  std::vector<int64_t> count;
  std::vector<int64_t> start;
  std::vector<int64_t> order;  // [B]: the caller's indices; sequences without rows are last
  std::vector<int64_t> origin;
  std::unique_ptr<bool[]> resets_in_order;
  Resets resets;
  SequenceLayout layout;  // covers only the sequences that have rows
};

// Checks the arguments that define the batch of a call, and returns the batch. `sequence_layout`
// holds batch_sizes, offsets or lengths, depending on the options. Without `sequence_layout`, all
// sequences of a padded input are equally long.
Batch read_batch(const Tensor& input, const std::optional<Tensor>& sequence_layout,
                 const std::optional<Tensor>& reset, const Options& options);

// Returns the address and the strides of the rows of a (.., features) tensor in the caller's
// layout. Each row starts at feature `offset`.
template <class Scalar, class Pointer>
RowStrides<Scalar> rows_of(const Batch& batch, const Tensor& tensor, Pointer data, int64_t offset) {
  if (batch.kind == Batch::Kind::packed) return {data + offset, 0, tensor.stride(0)};
  if (batch.kind == Batch::Kind::jagged) {
    return {data + offset, tensor.stride(0), tensor.stride(0)};
  }
  const int64_t time_stride = tensor.stride(batch.batch_first ? 1 : 0);
  const int64_t row_stride = tensor.stride(batch.batch_first ? 0 : 1);
  // If there is only one sequence, the batch stride can be any number. Replacing it with the time
  // stride makes is_flat() return true.
  return {data + offset, time_stride, batch.B == 1 ? time_stride : row_stride};
}

// Checks that the token id of every row is between 0 and V - 1.
void check_ids(const Batch& batch, const Tensor& ids, int64_t V);

// Returns the number of rows in a tensor of the batch, including padding.
inline int64_t count_tensor_rows(const Batch& batch) {
  return batch.kind == Batch::Kind::padded ? batch.T * batch.B : batch.layout.N;
}

// Returns a view, with the input's leading dimensions, of a contiguous (rows, features) tensor.
Tensor with_rows_of(const Batch& batch, const Tensor& tensor);

// Returns a new contiguous tensor with the input's leading dimensions and `features` features.
Tensor empty_rows(const Batch& batch, int64_t features, int32_t dtype);

// Like empty_rows(), but a large tensor uses the memory of `segment` and must not outlive it; see
// empty_in().
Tensor empty_rows_in(Segment& segment, const Batch& batch, int64_t features, int32_t dtype);

// Zeroes the rows past the end of each sequence in a tensor from empty_rows().
void clear_padding(const Batch& batch, const Tensor& tensor);

}  // namespace namernn_fast
