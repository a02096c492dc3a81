"""Makes the modules leaves of a `torch.fx` graph, as `nn.RNN` and `nn.RNNCell` are.

By default a tracer treats only modules of the package `torch.nn` as leaves. The tracer traces into
every other module by calling the module with proxies instead of tensors.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Proxy, Tracer


def make_leaves(*classes: type[torch.nn.Module]) -> None:
    """Makes tracers record each call to a module of exactly these classes as one node."""
    original = Tracer.call_module

    @functools.wraps(original)
    def call_module(
        self: Tracer,
        m: torch.nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        # Without proxies, `self` is a different tracer, such as torch.export's.
        proxied = any(isinstance(value, Proxy) for value in (*args, *kwargs.values()))
        if proxied and type(m) in classes:
            path = self.path_of_module(m)

            def forward(*args: Any, **kwargs: Any) -> Proxy:
                return self.create_proxy("call_module", path, args, kwargs)  # type: ignore[no-any-return,unused-ignore]

        return original(self, m, forward, args, kwargs)

    Tracer.call_module = call_module  # type: ignore[method-assign]
