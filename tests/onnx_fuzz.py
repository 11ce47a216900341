"""Runs random nodes through the operator library: what it accepts it must compute right, the rest it must refuse.

Arguments: bundle, seed, count. A process of its own, so that a crash is a test that fails. Prints how many nodes ran
and how many were refused.
"""

from __future__ import annotations

import random
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx_models import session

from na_compiler.onnx import DOMAIN, reference_ops, register
from na_compiler.onnx.signature import INPUTS

# Values that overflow, wrap or divide by zero where something is not checked.
NUMBERS = [-(2**63), -1, 0, 1, 2, 3, 4, 7, 2**31, 2**32 + 3, 2**62, 2**63 - 1]
TYPES = {
    onnx.TensorProto.FLOAT: "f4",
    onnx.TensorProto.FLOAT16: "f2",
    onnx.TensorProto.DOUBLE: "f8",
    onnx.TensorProto.INT64: "i8",
}
# A node that the bundle has a kernel for.
GOOD = {"kernel_size": [3, 4], "stride": [2, 1], "dilation": [1, 2], "is_causal": [0, 1]}
SHAPES = [[2, 8, 9, 4, 8], [2, 8, 9, 2, 8], [2, 8, 9, 2, 8]]


def attribute():
    kind = random.random()
    if kind < 0.7:
        return [random.choice(NUMBERS) for _ in range(random.choice([1, 2, 2, 2, 3, 5]))]
    return random.choice([3, -1, 2.5, float("nan"), float("inf"), "text", "", [1.5, 2.5], ["a", "b"]])


def node(generator):
    """Return a model that is good but for a few random changes, and inputs for it."""
    attributes = dict(GOOD)
    shapes = [list(shape) for shape in SHAPES]
    types = [onnx.TensorProto.FLOAT] * 5
    operator = "NA2D"
    shapes += [[2, 3, 2, 8], [2, 3, 2, 8]] if random.random() < 0.2 else []
    for _ in range(random.choice([0, 1, 1, 1, 2, 3])):
        change = random.randrange(6)
        name = random.choice([*GOOD, "scale", "unknown"])
        shape = random.choice(shapes)
        if change == 0:
            attributes[name] = attribute()
        elif change == 1:
            attributes.pop(name, None)
        elif change == 2:
            shape[random.randrange(len(shape))] = random.choice([0, 1, 2, 3, 4, 8, 9, 17])
        elif change == 3:
            shape.pop(random.randrange(len(shape))) if random.random() < 0.5 and len(shape) > 1 else shape.append(2)
        elif change == 4:
            types[random.randrange(5)] = random.choice(list(TYPES))
        else:
            operator = random.choice(["NA1D", "NA2D", "NA3D"])
    names = list(INPUTS[: len(shapes)])
    if random.random() < 0.1:
        names.pop()
    used = [name if random.random() < 0.98 else "" for name in names]
    outputs = ["output", "lse"][: random.choice([1, 2])]
    made = helper.make_node(operator, used, outputs, domain=DOMAIN, **attributes)
    declared = random.random() < 0.5
    inputs = [
        helper.make_tensor_value_info(name, element, shape if declared else None)
        for name, element, shape in zip(names, types, shapes, strict=False)
    ]
    results = [
        helper.make_tensor_value_info(name, types[0] if name == "output" else onnx.TensorProto.FLOAT, None)
        for name in outputs
    ]
    imports = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(helper.make_graph([made], "g", inputs, results), opset_imports=imports, ir_version=10)
    values = {
        name: generator.standard_normal(shape).astype(TYPES[element])
        for name, element, shape in zip(names, types, shapes, strict=False)
    }
    return model, values


def main(bundle: str, seed: str, count: str) -> None:
    random.seed(int(seed))
    generator = np.random.default_rng(int(seed))
    ran = refused = 0
    for _ in range(int(count)):
        model, values = node(generator)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        register(options, bundle)
        try:
            made = session(model, options)
            results = made.run(None, values)
        except Exception as error:  # ONNX Runtime has a class for each code.
            if not str(error).strip():
                raise RuntimeError(f"refused without a word: {model}") from error
            refused += 1
            continue
        ran += 1
        known = [attribute for attribute in model.graph.node[0].attribute if attribute.name != "unknown"]
        del model.graph.node[0].attribute[:]
        model.graph.node[0].attribute.extend(known)  # onnx's evaluator refuses the other one.
        expected = ReferenceEvaluator(model, new_ops=reference_ops()).run(None, values)
        for result, reference in zip(results, expected, strict=True):
            assert np.allclose(result, reference, rtol=1e-2, atol=1e-2), f"wrong: {model}"
    print(ran, refused)


if __name__ == "__main__":
    main(*sys.argv[1:])
