/* Runs the parallel loops of kernels on a thread pool of the host.
 *
 * A kernel hands its loop to the function in the slot __TVMBackendParallelLaunch of its library. The host puts
 * na_compiler_launch there and tells it, with na_compiler_use_pool, two functions of its own pool: one that runs a
 * callback over a range, and one that says how many threads there are.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

/* Layout of TVM's TVMParallelGroupEnv (tvm/runtime/c_backend_api.h). */
typedef struct {
  void* sync_handle;
  int32_t num_task;
} Environment;

typedef int (*Loop)(int task, Environment* environment, void* data);
typedef void (*Callback)(int64_t begin, int64_t end, void* context);
typedef int (*ParallelFor)(int64_t begin, int64_t end, int64_t grain, Callback callback, void* context);
typedef int (*ThreadCount)(uint32_t* count);

typedef struct {
  Loop loop;
  void* data;
  int32_t tasks;
  atomic_int next;
  atomic_int error;
} Launch;

/* Parts of the loop for each thread: a core that is busy with something else then takes fewer of them. The parts are
 * only ranges of iterations, so how many there are changes nothing in the results. */
enum { PARTS_PER_THREAD = 4 };

static ParallelFor pool_run;
static ThreadCount pool_threads;
static int is_forked;

/* A forked child has no threads but the one that forked, and OpenMP would wait for the others for ever. */
static void after_fork(void) { is_forked = 1; }

__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(0, 0, after_fork); }

void na_compiler_use_pool(ParallelFor run, ThreadCount threads) {
  pool_run = run;
  pool_threads = threads;
}

static void work(int64_t begin, int64_t end, void* context) {
  (void)begin;
  (void)end;
  Launch* launch = context;
  Environment environment = {0, launch->tasks};
  for (;;) {
    int task = atomic_fetch_add_explicit(&launch->next, 1, memory_order_relaxed);
    if (task >= launch->tasks) return;
    int error = launch->loop(task, &environment, launch->data);
    if (error) atomic_store(&launch->error, error);
  }
}

int na_compiler_launch(Loop loop, void* data, int tasks) {
  uint32_t threads = 1;
  (void)tasks;
  if (is_forked || pool_threads == 0 || pool_threads(&threads) != 0 || threads == 0) threads = 1;
  Launch launch;
  launch.loop = loop;
  launch.data = data;
  launch.tasks = threads == 1 ? 1 : (int32_t)threads * PARTS_PER_THREAD;
  atomic_init(&launch.next, 0);
  atomic_init(&launch.error, 0);
  if (threads == 1 || pool_run(0, threads, 1, work, &launch) != 0) work(0, 1, &launch);
  return atomic_load(&launch.error);
}
