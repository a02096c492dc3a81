// The Python module `_C`: runs steps without torch's dispatcher, whose overhead exceeds the time of
// a small step.
#include <Python.h>

#include <algorithm>
#include <exception>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "library/arguments/program.h"
#include "library/inference/step.h"
#include "processor.h"

// DLPack has a stable ABI, but torch hides its header from extensions that use torch's stable ABI.
#pragma push_macro("TORCH_TARGET_VERSION")
#undef TORCH_TARGET_VERSION
#include <ATen/dlpack.h>
#pragma pop_macro("TORCH_TARGET_VERSION")

namespace namernn_fast {
namespace {

// Returns torch's DLPack functions, which read tensors from Python objects, or null if this version
// of torch has none. These functions reject objects that are not torch tensors.
const DLPackExchangeAPI* find_exchange() {
  PyObject* const torch = PyImport_ImportModule("torch");
  PyObject* const type = torch ? PyObject_GetAttrString(torch, "Tensor") : nullptr;
  PyObject* const capsule =
      type ? PyObject_GetAttrString(type, "__dlpack_c_exchange_api__") : nullptr;
  Py_XDECREF(type);
  Py_XDECREF(torch);
  if (!capsule) return nullptr;
  const void* found = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
  Py_DECREF(capsule);  // its functions live as long as the process
  const auto* exchange = static_cast<const DLPackExchangeAPI*>(found);
  const bool fits = exchange && exchange->header.version.major == DLPACK_MAJOR_VERSION;
  return fits && exchange->dltensor_from_py_object_no_sync ? exchange : nullptr;
}

// Sets `view` to a view of the tensor `object`. Returns false if `object` is not a CPU tensor, has
// no memory, or has a dtype that steps do not use.
bool read_tensor(const DLPackExchangeAPI* exchange, PyObject* object, View& view) {
  DLTensor tensor;
  if (exchange->dltensor_from_py_object_no_sync(object, &tensor) != 0) return false;
  if (tensor.device.device_type != kDLCPU || tensor.dtype.lanes != 1 || !tensor.strides)
    return false;
  const auto dtype_of = [](DLDataType type) -> int32_t {
    if (type.code == kDLFloat && type.bits == 32) return aoti_torch_dtype_float32();
    if (type.code == kDLFloat && type.bits == 64) return aoti_torch_dtype_float64();
    if (type.code == kDLFloat && type.bits == 16) return aoti_torch_dtype_float16();
    if (type.code == kDLBfloat && type.bits == 16) return aoti_torch_dtype_bfloat16();
    if (type.code == kDLInt && type.bits == 8) return aoti_torch_dtype_int8();
    return type.code == kDLInt && type.bits == 64 ? aoti_torch_dtype_int64() : -1;
  };
  view = {static_cast<char*>(tensor.data) + tensor.byte_offset,
          dtype_of(tensor.dtype),
          tensor.dtype.bits / 8,
          tensor.ndim,
          tensor.shape,
          tensor.strides};
  bool is_empty = false;
  for (int i = 0; i < tensor.ndim; ++i) is_empty |= tensor.shape[i] == 0;
  return view.dtype >= 0 && (tensor.data || is_empty);
}

// Calls f() without holding the GIL. If f() throws, sets a Python exception and returns false.
template <class F>
bool run_without_lock(F&& f) {
  std::string error;
  PyThreadState* const thread = PyEval_SaveThread();
  try {
    f();
  } catch (const std::exception& caught) {
    error = caught.what();
  }
  PyEval_RestoreThread(thread);
  if (!error.empty()) PyErr_SetString(PyExc_RuntimeError, error.c_str());
  return error.empty();
}

// Reads a list of integers. Returns false if an item is not a plain int of at most 64 bits: bools
// and bool tensors also have `__index__`, but are not indices. Sets a Python exception only if
// `list` is not a list or memory runs out.
bool read_rows(PyObject* list, std::vector<int64_t>& rows) {
  if (!PyList_Check(list)) {
    PyErr_Format(PyExc_TypeError, "rows must be a list of integers or None, got %R", list);
    return false;
  }
  try {
    rows.resize(size_t(PyList_Size(list)));
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory() != nullptr;
  }
  for (size_t i = 0; i < rows.size(); ++i) {
    PyObject* const item = PyList_GetItem(list, Py_ssize_t(i));
    if (!PyLong_CheckExact(item)) return false;
    rows[i] = PyLong_AsLongLong(item);
    if (PyErr_Occurred()) {  // an integer of more than 64 bits
      PyErr_Clear();
      return false;
    }
  }
  return !PyErr_Occurred();
}

// Reads the tensors of a list into `views`. Returns their number, or -1 if one cannot be read.
int64_t read_tensors(const DLPackExchangeAPI* exchange, PyObject* list, View* views, int64_t most) {
  const int64_t count = PyList_Size(list);
  for (int64_t i = 0; i < count; ++i) {
    if (count > most || !read_tensor(exchange, PyList_GetItem(list, i), views[i])) return -1;
  }
  return count;
}

// Like read_tensors(), for a list that may contain None. The views of None have no data.
bool read_optional(const DLPackExchangeAPI* exchange, PyObject* list, View* views, int64_t most) {
  const int64_t count = PyList_Size(list);
  for (int64_t i = 0; i < count; ++i) {
    PyObject* const item = PyList_GetItem(list, i);
    if (count > most || (item != Py_None && !read_tensor(exchange, item, views[i]))) return false;
  }
  return count >= 0;
}

// Runs `run(cell, options)` for the arguments `options`, `cell` and `program` of a step.
template <class Run>
PyObject* run_with(PyObject* options, PyObject* cell, PyObject* program, Run&& run) {
  const int64_t bits = PyLong_AsLongLong(options), number = PyLong_AsLongLong(cell);
  std::optional<std::string_view> text;
  if (program != Py_None) {
    Py_ssize_t length = 0;
    const char* const data = PyUnicode_AsUTF8AndSize(program, &length);
    if (data) text.emplace(data, size_t(length));
  }
  if (PyErr_Occurred()) return nullptr;
  const bool ran = run_without_lock([&] {
    const std::shared_ptr<const Cell> described = cell_of(number, text);
    run(*described, read_options(bits, 0));
  });
  if (!ran) return nullptr;
  Py_RETURN_TRUE;
}

// step(weights, states, last, frame, output, rows, options, cell, inputs, program, saved): runs a
// step; see Step.
// - weights, states, last: lists of tensors. `last` is None to update the states in place.
// - output: None for a step module.
// - rows: a list of integers, or None for all sequences.
// - inputs: a list of tensors, or None for no inputs besides x.
// - program: the program of an equation, or None.
// - saved: the tensor to save for step_back(), or None.
// Returns True, or does nothing and returns False if only the operator accepts these arguments.
PyObject* step(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 11 || !PyList_Check(args[0]) || PyList_Size(args[0]) < 1) {
    PyErr_SetString(PyExc_TypeError, "step() takes 11 arguments, the first of them a list");
    return nullptr;
  }
  static const DLPackExchangeAPI* const exchange = find_exchange();
  Step step{};
  step.row_count = -1;
  const auto read_all = [&] {
    if (!exchange || !read_tensor(exchange, args[3], step.frame)) return false;
    step.is_of_stream = args[4] != Py_None;
    if (step.is_of_stream && !read_tensor(exchange, args[4], step.output)) return false;
    if (args[10] != Py_None && !read_tensor(exchange, args[10], step.saved)) return false;
    step.weight_count = read_tensors(exchange, args[0], step.weights, kParameters);
    step.state_count = read_tensors(exchange, args[1], step.states, kMostStates);
    PyObject* const last = args[2] == Py_None ? args[1] : args[2];
    step.last_count = read_tensors(exchange, last, step.last, kMostStates);
    const int64_t inputs =
        args[8] == Py_None ? 0 : read_tensors(exchange, args[8], step.inputs, kMostInputs);
    return inputs >= 0 && step.weight_count >= 0 && step.state_count >= 0 && step.last_count >= 0;
  };
  if (!read_all() || !is_simple(step)) {
    PyErr_Clear();
    Py_RETURN_FALSE;
  }
  std::vector<int64_t> rows;
  if (args[5] != Py_None) {
    if (!read_rows(args[5], rows)) {
      if (PyErr_Occurred()) return nullptr;
      Py_RETURN_FALSE;
    }
    step.row_count = int64_t(rows.size());
    step.rows = rows.data();
  }
  return run_with(args[6], args[7], args[9], [&](const Cell& cell, const Options& options) {
    step.cell = &cell;
    run_step(step, options);
  });
}

// step_back(weights, states, frame, inputs, saved, grad_last, gradients, options, cell, program):
// runs a step backward; see StepBack.
// - weights, states, inputs: lists of tensors.
// - grad_last: a list with a tensor or None for each state of the cell.
// - gradients: four lists of the tensors to write, with None for gradients that are not wanted: of
//   the frame, of the states, of the inputs, and of the weights. With prepared weights, the last
//   list has the gradient of the sums and the gradients of the cell's own parameters.
// Returns True, or does nothing and returns False if only the operator accepts these arguments.
PyObject* step_back(PyObject*, PyObject* const* args, Py_ssize_t count) {
  bool valid = count == 10 && PyList_Check(args[6]) && PyList_Size(args[6]) == 4;
  for (const int i : {0, 1, 3, 5}) valid = valid && PyList_Check(args[i]);
  for (int i = 0; valid && i < 4; ++i) valid = PyList_Check(PyList_GetItem(args[6], i)) != 0;
  if (!valid) {
    PyErr_SetString(PyExc_TypeError, "step_back() takes 10 arguments, five of them lists");
    return nullptr;
  }
  static const DLPackExchangeAPI* const exchange = find_exchange();
  StepBack step{};
  const auto read_all = [&] {
    if (!exchange || !read_tensor(exchange, args[2], step.frame)) return false;
    if (!read_tensor(exchange, args[4], step.saved)) return false;
    step.weight_count = read_tensors(exchange, args[0], step.weights, kParameters);
    step.state_count = read_tensors(exchange, args[1], step.states, kMostStates);
    const int64_t inputs = read_tensors(exchange, args[3], step.inputs, kMostInputs);
    if (step.weight_count < 1 || step.state_count < 0 || inputs < 0) return false;
    const auto list = [&](int i) { return PyList_GetItem(args[6], i); };
    View weights[kParameters + 1] = {};
    const bool prepared = step.weight_count == 1 && step.weights[0].dim != 2;
    if (!read_optional(exchange, args[5], step.grad_last, kMostStates) ||
        !read_optional(exchange, list(0), &step.grad_frame, 1) ||
        !read_optional(exchange, list(1), step.grad_states, kMostStates) ||
        !read_optional(exchange, list(2), step.grad_inputs, kMostInputs) ||
        !read_optional(exchange, list(3), weights, kParameters + prepared)) {
      return false;
    }
    if (prepared) step.grad_sums = weights[0];
    std::copy_n(weights + prepared, kParameters, step.grad_weights);
    return true;
  };
  if (!read_all() || !is_simple(step)) {
    PyErr_Clear();
    Py_RETURN_FALSE;
  }
  return run_with(args[7], args[8], args[9], [&](const Cell& cell, const Options& options) {
    step.cell = &cell;
    run_step_back(step, options);
  });
}

PyMethodDef kMethods[] = {
    {"step", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&step)), METH_FASTCALL,
     nullptr},
    {"step_back", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&step_back)),
     METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace
}  // namespace namernn_fast

// Importing this module also loads the library, which registers the operators.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT,
                               "_C",
                               nullptr,
                               -1,
                               namernn_fast::kMethods,
                               nullptr,
                               nullptr,
                               nullptr,
                               nullptr};
  try {
    namernn_fast::kernels();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ImportError, error.what());
    return nullptr;
  }
  return PyModule_Create(&module);
}
