"""TiRex-2, which forecasts time series with sLSTM layers. Its recurrence is a cell by equation."""

import copy
import time
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases.case import COMPILED, FUSED, TORCH, Calls, Case
from namernn_fast import slstm
from namernn_fast.bench.race import timed

CONTEXT, HORIZON, PATCH = 2048, 64, 32
SIZE, HEADS, BLOCKS = 512, 4, 12
SLSTM_BLOCK = {
    "time_mixer": {
        "model_type": "bi-slstm",
        "embedding_dim": SIZE,
        "num_heads": HEADS,
        "num_slstm_heads": HEADS,
    },
    "variate_mixer": {"embedding_dim": SIZE, "num_heads": HEADS},
    "dropout": 0.0,
    "eps": 1e-6,
}
"""A block whose recurrence runs in both directions."""

Recurrence = Callable[..., tuple[Tensor, Tensor]]
"""A replacement of the method `recurrence` of TiRex-2's sLSTM layers."""


def fused(layer: Any, Wx: Tensor, states: Tensor | None = None) -> tuple[Tensor, Tensor]:  # noqa: N803
    """Runs the recurrence as docs/guides/slstm.md says."""
    shapes = {"recurrent_shape": "HPGD", "bias_shape": "HGD"}
    h, last_states = slstm(Wx, layer.get_R(), layer.get_bias(), states, **shapes)
    return h.unsqueeze(0), last_states


def precise(layer: Any, Wx: Tensor, states: Tensor | None = None) -> tuple[Tensor, Tensor]:  # noqa: N803
    """Runs the package's own recurrence in float64."""
    R, b = layer.get_R().double(), layer.get_bias().double()  # noqa: N806
    states = None if states is None else states.double()
    h, last_states = layer.slstm_flashrnn(Wx.double(), R, b, layer.config, states)
    return h.to(Wx.dtype), last_states.to(Wx.dtype)


class Forecast(Case):
    """A forecast of one series. The package's rivals are its loop in Python, eager and compiled."""

    def with_recurrence(self, recurrence: Recurrence) -> nn.Module:
        """Returns a copy of the model whose sLSTM layers run `recurrence`."""
        model = copy.deepcopy(self.module)
        for layer in model.modules():
            if hasattr(layer, "slstm_flashrnn"):
                layer.recurrence = types.MethodType(recurrence, layer)
        return model

    def calls(self) -> Calls:
        """Returns the package's own forecast, eager and compiled, and ours."""
        compiled: Any = copy.deepcopy(self.module)
        compiled.forward = torch.compile(compiled.forward)
        models = {TORCH: self.module, COMPILED: compiled, FUSED: self.with_recurrence(fused)}
        return {name: partial(self.run, model) for name, model in models.items()}

    def exact(self) -> Tensor:
        return self.run(self.with_recurrence(precise))

    def share(self) -> float:
        """Returns the fraction of a forecast's time that the package spends in the recurrence."""
        inside = 0.0

        def measured(layer: Any, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
            nonlocal inside
            started = time.perf_counter()
            result = type(layer).recurrence(layer, *args, **options)
            inside += time.perf_counter() - started
            return result

        model = self.with_recurrence(measured)
        whole = timed(lambda: self.run(model))
        return inside / whole


def tirex() -> Iterator[Case]:
    """Yields a forecast with random weights, because the package downloads its weights.

    The model is as large as TiRex-2's first one, with bidirectional blocks only.
    """
    from tirex2.model.tirex2 import TiRex2
    from tirex2.model.types import TimeseriesType

    torch.manual_seed(0)
    patches = {"input_patch_size": PATCH, "output_patch_size": PATCH}
    model = TiRex2(
        stack_config={"templates": {"slstm": SLSTM_BLOCK}, "recipe": ["slstm"] * BLOCKS},
        num_blocks=BLOCKS,
        embedding_dim=SIZE,
        quantiles=[q / 10 for q in range(1, 10)],
        tokenizer_cfg={**patches, "input_patch_stride": PATCH},
        **patches,
        scaler_cfg={},
        h_expand=4,
        context_len=CONTEXT,
        future_len=HORIZON,
        input_ff_dim=2 * SIZE,
        act_func="ReLU",
        dropout=0.0,
        device="cpu",
    ).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("_recurrent_kernel_"):  # starts at zero
            nn.init.uniform_(parameter, -0.05, 0.05)
    walk = torch.randn(1, CONTEXT).cumsum(1)
    series = TimeseriesType(target=walk, past_covariates=None, future_covariates=None)
    yield Forecast(
        f"a forecast from {CONTEXT:,} values",
        f"{BLOCKS} two-way sLSTMs of {SIZE}",
        str((1, CONTEXT)),
        model,
        lambda model: model.predict([series], HORIZON)[0],
    )
