// Bindings of the peer-memory kernels: their pure functions in every build, the launches in CUDA builds.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "bindings.h"
#include "kernels/peer_kernels.h"
#include "kernels/peer_layout.h"

namespace tpk::python {
namespace {

namespace peer = tpk::peer;
using std::size_t;
using std::uintptr_t;
using Addresses = std::vector<uintptr_t>;

peer::Algorithm algorithm_of(int code) {
  if (code < 0 || code >= peer::kNumAlgorithms) throw py::value_error("unknown algorithm " + std::to_string(code));
  return static_cast<peer::Algorithm>(code);
}

void check_world(int world) {
  if (world < 1 || world > peer::kMaxWorld)
    throw py::value_error("expected 1 to " + std::to_string(peer::kMaxWorld) + " ranks, got " + std::to_string(world));
}

void bind_sizes(py::module_& m) {
  m.def("cuda_peer_constants", [] {
    py::dict d;
    d["max_world"] = peer::kMaxWorld;
    d["max_blocks"] = peer::kMaxBlocks;
    d["max_phases"] = peer::kMaxPhases;
    d["pack_bytes"] = peer::kPackBytes;
    d["alignment"] = peer::kAlignment;
    d["flag_bytes"] = peer::kFlagBytes;
    d["lamport_bytes"] = peer::kLamportBytes;
    d["lamport_buffers"] = peer::kLamportBuffers;
    d["empty_word"] = peer::kEmptyWord;
    d["error_magic"] = peer::kErrorMagic;
    d["error_bytes"] = peer::kErrorBytes;
    d["max_row_packs"] = peer::kMaxRowPacks;
    d["max_lamport_row_packs"] = peer::kMaxLamportRowPacks;
    return d;
  });
  // (half_bytes, registered_offset, flags_offset, lamport_offset, total_bytes)
  m.def("cuda_peer_layout", [](int world, size_t half_bytes, size_t registered_bytes) {
    check_world(world);
    const peer::Layout l = peer::layout_of(world, half_bytes, registered_bytes);
    return py::make_tuple(l.half_bytes, l.registered_offset, l.flags_offset, l.lamport_offset, l.total_bytes);
  });
  // [begin, end) of the packs or rows that a rank reduces
  m.def("cuda_peer_slice", [](size_t units, int world, int rank) {
    check_world(world);
    const peer::Slice s = peer::slice_of(units, world, rank);
    return py::make_tuple(s.begin, s.end);
  });
  // (blocks, threads)
  m.def("cuda_peer_all_reduce_shape", [](int algorithm, size_t bytes, int world, int max_blocks) {
    check_world(world);
    const peer::Shape s = peer::all_reduce_shape(algorithm_of(algorithm), bytes, world, max_blocks);
    return py::make_tuple(s.blocks, s.threads);
  });
  // (blocks, threads, threads of a row, packs of a thread)
  m.def("cuda_peer_norm_shape", [](int algorithm, size_t rows, size_t row_packs, int world, int max_blocks) {
    check_world(world);
    if (row_packs < 1 || row_packs > peer::kMaxRowPacks) throw py::value_error("unsupported width of a row");
    const peer::NormShape s = peer::norm_shape(algorithm_of(algorithm), rows, row_packs, world, max_blocks);
    return py::make_tuple(s.blocks, s.threads, s.row_threads, s.packs);
  });
  m.def("cuda_peer_check_half_bytes", &peer::check_half_bytes);
  // The counting rules, for the tests' model of the protocol.
  m.def("cuda_peer_signal_value", &peer::signal_value);
  m.def("cuda_peer_half_of", &peer::half_of);
  m.def("cuda_peer_lamport_buffer", &peer::lamport_buffer);
  m.def("cuda_peer_lamport_emptied", &peer::lamport_emptied);
  m.def("cuda_peer_advances", &peer::advances);
}

#ifdef TPK_HAVE_CUDA
peer::PeerGroup group_of(const Addresses& data, const Addresses& flags, int rank, int world, size_t half_bytes,
                         int max_blocks, std::uint64_t timeout_ns, uintptr_t error, uintptr_t stream) {
  if (world < 0 || data.size() != static_cast<size_t>(world) || flags.size() != static_cast<size_t>(world))
    throw py::value_error("expected one data address and one flags address for each rank");
  return {data.data(), flags.data(), rank, world, half_bytes, max_blocks, timeout_ns, at(error), at(stream)};
}

void bind_launches(py::module_& m) {
  m.def("cuda_peer_prepare", [](uintptr_t flags, int world, uintptr_t stream) {
    raise_if_error(peer::prepare(at(flags), world, at(stream)));
  });
  m.def("cuda_peer_all_reduce", [](int algorithm, const Addresses& data, const Addresses& flags, uintptr_t multicast,
                                   int rank, int world, size_t half_bytes, uintptr_t x, uintptr_t out, size_t n,
                                   int dtype, int max_blocks, std::uint64_t timeout_ns, uintptr_t error,
                                   uintptr_t stream) {
    const peer::PeerGroup group = group_of(data, flags, rank, world, half_bytes, max_blocks, timeout_ns, error, stream);
    raise_if_error(peer::all_reduce(algorithm_of(algorithm), group, at(multicast), at(x), at(out), n, dtype_of(dtype)));
  });
  m.def("cuda_peer_all_reduce_norm", [](int algorithm, const Addresses& data, const Addresses& flags, int rank,
                                        int world, size_t half_bytes, uintptr_t x, uintptr_t bias, uintptr_t residual,
                                        uintptr_t weight, double eps, uintptr_t out_normed, uintptr_t out_sum,
                                        size_t rows, size_t width, int dtype, bool round_before_norm, bool gather_sum,
                                        int max_blocks, std::uint64_t timeout_ns, uintptr_t error, uintptr_t stream) {
    const peer::PeerGroup group = group_of(data, flags, rank, world, half_bytes, max_blocks, timeout_ns, error, stream);
    const peer::NormArguments arguments{at(x),          at(bias),    at(residual), at(weight), static_cast<float>(eps),
                                        at(out_normed), at(out_sum), rows,         width,      round_before_norm,
                                        gather_sum};
    raise_if_error(peer::all_reduce_norm(algorithm_of(algorithm), group, arguments, dtype_of(dtype)));
  });
  m.def("cuda_peer_check", [](const Addresses& data, const Addresses& flags, int rank, int world, size_t half_bytes,
                              size_t bytes, std::uint32_t seed, uintptr_t report, int max_blocks,
                              std::uint64_t timeout_ns, uintptr_t error, uintptr_t stream) {
    const peer::PeerGroup group = group_of(data, flags, rank, world, half_bytes, max_blocks, timeout_ns, error, stream);
    raise_if_error(peer::check(group, bytes, seed, at<std::uint32_t>(report)));
  });
}
#endif

}  // namespace

void bind_peer(py::module_& m) {
  bind_sizes(m);
#ifdef TPK_HAVE_CUDA
  bind_launches(m);
#endif
}

}  // namespace tpk::python
