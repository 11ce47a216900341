/* Stands in for CUDA's runtime library, libcudart.so.13, in the process that compiles kernels, as libcuda.c does for the
 * driver: TVM's own part for CUDA is linked against both, and nvcc has no runtime library beside it where it is a link,
 * a script, or of another toolkit. Nothing here is called but to count devices: there are none.
 */
enum { NO_DEVICE = 100 }; /* cudaErrorNoDevice */

static const char* text(void) { return "no device: this is the compiler's stand-in for CUDA's runtime"; }
const char* cudaGetErrorName(int error) { return (void)error, text(); }
const char* cudaGetErrorString(int error) { return (void)error, text(); }

#define NONE(name) \
  int name(void) { return NO_DEVICE; }
NONE(cudaDeviceGetAttribute)
NONE(cudaEventCreate)
NONE(cudaEventDestroy)
NONE(cudaEventElapsedTime)
NONE(cudaEventRecord)
NONE(cudaEventSynchronize)
NONE(cudaFree)
NONE(cudaFreeHost)
NONE(cudaGetDevice)
NONE(cudaGetDeviceCount)
NONE(cudaGetDeviceProperties)
NONE(cudaGetLastError)
NONE(cudaGraphDestroy)
NONE(cudaGraphExecDestroy)
NONE(cudaGraphInstantiate)
NONE(cudaGraphLaunch)
NONE(cudaMalloc)
NONE(cudaMallocHost)
NONE(cudaMemGetInfo)
NONE(cudaMemcpyAsync)
NONE(cudaMemcpyPeerAsync)
NONE(cudaPeekAtLastError)
NONE(cudaSetDevice)
NONE(cudaStreamBeginCapture)
NONE(cudaStreamCreate)
NONE(cudaStreamCreateWithFlags)
NONE(cudaStreamDestroy)
NONE(cudaStreamEndCapture)
NONE(cudaStreamSynchronize)
NONE(cudaStreamWaitEvent)
