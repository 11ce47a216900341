// Parallel loops of kernels on the thread pool of the session that runs them.
#pragma once

#include "ort_api.h"
#include "tvm.h"

namespace na {

// As long as it lives, the loops of a function that this thread calls run on the pool of the session that the context
// belongs to.
class OnSessionPool {
 public:
  OnSessionPool(const Api& api, OrtKernelContext* context, const Function& function);
  ~OnSessionPool();
  OnSessionPool(const OnSessionPool&) = delete;
  OnSessionPool& operator=(const OnSessionPool&) = delete;

 private:
  OrtKernelContext* context_before_;
  const Api* api_before_;
};

}  // namespace na
