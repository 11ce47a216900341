"""Loading and calling compiled kernels: needs apache-tvm-ffi and TVM's runtime library, not the compiler."""
