"""Image models: kraken finds the lines of text on a page, and EasyOCR reads them."""

import logging
import runpy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.cases.case import Case, above_half, best_of, load
from benchmarks.cases.packages import FOLDER

CONVOLUTIONS = ((64, 7, 2), (128, 3, 2), (128, 3, 1), (256, 3, 1), (256, 3, 1))
"""Channels, kernel size and stride of the convolutions before the recurrent layers."""


class Lines(nn.Module):
    """The network of kraken: convolutions, and LSTMs along the rows or the columns of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.before, channels = nn.Sequential(), 3
        for to, kernel, stride in CONVOLUTIONS:
            self.before.extend(block(channels, to, kernel, stride))
            channels = to
        self.rows_1, self.columns_1 = reader(256), reader(64)
        self.between = nn.Sequential(*block(64, 32, 1, 1))
        self.columns_2, self.rows_2 = reader(32), reader(64)
        self.head = nn.Conv2d(64, 4, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Returns the probabilities of four kinds of pixels, for an image (1, 3, height, width)."""
        x = read_rows(self.rows_1, self.before(image))
        x = self.between(read_columns(self.columns_1, x))
        return self.head(read_rows(self.rows_2, read_columns(self.columns_2, x))).sigmoid()


def block(channels: int, to: int, kernel: int, stride: int) -> list[nn.Module]:
    """Returns a convolution with its activation and normalisation."""
    return [
        nn.Conv2d(channels, to, kernel, stride, kernel // 2),
        nn.ReLU(),
        nn.GroupNorm(32, to),
    ]


def reader(channels: int) -> nn.LSTM:
    """Returns an LSTM that reads pixels in both directions."""
    return nn.LSTM(channels, 32, batch_first=True, bidirectional=True)


def read_rows(layer: nn.Module, image: Tensor) -> Tensor:
    """Runs a layer along the rows of an image (1, channels, height, width)."""
    return layer(image[0].permute(1, 2, 0))[0].permute(2, 0, 1).unsqueeze(0)


def read_columns(layer: nn.Module, image: Tensor) -> Tensor:
    """Runs a layer along the columns of an image (1, channels, height, width)."""
    return layer(image[0].permute(2, 1, 0))[0].permute(2, 1, 0).unsqueeze(0)


def read_weights(network: Lines) -> nn.Module:
    """Loads the weights from kraken's Core ML file."""
    logging.getLogger("coremltools").setLevel(logging.CRITICAL)  # it lists unsupported conversions
    from coremltools.proto import Model_pb2

    model = Model_pb2.Model()
    model.ParseFromString((FOLDER / "kraken/blla.mlmodel").read_bytes())
    found: dict[str, list[Tensor]] = {"Conv2d": [], "GroupNorm": [], "LSTM": []}
    for layer in model.neuralNetwork.layers:
        kind = layer.WhichOneof("layer")
        if kind == "convolution":
            arrays = [layer.convolution.weights, layer.convolution.bias]
            found["Conv2d"] += [torch.tensor(array.floatValue) for array in arrays]
        elif kind == "custom" and layer.custom.className == "groupnorm":
            found["GroupNorm"] += [torch.tensor(each.floatValue) for each in layer.custom.weights]
        elif kind == "biDirectionalLSTM":
            for direction in layer.biDirectionalLSTM.weightParams:
                found["LSTM"] += lstm_weights(direction)
    filled = {}
    for name, module in network.named_modules():
        for parameter, value in module.named_parameters(recurse=False):
            given = found[type(module).__name__].pop(0)
            filled[f"{name}.{parameter}"] = given.view_as(value)
    assert not any(found.values())
    return load(network, filled)


def lstm_weights(params: object) -> list[Tensor]:
    """Returns an LSTM's weights and biases for one direction, in torch's order."""

    def joined(suffix: str) -> Tensor:
        gates = ("inputGate", "forgetGate", "blockInput", "outputGate")
        return torch.tensor([getattr(params, gate + suffix).floatValue for gate in gates])

    bias = joined("BiasVector")
    weights = joined("WeightMatrix"), joined("RecursionMatrix")
    return [*weights, torch.zeros_like(bias), bias]


def page(height: int, width: int) -> Tensor:
    """Draws lines of dark letters on light paper; returns an image (1, 3, height, width)."""
    draw = torch.Generator().manual_seed(0)
    marks = torch.rand(1, 1, height // 6 + 1, width // 6 + 1, generator=draw) < 0.4
    letters = nn.functional.interpolate(marks.float(), scale_factor=6)[:, :, :height, :width]
    in_line = torch.arange(height) % 60 < 24
    paper = 0.85 + 0.1 * torch.rand(1, 3, height, width, generator=draw)
    return paper * (1 - 0.8 * letters * in_line[:, None])


UNITS = 64.0
"""The `units` of the error budget of the layers.

The first layer has inputs of up to 24 and 9 million outputs. In a correct kernel, the worst output
is off by 30 to 80 units in the last place of 1, depending on the order of summation.
"""
LAYERS = ("rows_1", "columns_1", "columns_2", "rows_2")


def inputs(network: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Returns the inputs of the recurrent layers for an image, by name."""
    found: dict[str, Tensor] = {}
    hooks = [
        getattr(network, name).register_forward_pre_hook(
            lambda _, given, name=name: found.update({name: given[0]})
        )
        for name in LAYERS
    ]
    with torch.no_grad():
        network(image)
    for hook in hooks:
        hook.remove()
    return found


def kraken() -> Iterator[Case]:
    """Yields cases for each of the four layers and for the network, on a page and on a crop."""
    network = read_weights(Lines())
    for name, height, width in (("page", 1800, 1300), ("crop", 450, 325)):
        image = page(height, width)
        for layer, input in inputs(network, image).items():
            yield Case(
                f"a {name}: {layer.replace('_', ' ')}",
                "BiLSTM 32",
                str(tuple(input.shape)),
                network,
                lambda module, input=input, layer=layer: getattr(module, layer)(input)[0],
                units=UNITS,
            )
        yield Case(
            f"a {name}: the network",
            "4 BiLSTMs of 32",
            str(tuple(image.shape)),
            network,
            lambda module, image=image: module(image),
            above_half,
        )


class Context(nn.Module):
    """A layer of EasyOCR that reads a line in both directions."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(size, size, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(2 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.rnn(x)[0])


class Line(nn.Module):
    """The network of EasyOCR's second generation, which reads the characters of a line."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        halves, rows = nn.MaxPool2d(2, 2), nn.MaxPool2d((2, 1), (2, 1))
        self.before = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, 1, 1), nn.ReLU(), halves),
            *(nn.Conv2d(32, 64, 3, 1, 1), nn.ReLU(), halves),
            *(nn.Conv2d(64, 128, 3, 1, 1), nn.ReLU()),
            *(nn.Conv2d(128, 128, 3, 1, 1), nn.ReLU(), rows),
            *(nn.Conv2d(128, 256, 3, 1, 1, bias=False), nn.BatchNorm2d(256), nn.ReLU()),
            *(nn.Conv2d(256, 256, 3, 1, 1, bias=False), nn.BatchNorm2d(256), nn.ReLU(), rows),
            *(nn.Conv2d(256, 256, 2), nn.ReLU()),
        )
        self.context = nn.Sequential(Context(256), Context(256))
        self.head = nn.Linear(256, characters)

    def features(self, image: Tensor) -> Tensor:
        """Returns the input of the BiLSTMs, (batch, steps, 256)."""
        return self.before(image).mean(2).transpose(1, 2)

    def forward(self, image: Tensor) -> Tensor:
        """Returns the scores of characters, for images (batch, 1, 64, width)."""
        return self.head(self.context(self.features(image)))


def randomize(network: nn.Module) -> nn.Module:
    """Draws weights that keep the scale of the activations, as EasyOCR's trainer does.

    Torch's defaults shrink the activations of convolutions and LSTMs far below those of a trained
    network.
    """
    for name, parameter in network.named_parameters():
        if "bias" in name:
            nn.init.zeros_(parameter)
        elif parameter.dim() > 1:  # not BatchNorm's
            nn.init.kaiming_normal_(parameter)
    return network


def easyocr() -> Iterator[Case]:
    """Yields cases for the BiLSTMs of both generations, and for the network of the second.

    The weights are random, because EasyOCR downloads its weights.
    """
    torch.manual_seed(0)
    models = runpy.run_path(str(FOLDER / "easyocr/config.py"))["recognition_models"]
    characters = len(models["gen2"]["english_g2"]["characters"]) + 1  # with CTC's blank
    network = randomize(Line(characters))
    lines = 2 * torch.cat(page(64, 8 * 640)[:, :1].split(640, 3)) - 1
    with torch.no_grad():
        network(lines)  # BatchNorm notes the mean and the variance of its inputs
        network.eval()
        features = network.features(lines)
    older, wider = randomize(nn.Sequential(Context(512), Context(512))), torch.rand(8, 161, 512)
    for batch in (1, 8):
        name = f"{batch} line{'s' * (batch > 1)}"
        shape = str((batch, *features.shape[1:]))
        yield Case(
            name,
            "2 BiLSTMs of 256",
            str((batch, *lines.shape[1:])),
            network,
            lambda module, batch=batch: module(lines[:batch]),
            best_of,
            quantizes=True,
        )
        yield Case(
            f"{name}: the BiLSTMs",
            "2 BiLSTMs of 256",
            shape,
            network.context,
            lambda module, batch=batch: module(features[:batch]),
            quantizes=True,
        )
        yield Case(
            f"{name}: the older BiLSTMs",
            "2 BiLSTMs of 512",
            str((batch, *wider.shape[1:])),
            older.eval(),
            lambda module, batch=batch: module(wider[:batch]),
            quantizes=True,
        )
