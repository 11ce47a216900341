"""Kernels on the tensor cores of single warps (mma.sync), for GPUs from sm_80 on and for small windows."""
