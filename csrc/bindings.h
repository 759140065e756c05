// What the files of bindings share: errors of Python from a Status, addresses from integers.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "common/status.h"

namespace tpk::python {

namespace py = pybind11;

inline void raise_if_error(const tpk::Status& status) {
  if (status.ok()) return;
  if (status.code == tpk::Code::kInvalidArgument) throw py::value_error(status.message);
  throw std::runtime_error(status.message);
}

// Raises the error of tp_kernels.comm.errors that belongs to `status`, with its attributes.
[[noreturn]] inline void raise_comm_error(const tpk::Status& status, const std::string& group,
                                          const std::string& operation, std::uint64_t sequence,
                                          const std::vector<int>& ranks) {
  if (status.code == tpk::Code::kInvalidArgument) throw py::value_error(status.message);
  const char* type = "CommError";
  if (status.code == tpk::Code::kTimeout) type = "CommTimeoutError";
  if (status.code == tpk::Code::kPeerDied) type = "PeerDiedError";
  if (status.code == tpk::Code::kMismatch) type = "CommMismatchError";
  if (status.code == tpk::Code::kAborted) type = "CommAbortedError";
  const py::object error = py::module_::import("tp_kernels.comm.errors")
                               .attr(type)(status.message, py::arg("group") = group, py::arg("operation") = operation,
                                           py::arg("sequence") = sequence, py::arg("ranks") = ranks);
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
  throw py::error_already_set();
}

inline tpk::DType dtype_of(int code) {
  if (code < 0 || code >= tpk::kNumDTypes) throw py::value_error("unknown dtype code " + std::to_string(code));
  return static_cast<tpk::DType>(code);
}

// An address, or nothing where Python passes 0.
template <class T = void>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bind_nccl(py::module_& m);  // bindings_nccl.cpp
void bind_peer(py::module_& m);  // bindings_peer.cpp

}  // namespace tpk::python
