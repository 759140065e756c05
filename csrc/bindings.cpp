// The files called bindings* are the only ones that know pybind11: they unpack arguments, release the GIL where a call
// can block, and turn a Status into a Python exception. Everything is positional: keyword arguments cost 0.4 us a call.
#include "bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "comm/shm_communicator.h"
#include "common/dtype.h"
#include "common/status.h"
#include "cpu/cpu_ops.h"
#include "cpu/thread_pool.h"
#ifdef TPK_HAVE_CUDA
#include <cuda_runtime_api.h>

#include "kernels/reduce_buffers.h"
#endif

namespace py = pybind11;
using namespace tpk::python;

namespace {

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

void bind_cpu(py::module_& m) {
  using std::ptrdiff_t;
  using std::uintptr_t;
  // Calls this long let other Python threads run; shorter ones would pay more for the GIL than they take.
  constexpr ptrdiff_t kReleaseBytes = 4 << 20;

  m.def("cpu_linear", [](uintptr_t out, uintptr_t x, uintptr_t w, uintptr_t bias, uintptr_t residual, ptrdiff_t rows,
                         ptrdiff_t n, ptrdiff_t k, ptrdiff_t ldx, ptrdiff_t ldw, ptrdiff_t ldr, int dtype,
                         int activation, bool gated, int threads) {
    const tpk::DType type = dtype_of(dtype);
    std::optional<py::gil_scoped_release> released;
    if (n * k * static_cast<ptrdiff_t>(tpk::size_of(type)) >= kReleaseBytes) released.emplace();
    const tpk::Status status = tpk::cpu::linear(at(out), at(x), at(w), at(bias), at(residual), rows, n, k, ldx, ldw,
                                                ldr, type, activation, gated, threads);
    released.reset();
    raise_if_error(status);
  });
  m.def("cpu_rms_norm", [](uintptr_t out, uintptr_t sum, uintptr_t x, uintptr_t residual, uintptr_t weight,
                           ptrdiff_t rows, ptrdiff_t width, double eps, int dtype, int threads) {
    raise_if_error(tpk::cpu::rms_norm(at(out), at(sum), at(x), at(residual), at(weight), rows, width, eps,
                                      dtype_of(dtype), threads));
  });
  m.def("cpu_silu_mul", [](uintptr_t out, uintptr_t in, ptrdiff_t rows, ptrdiff_t width, int dtype, int threads) {
    raise_if_error(tpk::cpu::silu_mul(at(out), at(in), rows, width, dtype_of(dtype), threads));
  });
  m.def("cpu_qkv_rope_cache", [](uintptr_t q_out, uintptr_t qkv, uintptr_t cos, uintptr_t sin, uintptr_t lengths,
                                 uintptr_t positions, ptrdiff_t positions_stride, uintptr_t k, ptrdiff_t k_batch,
                                 ptrdiff_t k_head, ptrdiff_t k_pos, uintptr_t v, ptrdiff_t v_batch, ptrdiff_t v_head,
                                 ptrdiff_t v_pos, uintptr_t q_norm, uintptr_t k_norm, double eps, ptrdiff_t batch,
                                 ptrdiff_t tokens, ptrdiff_t hq, ptrdiff_t hkv, ptrdiff_t d, ptrdiff_t max_len,
                                 ptrdiff_t table_rows, int dtype, int threads) {
    raise_if_error(tpk::cpu::qkv_rope_cache(
        at(q_out), at(qkv), at<float>(cos), at<float>(sin), at<std::int64_t>(lengths), at<std::int64_t>(positions),
        positions_stride, {at(k), k_batch, k_head, k_pos}, {at(v), v_batch, v_head, v_pos}, at(q_norm), at(k_norm), eps,
        batch, tokens, hq, hkv, d, max_len, table_rows, dtype_of(dtype), threads));
  });
  m.def("cpu_decode_attention", [](uintptr_t out, uintptr_t q, ptrdiff_t q_batch, ptrdiff_t q_head, ptrdiff_t q_token,
                                   uintptr_t k, ptrdiff_t k_batch, ptrdiff_t k_head, ptrdiff_t k_pos, uintptr_t v,
                                   ptrdiff_t v_batch, ptrdiff_t v_head, ptrdiff_t v_pos, uintptr_t lengths,
                                   ptrdiff_t batch, ptrdiff_t tokens, ptrdiff_t hq, ptrdiff_t hkv, ptrdiff_t d,
                                   ptrdiff_t max_len, ptrdiff_t window, double scale, int dtype, int threads) {
    raise_if_error(tpk::cpu::decode_attention(at(out), at(q), q_batch, q_head, q_token, {at(k), k_batch, k_head, k_pos},
                                              {at(v), v_batch, v_head, v_pos}, at<std::int64_t>(lengths), batch, tokens,
                                              hq, hkv, d, max_len, window, scale, dtype_of(dtype), threads));
  });
  m.def("cpu_advise_huge_pages",
        [](uintptr_t data, std::size_t bytes) { return tpk::cpu::advise_huge_pages(at(data), bytes); });
  m.def("cpu_read_floats",
        [](uintptr_t data, ptrdiff_t n, int threads) { return tpk::cpu::read_floats(at<float>(data), n, threads); });
  m.def("cpu_isa", &tpk::cpu::isa_name);
  m.def("cpu_pool_size", &tpk::cpu::pool_size);
}

// Releases the GIL at the first wait that may take long, and lets Python's signal handlers run during it.
class GilHooks final : public tpk::shm::BlockingHooks {
 public:
  ~GilHooks() override { restore(); }
  void about_to_block() override {
    if (saved_ == nullptr && !raised_) saved_ = PyEval_SaveThread();
  }
  bool interrupted() override {
    restore();
    raised_ = raised_ || PyErr_CheckSignals() != 0;
    about_to_block();
    return raised_;
  }
  // The thread holds the GIL again; true if a signal handler raised.
  bool restore() {
    // Cleared first: at interpreter exit the call ends a daemon thread, whose unwinding comes here again.
    PyThreadState* saved = saved_;
    saved_ = nullptr;
    if (saved != nullptr) PyEval_RestoreThread(saved);
    return raised_;
  }

 private:
  PyThreadState* saved_ = nullptr;
  bool raised_ = false;
};

// A communicator and what Python needs to raise its errors.
class ShmCommunicator {
 public:
  ShmCommunicator(int rank, int world_size, const std::string& name)
      : native_(rank, world_size, name), world_size_(world_size), name_(name) {}

  tpk::shm::Communicator& native() { return native_; }
  int world_size() const { return world_size_; }

  // Runs `call(hooks)` and raises what it returns.
  template <class Call>
  void run(Call&& call) {
    GilHooks hooks;
    const tpk::Status status = call(hooks);
    if (hooks.restore()) throw py::error_already_set();
    if (!status.ok()) raise(status);
  }

 private:
  [[noreturn]] void raise(const tpk::Status& status) {
    const tpk::shm::Failure& failure = native_.failure();
    std::vector<int> ranks;
    for (int r = 0; r < world_size_; ++r)
      if (failure.ranks >> r & 1) ranks.push_back(r);
    raise_comm_error(status, name_, failure.operation, failure.sequence, ranks);
  }

  tpk::shm::Communicator native_;
  const int world_size_;
  const std::string name_;
};

tpk::ReduceOp reduce_op_of(int code) {
  if (code < 0 || code >= tpk::kNumReduceOps) throw py::value_error("unknown reduction code " + std::to_string(code));
  return static_cast<tpk::ReduceOp>(code);
}

void bind_shm(py::module_& m) {
  using std::size_t;
  using std::uintptr_t;
  using Counts = std::vector<size_t>;

  py::class_<ShmCommunicator>(m, "ShmCommunicator")
      .def(py::init([](int rank, int world_size, const std::string& name) {
        if (world_size < 1 || world_size > tpk::shm::kMaxRanks || rank < 0 || rank >= world_size)
          throw py::value_error("expected 1 to " + std::to_string(tpk::shm::kMaxRanks) +
                                " ranks and 0 <= rank < world_size");
        return std::make_unique<ShmCommunicator>(rank, world_size, name);
      }))
      // Bootstrap; both return the reason why shared memory cannot be used, or an empty string.
      .def("create",
           [](ShmCommunicator& self, const std::string& directory, size_t one_shot_bytes, size_t chunk_bytes) {
             return self.native().create(directory, one_shot_bytes, chunk_bytes).message;
           })
      .def("attach", [](ShmCommunicator& self, std::int64_t pid, int fd, std::uint64_t device, std::uint64_t inode,
                        std::uint64_t bytes) { return self.native().attach({pid, fd, device, inode, bytes}).message; })
      .def("descriptor",
           [](ShmCommunicator& self) {
             const tpk::shm::Descriptor& d = self.native().segment().descriptor();
             return py::make_tuple(d.pid, d.fd, d.device, d.inode, d.bytes);
           })
      .def("activate", [](ShmCommunicator& self) { self.native().activate(); })
      .def("all_reduce",
           [](ShmCommunicator& self, uintptr_t in, uintptr_t out, size_t count, int dtype, int op, double timeout) {
             self.run([&](GilHooks& hooks) {
               return self.native().all_reduce(at(in), at(out), count, dtype_of(dtype), reduce_op_of(op), timeout,
                                               hooks);
             });
           })
      .def("reduce_scatter",
           [](ShmCommunicator& self, uintptr_t in, uintptr_t out, const Counts& counts, int dtype, int op,
              double timeout) {
             if (static_cast<int>(counts.size()) != self.world_size()) throw py::value_error("one count per rank");
             self.run([&](GilHooks& hooks) {
               return self.native().reduce_scatter(at(in), at(out), counts, dtype_of(dtype), reduce_op_of(op), timeout,
                                                   hooks);
             });
           })
      .def("all_gather",
           [](ShmCommunicator& self, uintptr_t in, uintptr_t out, size_t rows, const Counts& counts, int dtype,
              double timeout) {
             if (static_cast<int>(counts.size()) != self.world_size()) throw py::value_error("one count per rank");
             self.run([&](GilHooks& hooks) {
               return self.native().all_gather(at(in), at(out), rows, counts, dtype_of(dtype), timeout, hooks);
             });
           })
      .def("broadcast",
           [](ShmCommunicator& self, uintptr_t data, size_t count, int dtype, int root, double timeout) {
             if (root < 0 || root >= self.world_size()) throw py::value_error("root is not a rank of the group");
             self.run([&](GilHooks& hooks) {
               return self.native().broadcast(at(data), count, dtype_of(dtype), root, timeout, hooks);
             });
           })
      .def("barrier",
           [](ShmCommunicator& self, double timeout) {
             self.run([&](GilHooks& hooks) { return self.native().barrier(timeout, hooks); });
           })
      .def("close",
           [](ShmCommunicator& self) {
             GilHooks hooks;
             self.native().close(hooks);
           })
      .def_property_readonly("closed", [](ShmCommunicator& self) { return self.native().closed(); })
      .def_property_readonly("sequence", [](ShmCommunicator& self) { return self.native().sequence(); });
  m.def("shm_isa", [] { return tpk::reduce_kernels().name; });
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
  bind_cpu(m);
  bind_shm(m);
  bind_nccl(m);
  bind_peer(m);
#ifdef TPK_HAVE_CUDA
  bind_cuda(m);
#endif
}
