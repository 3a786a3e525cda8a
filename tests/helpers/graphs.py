"""Counts of the graphs that torch.compile makes, without generating code."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters


@contextmanager
def counted_graphs() -> Iterator[Counter[str]]:
    """Class name -> graphs of each module that is compiled in the body; "breaks" counts graph breaks.

    The graphs run as they are, in eager mode.
    """
    graphs = Counter[str]()

    def compile_and_count(module: torch.nn.Module, **options: Any) -> None:
        def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
            graphs[type(module).__name__] += 1
            return graph.forward

        module._compiled_call_impl = torch.compile(module._call_impl, backend=backend, **options)  # type: ignore

    torch._dynamo.reset()
    counters.clear()
    with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        patch.setattr(torch.nn.Module, "compile", compile_and_count)
        yield graphs
        graphs["breaks"] = sum(counters["graph_break"].values())
    torch._dynamo.reset()
