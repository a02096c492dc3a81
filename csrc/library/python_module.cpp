// The Python module `_C`: a step without torch's dispatcher, which takes longer than a small step.
#include <Python.h>

#include <string>
#include <vector>

#include "library/cell_step.h"
#include "library/step.h"

// DLPack has a stable ABI, but torch hides its header from extensions that use torch's stable ABI.
#pragma push_macro("TORCH_TARGET_VERSION")
#undef TORCH_TARGET_VERSION
#include <ATen/dlpack.h>
#pragma pop_macro("TORCH_TARGET_VERSION")

namespace namernn_fast {
namespace {

// Returns the functions that read torch's tensors from Python objects, or null if this torch has
// none.
const DLPackExchangeAPI* exchange_of(PyObject* tensor) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
  PyObject* capsule = PyObject_GetAttrString(type, "__dlpack_c_exchange_api__");
  if (!capsule) return nullptr;
  const void* found = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
  Py_DECREF(capsule);  // the functions live as long as the process
  const auto* exchange = static_cast<const DLPackExchangeAPI*>(found);
  const bool fits = exchange && exchange->header.version.major == DLPACK_MAJOR_VERSION;
  return fits && exchange->dltensor_from_py_object_no_sync ? exchange : nullptr;
}

// Sets `view` to a tensor. Returns false if the tensor is not on the CPU, has no memory, or has a
// dtype without kernels.
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

// Calls f() without Python's global lock. Returns false, with a Python exception, if f() throws.
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

// Reads a list of integers. Returns false, with an exception, for anything else.
bool read_rows(PyObject* list, std::vector<int64_t>& rows) {
  for (Py_ssize_t i = 0; i < PyList_Size(list); ++i) {
    PyObject* const item = PyList_GetItem(list, i);
    rows.push_back(PyBool_Check(item) ? -1 : PyLong_AsLongLong(item));
    if (PyBool_Check(item) || PyErr_Occurred()) {
      PyErr_Format(PyExc_TypeError, "rows must be integers, got %R", list);
      return false;
    }
  }
  return !PyErr_Occurred();
}

// step(prepared, states, frame, output, rows, options): runs a step, and returns whether it did.
// `rows` is a list of integers or None. Returns False without an effect if a tensor is of a kind
// that only the operator takes.
PyObject* step(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 6) {
    PyErr_SetString(PyExc_TypeError, "step() takes 6 arguments");
    return nullptr;
  }
  static const DLPackExchangeAPI* const exchange = exchange_of(args[0]);
  Step step{};
  View* const views[] = {&step.prepared, &step.states, &step.frame, &step.output};
  bool taken = exchange != nullptr;
  for (int i = 0; i < 4 && taken; ++i) taken = read_tensor(exchange, args[i], *views[i]);
  if (!taken || !is_simple(step)) {
    PyErr_Clear();
    Py_RETURN_FALSE;
  }
  std::vector<int64_t> rows;
  step.row_count = -1;
  const int64_t options = PyLong_AsLongLong(args[5]);
  if ((args[4] != Py_None && !read_rows(args[4], rows)) || PyErr_Occurred()) return nullptr;
  if (args[4] != Py_None) {
    step.row_count = int64_t(rows.size());
    step.rows = rows.data();
  }
  if (!run_without_lock([&] { run_step(step, read_options(options, 0)); })) return nullptr;
  Py_RETURN_TRUE;
}

// Sets views to the tensors of a list. Returns their number, or -1 if one cannot be read.
Py_ssize_t read_tensors(const DLPackExchangeAPI* exchange, PyObject* list, View* views,
                        Py_ssize_t most) {
  const Py_ssize_t count = PyList_Size(list);
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (count > most || !read_tensor(exchange, PyList_GetItem(list, i), views[i])) return -1;
  }
  return count;
}

// cell_step(cell, input, initial, last, weights, options): runs a step of a step module, with lists
// of tensors for the last three, and returns whether it did; see run_cell_step().
PyObject* cell_step(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 6) {
    PyErr_SetString(PyExc_TypeError, "cell_step() takes 6 arguments");
    return nullptr;
  }
  static const DLPackExchangeAPI* const exchange = exchange_of(args[1]);
  CellStep step{};
  step.cell = CellKind(PyLong_AsLongLong(args[0]));
  if (!exchange || !read_tensor(exchange, args[1], step.input) ||
      (step.initial_count = read_tensors(exchange, args[2], step.initial, kMostStates)) < 0 ||
      (step.last_count = read_tensors(exchange, args[3], step.last, kMostStates)) < 0 ||
      (step.weight_count = read_tensors(exchange, args[4], step.weights, 4)) < 0) {
    PyErr_Clear();
    Py_RETURN_FALSE;
  }
  const int64_t options = PyLong_AsLongLong(args[5]);
  if (PyErr_Occurred()) return nullptr;
  bool ran = false;
  return run_without_lock([&] { ran = run_cell_step(step, read_options(options, 0)); })
             ? PyBool_FromLong(ran)
             : nullptr;
}

PyMethodDef kMethods[] = {
    {"cell_step", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&cell_step)),
     METH_FASTCALL, nullptr},
    {"step", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&step)), METH_FASTCALL,
     nullptr},
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
  return PyModule_Create(&module);
}
