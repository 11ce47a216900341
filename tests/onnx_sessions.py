"""Sessions of ONNX Runtime with the operator library, for its tests: bundles, options, and what a refusal says."""

import json

import numpy as np
import onnxruntime
import pytest
from onnx_models import session

import na_compiler
from na_compiler.onnx import register
from na_compiler.problem import Problem
from na_compiler.runtime.bundle import MANIFEST
from na_compiler.runtime.manifest import digest_of

SMALL = Problem((8, 9), 4, 8, (3, 4), (2, 1), (1, 2), (False, True), heads_kv=2)


def make_bundle(folder, problems):
    na_compiler.save_bundle(folder, [na_compiler.KernelSpec.make(problem) for problem in problems])
    return folder


def options_for(bundle, threads=2):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # Errors are raised as well.
    options.intra_op_num_threads = threads
    register(options, bundle)
    return options


def open_session(model, bundle, threads=2):
    return session(model, options_for(bundle, threads))


def refused(said):
    return pytest.raises(Exception, match=said)  # ONNX Runtime has an exception class for each code.


def edit_manifest(folder, edit):
    """Change a manifest's text, and what guards against that."""
    path = folder / MANIFEST
    manifest = json.loads(edit(path.read_text()))
    manifest["digest"] = digest_of(manifest)
    path.write_text(json.dumps(manifest))


def misaligned(array):
    memory = np.zeros(array.size + 1, array.dtype)
    memory[1:] = array.ravel()
    moved = memory[1:].reshape(array.shape)
    assert moved.ctypes.data % 16
    return moved
