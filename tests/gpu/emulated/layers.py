"""Test layers that cover every kind of default plan, every dtype and both passes."""

from dataclasses import dataclass, field, replace

import torch
from drawn import LUCKY, Drawn
from tf32 import Rounded, check_results

from namernn_fast.gpu.device import Device
from namernn_fast.gpu.plan import Plan, Size, choose
from namernn_fast.testing import ErrorBudget
from tools.ptx.driver import DEVICES


@dataclass(frozen=True)
class Layer:
    """A layer with its input, its plan and the GPU that runs it."""

    arch: int
    kind: str
    """The kind of the layer's plan."""
    dtype: str
    """The name of a torch dtype, or `TF32`."""
    H: int
    B: int
    T: int = 4
    layout: str = "dense"
    options: dict = field(default_factory=dict)
    resets: float = 0.0
    vocabulary: int = 0
    with_hx: bool = True
    processors: int | None = None
    """Number of processors, to model a small GPU or a partition of a large GPU."""

    def __str__(self) -> str:
        return f"sm_{self.arch} {self.kind} {self.dtype} H{self.H} B{self.B} {self.layout}"

    @property
    def device(self) -> Device:
        """The GPU that the layer runs on."""
        device = DEVICES[self.arch]
        return device._replace(processors=self.processors) if self.processors else device

    @property
    def plan(self) -> Plan:
        """The plan that the package chooses for this layer."""
        directions = 1 + self.options.get("bidirectional", False)
        tf32 = self.dtype == "TF32"
        return choose(Size(self.H, self.B, self.case.dtype, self.device, directions, tf32))

    @property
    def case(self) -> Drawn:
        """The layer's random weights and inputs."""
        return replace(
            LUCKY,
            **{"D": 5, "H": self.H, "T": self.T, "B": self.B, "layout": self.layout},
            **{"with_hx": self.with_hx, "vocabulary": self.vocabulary, "resets": self.resets},
            options=LUCKY.options | {"num_layers": 1} | self.options,
            dtype=torch.float32 if self.dtype == "TF32" else getattr(torch, self.dtype),
            values="ordinary",
        )

    def check(self) -> None:
        """Runs the layer forward and backward, and checks that results meet the error budget."""
        if self.dtype == "TF32":
            check_results(str(self), 5, self.H, self.B, Rounded.apply, Rounded.apply)
            return
        case, forward, backward = self.case, *(ErrorBudget(self.case.dtype) for _ in range(2))
        case.compare(forward, backward)
        forward.check()
        if backward.results:
            backward.check()


TWO_DIRECTIONS = {"bidirectional": True}
TWO_LAYERS = {"num_layers": 2, "batch_first": True, "bias": False}
RELU = {"nonlinearity": "relu", "batch_first": True}
LAYERS = [
    # Layers that run on CUDA cores.
    Layer(80, "resident", "float32", 33, 5, layout="lengths", options=TWO_DIRECTIONS, resets=0.3),
    Layer(120, "resident", "float32", 128, 2, layout="jagged", options=RELU, vocabulary=7),
    Layer(80, "cooperative", "float32", 200, 3, layout="packed", options=TWO_LAYERS),
    Layer(90, "cooperative", "float32", 256, 3, layout="lengths", vocabulary=7, with_hx=False),
    Layer(80, "streamed", "float32", 500, 5, layout="lengths", resets=0.2, processors=4),
    Layer(80, "resident", "float32", 33, 3, options=TWO_DIRECTIONS),
    Layer(80, "streamed", "float32", 160, 5, options=RELU, processors=2),
    # Layers that run on tensor cores.
    Layer(80, "resident", "TF32", 33, 5),
    Layer(120, "cooperative", "TF32", 256, 17),
    Layer(90, "streamed", "TF32", 300, 40, processors=8),
    Layer(90, "resident", "bfloat16", 64, 19, layout="packed unsorted", options=TWO_DIRECTIONS),
    Layer(120, "resident", "float16", 100, 3, layout="jagged", options=RELU),
    Layer(80, "cooperative", "float16", 300, 5, layout="lengths", vocabulary=7),
    Layer(90, "cooperative", "bfloat16", 384, 5, layout="packed", options=TWO_LAYERS, resets=0.3),
    Layer(90, "streamed", "float16", 300, 5, layout="lengths", options=RELU, processors=4),
    Layer(90, "streamed", "bfloat16", 300, 40, processors=8),
]
