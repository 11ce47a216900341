// Statuses of ONNX Runtime's, which are its errors, and ours.
#pragma once

#include <exception>
#include <string>

#include "error.h"
#include "ort_api.h"

namespace na {

// OrtErrorCode.
constexpr int kFail = 1;

// Throws what a status says, and releases it.
inline void check(const Api& api, OrtStatus* status) {
  if (status == nullptr) return;
  std::string message = api.GetErrorMessage(status);
  api.ReleaseStatus(status);
  throw Error(message);
}

inline bool succeeds(const Api& api, OrtStatus* status) {
  if (status == nullptr) return true;
  api.ReleaseStatus(status);
  return false;
}

// Runs something that may throw; returns the status of it.
template <typename Body>
OrtStatus* guarded(const Api& api, const std::string& where, Body body) {
  std::string message;
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
  } catch (...) {
    message = "an unknown error";
  }
  return api.CreateStatus(kFail, ("na_compiler: " + where + message).c_str());
}

}  // namespace na
