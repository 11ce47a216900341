"""Kernels for CUDA cores, of every GPU: one query, or one key, at a time, by a few threads."""
