"""What families of kernels share: configs, candidates, and, on tensor cores, places, masks and the softmax."""
