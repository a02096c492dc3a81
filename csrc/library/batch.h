// The batch of a call: which rows exist, by batch_sizes, lengths, offsets and resets, and where the
// rows of a tensor lie.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "contract.h"
#include "library/options.h"
#include "library/tensors.h"

namespace namernn_fast {

// The batch of one call. The pointers of `layout` lead into the vectors.
struct Batch {
  enum class Kind { padded, packed, jagged };

  int64_t T;  // of the caller's tensors, with padding
  int64_t B;
  Kind kind;
  bool batch_first;
  std::vector<int64_t> count;
  std::vector<int64_t> start;
  std::vector<int64_t> order;  // [B], sequences without rows last
  std::vector<int64_t> origin;
  std::unique_ptr<bool[]> resets_in_order;
  Resets resets;
  SequenceLayout layout;  // of the sequences with at least one row
};

// Reads and checks the rows of `input`. `sequence_layout` holds batch_sizes, offsets or lengths, as
// the options say; none: all rows of a padded input exist.
Batch read_batch(const Tensor& input, const std::optional<Tensor>& sequence_layout,
                 const std::optional<Tensor>& reset, const Options& options);

// Rows of a [.., features] tensor in the caller's layout, from feature `offset` on.
template <class Scalar, class Pointer>
RowStrides<Scalar> rows_of(const Batch& batch, const Tensor& tensor, Pointer data, int64_t offset) {
  if (batch.kind == Batch::Kind::packed) return {data + offset, 0, tensor.stride(0)};
  if (batch.kind == Batch::Kind::jagged) {
    return {data + offset, tensor.stride(0), tensor.stride(0)};
  }
  const int64_t time_stride = tensor.stride(batch.batch_first ? 1 : 0);
  const int64_t row_stride = tensor.stride(batch.batch_first ? 0 : 1);
  // torch allows a batch of one any stride; with this one the tensor is flat.
  return {data + offset, time_stride, batch.B == 1 ? time_stride : row_stride};
}

// Checks that the token ids of all rows are from 0 to V - 1.
void check_ids(const Batch& batch, const Tensor& ids, int64_t V);

// How many rows a tensor of the batch has, those of padding included.
inline int64_t count_tensor_rows(const Batch& batch) {
  return batch.kind == Batch::Kind::padded ? batch.T * batch.B : batch.layout.N;
}

// A view of a contiguous tensor (rows, features) that is laid out like a contiguous input.
Tensor with_rows_of(const Batch& batch, const Tensor& tensor);

// A new tensor of the batch's rows, laid out like a contiguous input.
Tensor empty_rows(const Batch& batch, int64_t features, int32_t dtype);

// Zeroes the rows past the end of each sequence, in a tensor that empty_rows() made.
void clear_padding(const Batch& batch, const Tensor& tensor);

}  // namespace namernn_fast
