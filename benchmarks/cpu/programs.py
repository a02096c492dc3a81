"""Times programs that step a recurrent layer: `python -m benchmarks.cpu.programs [--record]`.

Each program runs with torch's layer or cell, and with what this package has for single steps; the
two take turns. Both must return the same numbers before anything is timed. The roll-outs need
`pip install sb3-contrib`, the voice activity detector `pip install --no-deps silero-vad`, for its
weights; a program whose package is missing is left out.
"""

import importlib.util
import runpy
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.harness import columns
from benchmarks.harness.columns import Row
from benchmarks.harness.grid import FORWARD
from benchmarks.harness.paths import PERFORMANCE, ROOT
from benchmarks.harness.turns import AFTER, BEFORE, SPEED_UP, BeforeAfter, Program
from namernn_fast import prepare_rnn, replace_rnn

ROLLOUT_STEPS = 128
RATE, CHUNK, CONTEXT = 16_000, 512, 64
"""The samples in a second of audio, in a chunk, and before a chunk that it is read with."""
SECONDS_OF_AUDIO = 60
BEAT_FEATURES, BEAT_FRAMES = 272, 50
"""The features of a frame of audio in a beat tracker, and the frames in a second."""
Make = Callable[[bool], Callable[[], Tensor]]
"""Returns a function that runs a program and returns what it computed, after or before."""


def rollout(environments: int) -> Make:
    """Returns the maker of a roll-out of sb3-contrib's RecurrentPPO."""

    def make(after: bool) -> Callable[[], Tensor]:
        from sb3_contrib import RecurrentPPO
        from stable_baselines3.common.env_util import make_vec_env

        cart_pole = runpy.run_path(str(ROOT / "examples" / "recurrent_ppo.py"))["cart_pole"]
        envs = make_vec_env(cart_pole, environments, seed=0)
        model = RecurrentPPO("MlpLstmPolicy", envs, n_steps=ROLLOUT_STEPS, seed=0, device="cpu")
        if after:
            prepare_rnn(replace_rnn(model.policy))
        _, callback = model._setup_learn(10**9)

        def run() -> Tensor:
            model.collect_rollouts(envs, callback, model.rollout_buffer, ROLLOUT_STEPS)
            return torch.from_numpy(model.rollout_buffer.values.copy())

        return run

    return make


class VoiceActivity(nn.Module):
    """The network of silero-vad for 16 kHz, except its LSTM cell."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.final_conv = nn.Conv1d(128, 1, 1)
        self.load_state_dict({k: v for k, v in weights.items() if not k.startswith("lstm_cell.")})

    def features(self, chunk: Tensor) -> Tensor:
        """Returns the input of the LSTM cell, (1, 128), for a chunk with its context."""
        padded = nn.functional.pad(chunk, (0, 64), "reflect")
        real, imaginary = self.stft_conv(padded.unsqueeze(1)).chunk(2, 1)
        x = (real**2 + imaginary**2).sqrt()
        for convolution in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = convolution(x).relu()
        return x.squeeze(-1)

    def probability(self, h: Tensor) -> Tensor:
        """Returns the probability that a chunk is speech, from the state h."""
        return self.final_conv(h.unsqueeze(-1).relu()).sigmoid().mean()


def voice_activity(after: bool) -> Callable[[], Tensor]:
    """Returns a function that scores a minute of audio, chunk by chunk."""
    from safetensors.torch import load_file

    spec = importlib.util.find_spec("silero_vad")
    assert spec is not None
    assert spec.origin is not None
    weights = load_file(Path(spec.origin).parent / "data" / "silero_vad_16k.safetensors")
    network, cell = VoiceActivity(weights), nn.LSTMCell(128, 128)
    cell.load_state_dict({k[10:]: v for k, v in weights.items() if k.startswith("lstm_cell.")})
    fused = replace_rnn(nn.Sequential(cell))[0] if after else cell
    samples = audio()

    def run() -> Tensor:
        found, state = [], None
        stream = fused.prepare().stream(1) if after else None
        for at in range(CONTEXT, samples.shape[1] - CHUNK, CHUNK):
            x = network.features(samples[:, at - CONTEXT : at + CHUNK])
            if stream is not None:
                h = stream(x)
            else:
                state = cell(x, state)
                h = state[0]
            found.append(network.probability(h))
        return torch.stack(found)

    return run


def audio() -> Tensor:
    """Returns tones with an envelope and noise, (1, samples): they stand in for speech."""
    t = torch.arange(RATE * SECONDS_OF_AUDIO) / RATE
    tones = sum(torch.sin(2 * torch.pi * 120 * k * t) / k for k in range(1, 8))
    noise = torch.randn(len(t), generator=torch.Generator().manual_seed(0))
    return (0.1 * tones * torch.sin(3 * t).clamp(min=0) + 0.01 * noise)[None]


class Beats(nn.Module):
    """A network like that of the beat tracker BeatNet, with random weights."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.reduce = nn.Conv1d(1, 2, 10), nn.Linear(262, 150)
        self.rnn = nn.LSTM(150, 150, num_layers=2)
        self.head = nn.Linear(150, 3)

    def features(self, frame: Tensor) -> Tensor:
        """Returns the input of the LSTM, (1, 150), for a frame (1, 272)."""
        x = nn.functional.max_pool1d(self.convolution(frame.unsqueeze(1)).relu(), 2)
        return self.reduce(x.flatten(1))


def beats(after: bool) -> Callable[[], Tensor]:
    """Returns a function that scores the beats of a minute of music, frame by frame."""
    torch.manual_seed(0)
    network, frames = Beats(), torch.randn(BEAT_FRAMES * SECONDS_OF_AUDIO, 1, BEAT_FEATURES)
    rnn = replace_rnn(network).rnn.prepare() if after else network.rnn

    def run() -> Tensor:
        found, state = [], None
        stream = rnn.stream(1) if after else None
        for frame in frames:
            x = network.features(frame)
            if stream is not None:
                h = stream(x)
            else:
                h, state = rnn(x.unsqueeze(0), state)
            found.append(network.head(h).view(3).softmax(0))
        return torch.stack(found)

    return run


def program(name: str, after: str, package: str, frames: int, make: Make) -> Program:
    """Returns a program that handles some frames, and has `after` in place of torch's layer."""
    also = {"with": after, "frames": frames}
    return Program(name, partial(make, False), partial(make, True), also, package, FORWARD)


PROGRAMS = (
    *(
        program(
            f"sb3-contrib: a roll-out of {n} environments",
            "`prepare_rnn`",
            "sb3_contrib",
            n * ROLLOUT_STEPS,
            rollout(n),
        )
        for n in (8, 64)
    ),
    program(
        "silero-vad: a minute of audio",
        "stream of a step module",
        "silero_vad",
        (RATE * SECONDS_OF_AUDIO - CONTEXT) // CHUNK,
        voice_activity,
    ),
    program(
        "a beat tracker: a minute of music",
        "stream of a layer",
        "torch",
        BEAT_FRAMES * SECONDS_OF_AUDIO,
        beats,
    ),
)


def frames_a_second(role: str) -> Callable[[Row], str]:
    """Returns the entry of a version of a program."""
    return lambda row: f"{row['frames'] / row['medians'][role]:,.0f}"


COLUMNS = (
    columns.key("program", "name"),
    columns.text("frames a second: torch", frames_a_second(BEFORE)),
    columns.text("namernn_fast", frames_a_second(AFTER)),
    columns.text("with", "with"),
    *SPEED_UP,
)
STUDY = BeforeAfter(
    name="programs",
    description=__doc__,
    cases=PROGRAMS,
    table=lambda rows: columns.table(rows, COLUMNS),
    caption=lambda document: (
        "float32. Each program spends only part of its time in the recurrent layer. The two "
        "versions take turns; 95 % is the interval of the ratio of their medians. Probabilities "
        f"and values differ by {max(row['difference'] for row in document['rows']):.0e} at most."
    ),
    seconds=20.0,
    page=PERFORMANCE,
    atol=1e-5,
)

if __name__ == "__main__":
    warnings.simplefilter("ignore")  # gymnasium and sb3 warn about their own deprecations
    STUDY.main()
