#include "comm/nccl_library.h"

#include <dlfcn.h>
#include <limits.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <mutex>
#include <set>
#include <sstream>

namespace tpk::nccl {
namespace {

constexpr const char* kVariable = "TP_KERNELS_NCCL_PATH";
constexpr const char* kSoname = "libnccl.so.2";

struct Opened {
  void* handle = nullptr;
  std::string source;
};

std::string loader_message() {
  const char* message = dlerror();
  return message != nullptr ? message : "unknown error";
}

// Opens the first library that is there; a file that is there but cannot be opened is an error, not passed over.
Status open_first(const std::string& hint, Opened* opened) {
  const char* variable = std::getenv(kVariable);
  if (variable != nullptr && *variable != '\0') {
    // Without a slash dlopen would search the system's folders instead of taking the file.
    const std::string file =
        std::string(variable).find('/') == std::string::npos ? std::string("./") + variable : variable;
    opened->handle = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
    opened->source = kVariable;
    if (opened->handle != nullptr) return Status::Ok();
    return Status::Error(Code::kSystem, std::string("NCCL: ") + kVariable + "='" + variable + "' cannot be loaded (" +
                                            loader_message() + "); correct or unset the variable");
  }
  opened->handle = dlopen(kSoname, RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
  opened->source = "already loaded in this process";
  if (opened->handle != nullptr) return Status::Ok();
  dlerror();
  if (!hint.empty() && access(hint.c_str(), F_OK) == 0) {
    opened->handle = dlopen(hint.c_str(), RTLD_NOW | RTLD_LOCAL);
    opened->source = "torch's wheel";
    if (opened->handle != nullptr) return Status::Ok();
    return Status::Error(Code::kSystem, "NCCL: " + hint + " cannot be loaded (" + loader_message() + ")");
  }
  opened->handle = dlopen(kSoname, RTLD_NOW | RTLD_LOCAL);
  opened->source = "the system's library path";
  if (opened->handle != nullptr) return Status::Ok();
  return Status::Error(Code::kSystem,
                       std::string("NCCL was not found: ") + kVariable + " is not set, no " + kSoname +
                           " is loaded in this process, " +
                           (hint.empty() ? std::string("torch has none beside it") : hint + " does not exist") +
                           ", and the system says: " + loader_message());
}

std::string path_of(void* symbol) {
  Dl_info info;
  if (dladdr(symbol, &info) == 0 || info.dli_fname == nullptr) return "?";
  char resolved[PATH_MAX];
  return realpath(info.dli_fname, resolved) != nullptr ? resolved : info.dli_fname;
}

template <class Function>
void find(void* handle, const char* name, Function** function, std::string* missing) {
  *function = reinterpret_cast<Function*>(dlsym(handle, name));
  if (*function == nullptr) *missing += (missing->empty() ? "" : ", ") + std::string(name);
}

Status read_functions(void* handle, Library* library) {
  std::string missing;
  Functions& f = library->call;
  find(handle, "ncclGetVersion", &f.GetVersion, &missing);
  if (f.GetVersion != nullptr) library->path = path_of(reinterpret_cast<void*>(f.GetVersion));
  find(handle, "ncclGetUniqueId", &f.GetUniqueId, &missing);
  find(handle, "ncclCommInitRankConfig", &f.CommInitRankConfig, &missing);
  find(handle, "ncclCommFinalize", &f.CommFinalize, &missing);
  find(handle, "ncclCommDestroy", &f.CommDestroy, &missing);
  find(handle, "ncclCommAbort", &f.CommAbort, &missing);
  find(handle, "ncclCommGetAsyncError", &f.CommGetAsyncError, &missing);
  find(handle, "ncclGetErrorString", &f.GetErrorString, &missing);
  find(handle, "ncclGetLastError", &f.GetLastError, &missing);
  find(handle, "ncclAllReduce", &f.AllReduce, &missing);
  find(handle, "ncclReduceScatter", &f.ReduceScatter, &missing);
  find(handle, "ncclAllGather", &f.AllGather, &missing);
  find(handle, "ncclBroadcast", &f.Broadcast, &missing);
  find(handle, "ncclReduce", &f.Reduce, &missing);
  find(handle, "ncclGroupStart", &f.GroupStart, &missing);
  find(handle, "ncclGroupEnd", &f.GroupEnd, &missing);
  std::string absent;  // no error: see nccl_buffers.h
  find(handle, "ncclMemAlloc", &f.MemAlloc, &absent);
  find(handle, "ncclMemFree", &f.MemFree, &absent);
  find(handle, "ncclCommRegister", &f.CommRegister, &absent);
  find(handle, "ncclCommDeregister", &f.CommDeregister, &absent);
  find(handle, "ncclCommWindowRegister", &f.CommWindowRegister, &absent);
  find(handle, "ncclCommWindowDeregister", &f.CommWindowDeregister, &absent);
  const std::string which =
      "NCCL: " + (library->path.empty() ? "the library" : library->path) + " (found by: " + library->source + ")";
  // Asked before what is missing: an old library lacks functions, and its age says more than their names.
  if (f.GetVersion != nullptr && f.GetVersion(&library->version) != kSuccess)
    return Status::Error(Code::kSystem, which + " does not tell its version");
  if (f.GetVersion != nullptr && library->version < kMinimumVersion)
    return Status::Error(Code::kSystem, which + " is version " + version_text(library->version) + "; at least " +
                                            version_text(kMinimumVersion) + " is needed");
  if (!missing.empty()) return Status::Error(Code::kSystem, which + " lacks " + missing);
  return Status::Ok();
}

std::mutex mutex;
// Never freed: threads of NCCL may outlive every static object.
const Library* current = nullptr;

}  // namespace

Status load_library(const std::string& hint, const Library** library) {
  const std::lock_guard lock(mutex);
  *library = current;
  if (current != nullptr) return Status::Ok();
  Opened opened;
  if (Status status = open_first(hint, &opened); !status.ok()) return status;
  auto* candidate = new Library;
  candidate->source = opened.source;
  if (Status status = read_functions(opened.handle, candidate); !status.ok()) {
    delete candidate;
    dlclose(opened.handle);
    return status;
  }
  *library = current = candidate;
  return Status::Ok();
}

std::vector<std::string> mapped_libraries() {
  std::ifstream maps("/proc/self/maps");
  std::set<std::string> identities;
  std::vector<std::string> paths;
  for (std::string line; std::getline(maps, line);) {
    std::istringstream fields(line);
    std::string range, permissions, offset, device, inode, path;
    fields >> range >> permissions >> offset >> device >> inode >> std::ws;
    std::getline(fields, path);
    const std::string name = path.substr(path.rfind('/') + 1);
    // Plugins are called libnccl-net.so and the like.
    if (name.rfind("libnccl.so", 0) == 0 && identities.insert(device + ":" + inode).second) paths.push_back(path);
  }
  return paths;
}

std::string version_text(int version) {
  // Up to 2.8 a version was coded with one digit less.
  const int unit = version < 10000 ? 1000 : 10000;
  return std::to_string(version / unit) + "." + std::to_string(version % unit / 100) + "." +
         std::to_string(version % 100);
}

}  // namespace tpk::nccl
