// The only file that knows pybind11: unpacks arguments, releases the GIL where a call can block, turns a Status into a
// Python exception. Everything is positional: keyword arguments cost 0.4 us a call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "common/status.h"
#ifdef TPK_HAVE_CUDA
#include <cuda_runtime_api.h>

#include "kernels/reduce_buffers.h"
#endif

namespace py = pybind11;

namespace {

void raise_if_error(const tpk::Status& status) {
  if (status.ok()) return;
  if (status.code == tpk::Code::kInvalidArgument) throw py::value_error(status.message);
  throw std::runtime_error(status.message);
}

tpk::DType dtype_of(int code) {
  if (code < 0 || code >= tpk::kNumDTypes) throw py::value_error("unknown dtype code " + std::to_string(code));
  return static_cast<tpk::DType>(code);
}

void bind_build(py::module_& m) {
  m.def("build_info", [] {
    py::dict info;
    info["version"] = TPK_VERSION;
    info["compiler"] = TPK_COMPILER;
    info["cuda"] = TPK_CUDA_SUMMARY;
#ifdef TPK_HAVE_CUDA
    info["has_cuda"] = true;
#else
    info["has_cuda"] = false;
#endif
    return info;
  });
  m.def("dtype_table", [] {
    py::dict table;
    for (int code = 0; code < tpk::kNumDTypes; ++code) {
      const auto dtype = static_cast<tpk::DType>(code);
      table[tpk::name_of(dtype)] = py::make_tuple(code, tpk::size_of(dtype));
    }
    return table;
  });
}

#ifdef TPK_HAVE_CUDA
void bind_cuda(py::module_& m) {
  // Devices the statically linked runtime sees; 0 where there is no driver.
  m.def("cuda_device_count", [] {
    int count = 0;
    return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
  });
  m.def("cuda_reduce_buffers", [](const std::vector<std::uintptr_t>& inputs, std::uintptr_t out, std::size_t n,
                                  int dtype, std::uintptr_t stream) {
    std::vector<const void*> addresses;
    addresses.reserve(inputs.size());
    for (const std::uintptr_t address : inputs) addresses.push_back(reinterpret_cast<const void*>(address));
    raise_if_error(tpk::reduce_buffers(addresses.data(), static_cast<int>(addresses.size()),
                                       reinterpret_cast<void*>(out), n, dtype_of(dtype),
                                       reinterpret_cast<void*>(stream)));
  });
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  bind_build(m);
#ifdef TPK_HAVE_CUDA
  bind_cuda(m);
#endif
}
