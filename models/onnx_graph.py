"""An exported ONNX graph as other tools want it: weights as weights, shapes that are known as numbers, nothing stale.

torch's exporter leaves three things behind. Slices of a weight stay in the graph (MCTF computes q and k of all tokens,
v of those that are left), so that quantisers take the product for one of two activations and leave it alone. Lengths
that do not depend on the batch are computed from shapes. And types are stored twice for weights, so that a tool that
transposes a weight leaves a wrong one behind, at which onnxruntime's quantiser stops.
"""

from typing import Any

import numpy as np

FOLDED = 2**28  # numbers of a folded tensor at most: any slice of a weight


def simplify(model: Any) -> None:
    """Fold what is constant in an `onnx_ir.Model`, in place; outputs do not change.

    Args:
        model: as torch.onnx.export makes it, `program.model`.
    """
    import onnx_ir.passes.common as passes  # comes with onnxscript
    from onnxscript import ir, optimizer, rewriter
    from onnxscript.rewriter.rules.common import reshape_reshape_rule

    fold_known_lengths(model, ir)
    rewriter.rewrite(model, pattern_rewrite_rules=[reshape_reshape_rule])
    optimizer.fold_constants(model, onnx_shape_inference=False, input_size_limit=FOLDED, output_size_limit=FOLDED)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.CommonSubexpressionEliminationPass()(model)
    optimizer.remove_unused_nodes(model)
    for value in model.graph.initializers.values():  # the tensor itself says both
        value.type = value.shape = None
        value.metadata_props.clear()


def fold_known_lengths(model: Any, ir: Any) -> None:
    """Replace lengths that are read from a shape, but do not depend on the batch, by numbers."""
    for node in list(model.graph):
        if node.op_type != "Gather" or node.inputs[0].producer() is None:
            continue
        shape, index = node.inputs[0].producer(), node.inputs[1].const_value
        known = shape.inputs[0].shape if shape.op_type == "Shape" and not shape.attributes.get_int("start", 0) else None
        if known is None or index is None or index.size != 1:
            continue
        length = known[int(index.numpy().item())]
        if isinstance(length, int):
            value = ir.tensor(
                np.full(index.shape.numpy(), length, dtype=np.int64), name=f"{node.outputs[0].name}_known"
            )
            constant = ir.node("Constant", [], attributes={"value": value})
            model.graph.insert_before(node, constant)
            ir.convenience.replace_all_uses_with(node.outputs[0], constant.outputs[0])
