"""The backward on the tensor cores of single warps: a kernel over tiles of queries, and one over tiles of keys."""
