"""Audio models: a speaker encoder, a voice activity detector and a beat tracker."""

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cases.case import Case, Stepping, above_half, best_of, load
from benchmarks.cases.packages import FOLDER

RATE = 16_000
"""Samples in a second of audio."""
SAME_SPEAKER = 0.75
"""The similarity above which two recordings count as the same speaker's."""


def sound(seconds: int) -> Tensor:
    """Returns noisy tones of varying pitch and loudness, as a substitute for speech."""
    t = torch.arange(RATE * seconds) / RATE
    phase = 2 * torch.pi * (120 * t - 8 * torch.cos(0.7 * t))
    tones = torch.stack([torch.sin(k * phase) / k for k in range(1, 8)]).sum(0)
    noise = torch.randn(len(t), generator=torch.Generator().manual_seed(0))
    return 0.1 * tones * torch.sin(3 * t).clamp(min=0) + 0.01 * noise


def same_speaker(embeddings: Tensor) -> Tensor:
    """Returns whether the speakers are the same, for each pair of embeddings."""
    return embeddings @ embeddings.T > SAME_SPEAKER


def resemblyzer() -> Iterator[Case]:
    """Yields cases for batches of 1.6-second clips, and for `embed_utterance` on 30 seconds."""
    sys.path.append(str(FOLDER))
    from resemblyzer import VoiceEncoder, audio

    encoder = VoiceEncoder("cpu", verbose=False).eval()
    mel = torch.from_numpy(audio.wav_to_mel_spectrogram(sound(60).numpy()))
    for batch in (1, 18, 64):
        mels = torch.stack([mel[80 * i : 80 * i + 160] for i in range(batch)])
        yield Case(
            f"{batch} of 1.6 s",
            "LSTM 3 x 256",
            str(tuple(mels.shape)),
            encoder,
            lambda module, mels=mels: module(mels),
            same_speaker,
        )
    recording = sound(30).numpy()

    def partials(module: nn.Module) -> Tensor:
        _, found, _ = module.embed_utterance(recording, return_partials=True)
        return torch.from_numpy(found)

    _, parts = encoder.compute_partial_slices(len(recording), rate=1.3, min_coverage=0.75)
    shape = str((len(parts), 160, 40))
    name = "`embed_utterance` of 30 s"
    yield Case(name, "LSTM 3 x 256", shape, encoder, partials, same_speaker)


class VoiceActivity(Stepping):
    """The network of silero-vad for 16 kHz."""

    stepped = "lstm_cell"

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.lstm_cell = nn.LSTMCell(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def features(self, chunk: Tensor) -> Tensor:
        """Returns the input of the cell, (batch, 128), for chunks with their context."""
        padded = F.pad(chunk, (0, 64), "reflect")
        real, imaginary = self.stft_conv(padded.unsqueeze(1)).chunk(2, 1)
        x = (real**2 + imaginary**2).sqrt()
        for convolution in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = convolution(x).relu()
        return x.squeeze(-1)

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        state = self.lstm_cell(x, state)
        return state[0], state

    def probability(self, h: Tensor) -> Tensor:
        """Returns the probabilities that chunks are speech, from the states h."""
        return self.final_conv(h.unsqueeze(-1).relu()).sigmoid().flatten()


CHUNK, CONTEXT = 512, 64
"""The new samples that the network reads in each step, and the previous samples it rereads."""


def silero_vad() -> Iterator[Case]:
    """Yields cases for the cell on 1 and 16 recordings, and the network on a minute of audio."""
    from safetensors.torch import load_file

    weights = load_file(FOLDER / "silero_vad/data/silero_vad_16k.safetensors")
    network = load(VoiceActivity(), weights)
    chunks = F.pad(sound(60), (CONTEXT, 0)).unfold(0, CONTEXT + CHUNK, CHUNK)
    with torch.no_grad():
        frames = network.features(chunks)

    def steps(module: Any, frames: Tensor, streamed: bool = False) -> Tensor:
        step = module.stepper(streamed, frames.shape[1])
        return module.probability(torch.cat([step(frame) for frame in frames]))

    def whole(module: Any, streamed: bool = False) -> Tensor:
        step = module.stepper(streamed)
        states = (step(module.features(chunk.unsqueeze(0))) for chunk in chunks)
        return torch.cat([module.probability(h) for h in states])

    layer = "LSTMCell 128"
    for batch in (1, 16):
        name, shape = f"64 steps of {batch}", f"({batch}, 128)"
        run = partial(steps, frames=frames[: 64 * batch].view(64, batch, -1))
        yield Case(name, layer, shape, network, run, above_half, streams=True)
    yield Case("the network, 60 s", layer, "(1, 128)", network, whole, above_half, streams=True)


class Beats(Stepping):
    """The network of BeatNet."""

    stepped = "lstm"

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.linear0 = nn.Conv1d(1, 2, 10), nn.Linear(262, 150)
        self.lstm = nn.LSTM(150, 150, num_layers=2, batch_first=True)
        self.linear = nn.Linear(150, 3)

    def features(self, frames: Tensor) -> Tensor:
        """Returns the input of the LSTM, (frames, 150), for frames (frames, 272)."""
        x = F.max_pool1d(self.conv1(frames.unsqueeze(1)).relu(), 2)
        return self.linear0(x.flatten(1))

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        h, state = self.lstm(x.unsqueeze(0), state)
        return h[0], state


def beatnet() -> Iterator[Case]:
    """Yields cases for 30 seconds of music, read in one call, in LSTM steps, or frame by frame."""
    weights = torch.load(FOLDER / "BeatNet/models/model_1_weights.pt", weights_only=True)
    network = load(Beats(), weights)
    music = torch.rand(1500, 272, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = network.features(music)

    def at_once(module: Any) -> Tensor:
        return module.linear(module.lstm(features.unsqueeze(0))[0]).softmax(-1)

    def steps(module: Any, streamed: bool = False) -> Tensor:
        step = module.stepper(streamed)
        return torch.cat([module.linear(step(x)).softmax(-1) for x in features.split(1)])

    def whole(module: Any, streamed: bool = False) -> Tensor:
        step = module.stepper(streamed)
        states = (step(module.features(frame)) for frame in music.split(1))
        return torch.cat([module.linear(h).softmax(-1) for h in states])

    layer, shape = "LSTM 2 x 150", "(1, 1, 150)"
    yield Case("30 s at once", layer, "(1, 1500, 150)", network, at_once, best_of)
    yield Case("1,500 steps", layer, shape, network, steps, best_of, streams=True)
    yield Case("the network, frame by frame", layer, shape, network, whole, best_of, streams=True)
