"""Kernels for CPUs: queries in the lanes of vectors, keys staged in boxes that a strip of queries shares."""
