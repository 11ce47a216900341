/* What a program without Python calls of libna_compiler_torch.so, beside torch's own functions. */
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

/* Adds a bundle, which na-compile wrote, to those in which torch.ops.na_compiler looks for kernels; the last one comes
 * first. Returns 0, or -1 and a reason in na_compiler_last_error(). The folders that the environment variable
 * NA_COMPILER_BUNDLE names, with colons between them, are added when a kernel is first needed.
 *
 * A bundle is native code: to load one is to trust whoever made it. */
int na_compiler_load_bundle(const char* folder);

/* Why the last call on this thread failed. */
const char* na_compiler_last_error(void);

#ifdef __cplusplus
}
#endif
