"""One compiled graph per schedule, equal to eager, in training too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed
from tiny import every_method, images, ours, randomise
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from models import MergeConfig, create_model
from utils import compile_model


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


@pytest.mark.filterwarnings("ignore:r=.* is more than")
@pytest.mark.parametrize("merge", every_method(2, 2, choices=False))
def test_every_method_is_one_graph_for_any_batch_in_training_and_evaluation(merge: MergeConfig) -> None:
    torch._dynamo.reset()
    counters.clear()
    model = ours(merge, num_registers=2, depth=2)
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph  # what is asked is whether tracing goes through

    compiled = torch.compile(model, backend=backend, dynamic=True)
    for modes, training in enumerate((False, True), start=1):
        model.train(training)
        for batch in (2, 5, 3):
            torch.testing.assert_close(compiled(images(batch)), model(images(batch)), rtol=1e-5, atol=1e-5)
        assert len(graphs) == modes
    assert not counters["graph_break"], counters["graph_break"]


def test_more_schedules_than_the_compiler_keeps_graphs_of_by_itself() -> None:
    torch._dynamo.reset()
    model = ours(MergeConfig(r=0), depth=2).eval()
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph

    compiled = compile_model(model, backend=backend)
    schedules = [None, 1, 2, 3, 4, 5, "(1,-1)", "(2,-1)", "(3,-1)", "(4,-1)", "(5,-1)"]
    assert len({model.plan(r).counts for r in schedules}) > 8
    for r in schedules:
        compiled(images(2), r=r)
    assert len(graphs) == len(schedules)


def test_training_under_ddp_is_one_graph_too(tmp_path: Path) -> None:
    """As the trainer wraps a model: DistributedDataParallel around the compiled module."""
    torch._dynamo.reset()
    counters.clear()
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        model, plain = (ours(MergeConfig(r=3), num_registers=2, depth=2).train() for _ in range(2))
        graphs: list[Any] = []
        wrapped = DistributedDataParallel(compile_model(model, backend=counting_backend(graphs)))
        for seed in (1, 2, 3):
            for forward in (wrapped, plain):
                forward(images(2, seed=seed)).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert len(graphs) == 1 and not counters["graph_break"], counters["graph_break"]
    for (name, own), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=name)
