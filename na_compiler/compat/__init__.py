"""Names of other libraries that mean ours: `na_compiler.compat.natten`."""
