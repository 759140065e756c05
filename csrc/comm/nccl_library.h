// NCCL found and opened at run time: nothing here is linked against it, and no CUDA is needed to open it.
#pragma once

#include <string>
#include <vector>

#include "comm/nccl_api.h"
#include "common/status.h"

namespace tpk::nccl {

constexpr int kMinimumVersion = 21800;  // NCCL_VERSION_CODE of 2.18.0

struct Library {
  Functions call{};
  int version = 0;     // NCCL_VERSION_CODE
  std::string path;    // the file, symbolic links resolved
  std::string source;  // how it was found, in words
};

// The process's NCCL, opened on the first call and kept. Looked for in TP_KERNELS_NCCL_PATH (a file; nothing else is
// tried when it is set), among the libraries already loaded, at `hint` (a file; may be empty), and where the system
// looks. The first one that is there is taken; one that is too old or lacks a function is an error. Failures are not
// kept.
Status load_library(const std::string& hint, const Library** library);

// Files libnccl.so* mapped into this process, each once: more than one copy corrupts both.
std::vector<std::string> mapped_libraries();

// "2.30.7" from 23007.
std::string version_text(int version);

}  // namespace tpk::nccl
