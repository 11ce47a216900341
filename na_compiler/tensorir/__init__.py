"""What the families of kernels share, in TensorIR: arithmetic, blocks, axes."""
