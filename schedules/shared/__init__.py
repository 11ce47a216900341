"""What the families of kernels share: what a config and a candidate are."""
