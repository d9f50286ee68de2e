"""One compiled graph per schedule, equal to eager, in training too."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from tiny import images, ours, randomise
from torch._dynamo.backends.registry import lookup_backend

from models import MergeConfig, create_model


def counting_backend(graphs: list[Any]) -> Callable[..., Any]:
    """aot_eager, which traces forward and backward without a code generator, and remembers what it is given."""
    aot_eager = lookup_backend("aot_eager")

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    return backend


def test_compiled_model_is_one_graph_per_schedule_and_equals_eager() -> None:
    torch._dynamo.reset()
    model = create_model("deit_digits", num_registers=4, merge=MergeConfig(r=8), register_layer=1, depth=2)
    randomise(model).eval()
    graphs: list[Any] = []
    compiled = torch.compile(model, backend=counting_backend(graphs), fullgraph=True)

    # several plain ints: the compiler must not make one graph with a symbolic number of tokens of them
    schedules = (None, 6, 4, 5, "(6,-1)")
    for count, r in enumerate(schedules, start=1):
        for seed in (1, 2, 3):  # batches of one shape share a graph
            x = images(2, seed=seed)
            with torch.no_grad():
                torch.testing.assert_close(compiled(x, r=r), model(x, r=r), rtol=1e-5, atol=1e-5)
        assert len(graphs) == count, f"{len(graphs)} graphs after {count} schedules"
    for r in schedules:  # going back to a schedule compiles nothing
        with torch.no_grad():
            compiled(images(2), r=r)
    assert len(graphs) == len(schedules)

    model.train()
    gradients = []
    for forward in (model, compiled):
        model.zero_grad()
        forward(images(2)).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert len(graphs) == len(schedules) + 1
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("merge", "training"),
    [
        pytest.param({"method": "mctf", "r": 3, "min_tokens": 4}, True, id="mctf"),
        pytest.param({"method": "mctf", "r": 3, "min_tokens": 4, "pooling": "max"}, False, id="mctf-max"),
        pytest.param({"method": "lgtm", "r": 1, "dense_layers": 0, "global_layer": 0}, False, id="lgtm"),
    ],
)
def test_every_method_is_one_graph_for_any_batch(merge: dict[str, Any], training: bool) -> None:
    torch._dynamo.reset()
    model = ours(MergeConfig(**merge), num_registers=2, depth=2).train(training)
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph  # what is asked is whether tracing goes through

    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for batch in (2, 5):
        torch.testing.assert_close(compiled(images(batch)), model(images(batch)), rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1
