// Status codes: nothing in the core throws; every entry point returns one of these with a message.
#pragma once

#include <string>
#include <utility>

namespace tpk {

enum class Code : int {
  kOk = 0,
  kInvalidArgument = 1,
  kTimeout = 2,
  kPeerDied = 3,
  kMismatch = 4,
  kAborted = 5,
  kNoSpace = 6,
  kSystem = 7,
  kCuda = 8,
  kInterrupted = 9,  // a Python signal handler raised; the binding rethrows that exception
};

struct Status {
  Code code = Code::kOk;
  std::string message;

  bool ok() const { return code == Code::kOk; }
  static Status Ok() { return {}; }
  static Status Error(Code code, std::string message) { return {code, std::move(message)}; }
};

}  // namespace tpk
