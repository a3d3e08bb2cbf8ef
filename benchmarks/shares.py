"""What share of a call's time which operators take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

# PyTorch's matrix products: the projections of a layer, forward and backward.
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear"}


def shares(function: Callable[[], object], repeats: int = 7) -> dict[str, float]:
    """Shares of the time on the CPU: matrix products, torch_spe's operators, the rest.

    The rest is everything else that passes on the clock: other operators, Python, the autograd
    engine. Medians over the repeats.
    """
    function()
    found: dict[str, list[float]] = {"products": [], "torch_spe": []}
    for _ in range(repeats):
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
            begin = time.perf_counter()
            function()
            seconds = time.perf_counter() - begin
        products = ours = 0.0
        for event in profiler.key_averages():
            if event.key in PRODUCTS:
                products += event.self_cpu_time_total
            elif event.key.startswith("torch_spe::"):
                ours += event.self_cpu_time_total
        found["products"].append(products / 1e6 / seconds)
        found["torch_spe"].append(ours / 1e6 / seconds)
    result = {name: statistics.median(values) for name, values in found.items()}
    result["rest"] = 1 - sum(result.values())
    return result
