// Bindings of NCCL: the library and the watchdog's bookkeeping in every build, the communicator in CUDA builds.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "comm/nccl_flight.h"
#include "comm/nccl_library.h"
#ifdef TPK_HAVE_CUDA
#include "comm/nccl_communicator.h"
#endif

namespace tpk::python {
namespace {

py::tuple describe(const tpk::nccl::Library& library) {
  return py::make_tuple(library.version, library.path, library.source);
}

void bind_library(py::module_& m) {
  namespace nccl = tpk::nccl;

  // (version code, path, how it was found)
  m.def("nccl_load", [](const std::string& hint) {
    const nccl::Library* library = nullptr;
    raise_if_error(nccl::load_library(hint, &library));
    return describe(*library);
  });
  m.def("nccl_mapped", &nccl::mapped_libraries);
  m.def("nccl_version_text", &nccl::version_text);
  // The watchdog's bookkeeping, for tests: `done` holds the tokens of what has ended, a negative one of what failed.
  py::class_<nccl::Flight>(m, "NcclFlight")
      .def(py::init())
      .def("add",
           [](nccl::Flight& self, int operation, std::uint64_t sequence, std::int64_t started, std::int64_t deadline,
              bool replay) {
             nccl::Entry entry{static_cast<nccl::Operation>(operation), sequence, started, deadline, nullptr};
             if (replay) entry.token = std::make_shared<std::uint64_t>(sequence);
             replay ? self.add_replay(std::move(entry)) : self.add(std::move(entry));
           })
      .def("arm", [](nccl::Flight& self,
                     std::uint64_t sequence) { self.arm(sequence, std::make_shared<std::uint64_t>(sequence)); })
      .def("drop", &nccl::Flight::drop)
      .def("review",
           [](nccl::Flight& self, std::int64_t now, const std::vector<std::int64_t>& done, int limit) -> py::object {
             const auto failure = self.review(
                 now,
                 [&](const nccl::Entry& entry, std::string* error) {
                   for (const std::int64_t number : done) {
                     if (number == static_cast<std::int64_t>(entry.sequence)) return nccl::Progress::kDone;
                     *error = "a CUDA error";
                     if (-number == static_cast<std::int64_t>(entry.sequence)) return nccl::Progress::kError;
                   }
                   return nccl::Progress::kPending;
                 },
                 limit);
             if (!failure) return py::none();
             return py::make_tuple(static_cast<int>(failure->code), nccl::name_of(failure->operation),
                                   failure->sequence, failure->what);
           })
      .def("__len__", &nccl::Flight::size);
}

#ifdef TPK_HAVE_CUDA
// An NCCL communicator and what Python needs to raise its errors.
class NcclCommunicator {
 public:
  NcclCommunicator(const std::string& hint, int rank, int world_size, int device, const std::string& group)
      : group_(group) {
    const tpk::nccl::Library* library = nullptr;
    raise_if_error(tpk::nccl::load_library(hint, &library));
    if (world_size < 1 || rank < 0 || rank >= world_size) throw py::value_error("expected 0 <= rank < world_size");
    native_ = new tpk::nccl::Communicator(*library, rank, world_size, device, group);
  }
  ~NcclCommunicator() {
    if (native_->forked()) return;  // its thread and its locks belong to the other process
    const py::gil_scoped_release released;
    delete native_;
  }

  tpk::nccl::Communicator& native() { return *native_; }

  template <class Work>
  void run(Work&& work) {
    tpk::Status status;
    {
      const py::gil_scoped_release released;
      status = work(*native_);
    }
    if (status.ok()) return;
    const auto failure = native_->failure();
    raise_comm_error(status, group_, failure ? tpk::nccl::name_of(failure->operation) : "",
                     failure ? failure->sequence : native_->sequence(), {});
  }

 private:
  tpk::nccl::Communicator* native_;
  const std::string group_;
};

// Memory of NCCL's, as long as Python wants it; the communicator it is registered with may want it longer.
class NcclMemory {
 public:
  explicit NcclMemory(std::shared_ptr<tpk::nccl::Memory> memory) : memory_(std::move(memory)) {}
  ~NcclMemory() {
    const py::gil_scoped_release released;  // it may wait
    memory_.reset();
  }
  const std::shared_ptr<tpk::nccl::Memory>& memory() const { return memory_; }

 private:
  std::shared_ptr<tpk::nccl::Memory> memory_;
};

void bind_nccl_communicator(py::module_& m) {
  namespace nccl = tpk::nccl;
  using std::uintptr_t;
  const auto stream_at = [](uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); };

  m.def("nccl_unique_id", [](const std::string& hint) {
    const nccl::Library* library = nullptr;
    raise_if_error(nccl::load_library(hint, &library));
    nccl::UniqueId id;
    const nccl::Result result = library->call.GetUniqueId(&id);
    if (result != nccl::kSuccess)
      throw std::runtime_error(std::string("ncclGetUniqueId: ") + library->call.GetErrorString(result) + " (" +
                               library->call.GetLastError(nullptr) + ")");
    return py::bytes(id.bytes, sizeof id.bytes);
  });
  py::class_<nccl::Handle>(m, "NcclHandle");
  py::class_<NcclMemory>(m, "NcclMemory")
      .def_property_readonly("address",
                             [](NcclMemory& self) { return reinterpret_cast<uintptr_t>(self.memory()->address()); })
      .def("used_on", [stream_at](NcclMemory& self, uintptr_t stream) { self.memory()->used_on(stream_at(stream)); });
  py::class_<NcclCommunicator>(m, "NcclCommunicator")
      .def(py::init<const std::string&, int, int, int, const std::string&>())
      .def("start",
           [](NcclCommunicator& self, const std::string& id, int max_ctas, bool blocking) {
             nccl::UniqueId unique;
             if (id.size() != sizeof unique.bytes) throw py::value_error("a unique id has 128 bytes");
             id.copy(unique.bytes, sizeof unique.bytes);
             self.run([&](nccl::Communicator& native) { return native.start(unique, max_ctas, blocking); });
           })
      .def("poll",
           [](NcclCommunicator& self) {
             bool ready = false;
             self.run([&](nccl::Communicator& native) { return native.poll(&ready); });
             return ready;
           })
      // One collective (see nccl::Call); the handle ends it.
      .def("run",
           [stream_at](NcclCommunicator& self, int operation, uintptr_t in, uintptr_t out,
                       std::vector<std::size_t> counts, int type, int op, int root, uintptr_t stream, bool asynchronous,
                       double timeout) {
             const nccl::Call call{static_cast<nccl::Operation>(operation),
                                   at(in),
                                   at(out),
                                   std::move(counts),
                                   static_cast<nccl::DataType>(type),
                                   static_cast<nccl::RedOp>(op),
                                   root,
                                   stream_at(stream),
                                   asynchronous,
                                   timeout};
             nccl::Handle handle;
             self.run([&](nccl::Communicator& native) { return native.run(call, &handle); });
             return handle;
           })
      .def("wait",
           [stream_at](NcclCommunicator& self, const nccl::Handle& handle, uintptr_t stream) {
             self.run([&](nccl::Communicator& native) { return native.wait(handle, stream_at(stream)); });
           })
      .def("done",
           [](NcclCommunicator& self, const nccl::Handle& handle) {
             bool done = false;
             self.run([&](nccl::Communicator& native) { return native.done(handle, &done); });
             return done;
           })
      .def("guard_replay",
           [stream_at](NcclCommunicator& self, uintptr_t stream, double timeout) {
             self.run([&](nccl::Communicator& native) { return native.guard_replay(stream_at(stream), timeout); });
           })
      .def("allocate",
           [](NcclCommunicator& self, std::size_t bytes) {
             std::shared_ptr<nccl::Memory> memory;
             self.run([&](nccl::Communicator& native) { return native.allocate(bytes, &memory); });
             return std::make_unique<NcclMemory>(std::move(memory));
           })
      // What it came to: 0 nothing, 1 registered, 2 a window.
      .def(
          "register",
          [](NcclCommunicator& self, uintptr_t address, std::size_t bytes, bool window, const NcclMemory* memory,
             double timeout) {
            nccl::Registered kind = nccl::Registered::kNone;
            auto held = memory == nullptr ? nullptr : memory->memory();
            self.run([&](nccl::Communicator& native) {
              return native.register_buffer(at(address), bytes, window, std::move(held), timeout, &kind);
            });
            return static_cast<int>(kind);
          },
          py::arg("address"), py::arg("bytes"), py::arg("window"), py::arg("memory").none(true), py::arg("timeout"))
      .def("deregister",
           [](NcclCommunicator& self, uintptr_t address, double timeout) {
             self.run([&](nccl::Communicator& native) { return native.deregister_buffer(at(address), timeout); });
           })
      .def_property_readonly("registrations", [](NcclCommunicator& self) { return self.native().registrations(); })
      .def("check", [](NcclCommunicator& self) { self.run([](nccl::Communicator& native) { return native.check(); }); })
      .def("abort", [](NcclCommunicator& self, const std::string& why) { self.native().abort(why); })
      .def("close",
           [](NcclCommunicator& self, double grace) {
             const py::gil_scoped_release released;
             self.native().close(grace);
           })
      .def_property_readonly("stream",
                             [](NcclCommunicator& self) { return reinterpret_cast<uintptr_t>(self.native().stream()); })
      .def_property_readonly("sequence", [](NcclCommunicator& self) { return self.native().sequence(); })
      .def_property_readonly("in_flight", [](NcclCommunicator& self) { return self.native().in_flight(); })
      .def_property_readonly("events_created", [](NcclCommunicator& self) { return self.native().events_created(); });
}
#endif

}  // namespace

void bind_nccl(py::module_& m) {
  bind_library(m);
#ifdef TPK_HAVE_CUDA
  bind_nccl_communicator(m);
#endif
}

}  // namespace tpk::python
