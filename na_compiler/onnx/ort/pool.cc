#include "pool.h"

#include <algorithm>
#include <atomic>
#include <thread>

namespace na {
namespace {

// Who runs a kernel on this thread; null outside of it.
thread_local OrtKernelContext* current_context = nullptr;
thread_local const Api* current_api = nullptr;
// The launcher that was there before ours. The library of a kernel is one to a process: where torch runs kernels from
// it as well, those keep the launcher that they had.
std::atomic<Launcher> other_launcher{nullptr};

struct Launch {
  Loop loop;
  void* data;
  Environment environment;
  std::atomic<int> error;
};

void run_task(void* context, size_t task) {
  auto launch = static_cast<Launch*>(context);
  int error = launch->loop(static_cast<int>(task), &launch->environment, launch->data);
  if (error) launch->error.store(error);
}

// Into how many parts a loop is cut. The pool does not say how many threads it has; parts are only ranges of
// iterations, so their number changes nothing in the results, and a thread takes the next one when it is done.
int parts() {
  static const int count = 4 * static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  return count;
}

int launch_on_session_pool(Loop loop, void* data, int tasks) {
  OrtKernelContext* context = current_context;
  if (context == nullptr) {
    if (Launcher other = other_launcher.load()) return other(loop, data, tasks);
    Environment alone{nullptr, 1};
    return loop(0, &alone, data);
  }
  Launch launch{loop, data, {nullptr, parts()}, {0}};
  const Api* api = current_api;
  OrtStatus* status = api->KernelContext_ParallelFor(context, run_task, static_cast<size_t>(parts()), 0, &launch);
  if (status != nullptr) {
    api->ReleaseStatus(status);
    return -1;
  }
  return launch.error.load();
}

void take_over(void** slot) {
  void* ours = reinterpret_cast<void*>(&launch_on_session_pool);
  void* there = __atomic_load_n(slot, __ATOMIC_RELAXED);
  if (there == ours) return;
  other_launcher.store(reinterpret_cast<Launcher>(there));
  __atomic_store_n(slot, ours, __ATOMIC_RELEASE);
}

}  // namespace

OnSessionPool::OnSessionPool(const Api& api, OrtKernelContext* context, const Function& function)
    : context_before_(current_context), api_before_(current_api) {
  if (function.parallel_launch != nullptr) take_over(function.parallel_launch);
  current_context = context;
  current_api = &api;
}

OnSessionPool::~OnSessionPool() {
  current_context = context_before_;
  current_api = api_before_;
}

}  // namespace na
