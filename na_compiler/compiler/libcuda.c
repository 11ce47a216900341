/* Stands in for NVIDIA's driver, libcuda.so.1, in the process that compiles kernels.
 *
 * TVM writes machine code into a library only where its CUDA runtime loads, and that is linked against the driver,
 * which a machine without a GPU does not have. Nothing here is called while compiling; should it be, it says that
 * there is no device.
 */
enum { NO_DEVICE = 100 }; /* CUDA_ERROR_NO_DEVICE */

int cuDeviceGetName(char* name, int length, int device) {
  (void)device;
  if (length > 0) name[0] = '\0';
  return NO_DEVICE;
}
static int text(const char** result) {
  *result = "no device: this is the compiler's stand-in for the driver";
  return 0;
}
int cuGetErrorName(int error, const char** name) { return (void)error, text(name); }
int cuGetErrorString(int error, const char** message) { return (void)error, text(message); }
int cuFuncSetAttribute(void) { return NO_DEVICE; }
int cuLaunchKernelEx(void) { return NO_DEVICE; }
int cuModuleGetFunction(void) { return NO_DEVICE; }
int cuModuleLoadData(void) { return NO_DEVICE; }
int cuModuleUnload(void) { return NO_DEVICE; }
int cuTensorMapEncodeTiled(void) { return NO_DEVICE; }
