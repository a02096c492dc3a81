"""Text models: two that pronounce words, and one that corrects genomes."""

import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from benchmarks.cases.case import Case, Stepping, best_of, load
from benchmarks.cases.packages import FOLDER, ArraysOnly

WORDS = (
    "activationist anaphoric blithesome cromulent defenestrate embiggen flummoxed gobbledygook "
    "hobbledehoy interrobang jabberwock kerfuffle lollygag mumpsimus nincompoop oxymoronic "
    "quixotry ragamuffin skedaddle taradiddle"
)
START, END, LONGEST = 2, 3, 20
"""The start and end phonemes, and the maximum number of phonemes in a word."""


class Pronouncer(Stepping):
    """The network of g2p_en: a GRU reads a word's letters, a GRU cell predicts its phonemes."""

    stepped = "speaker"

    def __init__(self, arrays: Any) -> None:
        super().__init__()
        (letters, features), (phonemes, hidden) = arrays["enc_emb"].shape, arrays["fc_w"].shape
        self.letters = nn.Embedding(letters, features)
        self.phonemes = nn.Embedding(phonemes, hidden)
        self.reader, self.speaker = nn.GRU(features, hidden), nn.GRUCell(hidden, hidden)
        self.head = nn.Linear(hidden, phonemes)
        names = {"letters.weight": "enc_emb", "phonemes.weight": "dec_emb"}
        names |= {"head.weight": "fc_w", "head.bias": "fc_b"}
        for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            short = kind.replace("weight", "w").replace("bias", "b")
            names |= {f"reader.{kind}_l0": f"enc_{short}", f"speaker.{kind}": f"dec_{short}"}
        load(self, {name: torch.from_numpy(arrays[theirs]) for name, theirs in names.items()})

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        h = self.speaker(x, state)
        return h, h

    def pronounce(self, word: Tensor, streamed: bool) -> list[Tensor]:
        """Returns the scores of a word's phonemes; `word` holds ids of letters, (length)."""
        read = self.reader(self.letters(word).unsqueeze(1))[1][0]
        step, found = self.stepper(streamed, state=read), list[Tensor]()
        phoneme = torch.tensor([START])
        for _ in range(LONGEST):
            found.append(self.head(step(self.phonemes(phoneme))))
            phoneme = found[-1].argmax(-1)
            if phoneme == END:
                break
        return found


def g2p_en() -> Iterator[Case]:
    """Yields cases for the encoder and for the whole network, each on 20 words."""
    network = Pronouncer(np.load(FOLDER / "g2p_en/checkpoint20.npz"))
    # Ids 0, 1 and 2 are padding, an unknown letter and the end of a word. Letters start at 3.
    words = [torch.tensor([ord(c) - ord("a") + 3 for c in word] + [2]) for word in WORDS.split()]

    def read(module: nn.Module) -> Tensor:
        return torch.cat([module.reader(module.letters(w).unsqueeze(1))[1][0] for w in words])

    def speak(module: nn.Module, streamed: bool = False) -> Tensor:
        return torch.cat([s for w in words for s in module.pronounce(w, streamed)])

    yield Case("reads 20 words", "GRU 256", "(10, 1, 256)", network, read)
    yield Case(
        "pronounces 20 words",
        "GRU 256, GRUCell 256",
        "(10, 1, 256), (1, 256)",
        network,
        speak,
        best_of,
        streams=True,
    )


class Characters(nn.Module):
    """The network of g2pM, which chooses the pronunciation of each Chinese character."""

    def __init__(self, arrays: dict[str, Any]) -> None:
        super().__init__()
        characters, features = arrays["embedding.weight"].shape
        hidden = arrays["lstm.weight_hh_l0"].shape[1]
        classes, middle = arrays["logit_layer.2.weight"].shape
        self.embedding = nn.Embedding(characters, features)
        self.lstm = nn.LSTM(features, hidden, batch_first=True, bidirectional=True)
        first = nn.Linear(2 * hidden, middle)
        self.logit_layer = nn.Sequential(first, nn.ReLU(), nn.Linear(middle, classes))
        load(self, {name: torch.from_numpy(array) for name, array in arrays.items()})


def g2pm() -> Iterator[Case]:
    """Yields cases for one sentence and for 32 sentences: dense, packed, and with `lengths=`."""
    with (FOLDER / "g2pM/np_ckpt.pkl").open("rb") as file:
        network = Characters(ArraysOnly(file).load())
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 31, (32,), generator=draw).sort(descending=True).values
    lengths[0] = 30

    def sentences(batch: int, steps: int) -> Tensor:
        return torch.randint(4, network.embedding.num_embeddings, (batch, steps), generator=draw)

    def whole(module: nn.Module, ids: Tensor) -> Tensor:
        return module.logit_layer(module.lstm(module.embedding(ids))[0])

    def padded(module: nn.Module, ids: Tensor) -> Tensor:
        embedded = module.embedding(ids)
        packed = pack_padded_sequence(embedded, lengths, batch_first=True)
        return module.logit_layer(pad_packed_sequence(module.lstm(packed)[0], True)[0])

    def with_lengths(module: nn.Module, ids: Tensor) -> Tensor:
        if type(module.lstm) is nn.LSTM:
            return padded(module, ids)
        return module.logit_layer(module.lstm(module.embedding(ids), lengths=lengths)[0])

    for name, batch, steps, run in (
        ("a sentence", 1, 20, whole),
        ("32 sentences", 32, 30, whole),
        ("32 sentences, packed", 32, 30, padded),
        ("packed before, `lengths=` after", 32, 30, with_lengths),
    ):
        ids = sentences(batch, steps)
        yield Case(
            name,
            f"BiLSTM {network.embedding.embedding_dim} to {network.lstm.hidden_size}",
            str((batch, steps, network.embedding.embedding_dim)),
            network,
            lambda module, run=run, ids=ids: run(module, ids),
            best_of,
        )


class Polisher(nn.Module):
    """The network of medaka, which corrects a genome from the counts of bases at its positions."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.gru = nn.GRU(10, hidden_size, num_layers=2, batch_first=True, bidirectional=True)
        self.linear = nn.Linear(2 * hidden_size, 5)

    def forward(self, counts: Tensor) -> Tensor:
        """Returns the probabilities of the bases, (batch, positions, 5)."""
        return self.linear(self.gru(counts)[0]).softmax(-1)


MEDAKA = {128: "r1041_e82_400bps_sup_v5.2.0", 256: "r1041_e82_400bps_hac_v6.0.0"}
"""The model of each size."""


def pileup(batch: int, positions: int, draw: torch.Generator) -> Tensor:
    """Returns medaka's ten base counts at each position, as fractions, for reads with a few errors.

    Half of the reads are from one strand, and half from the other.
    """
    bases = torch.randint(4, (batch, positions, 1), generator=draw)
    strands = torch.cat([bases, bases + 4], 2)
    errors = 0.02 * torch.rand(batch, positions, 10, generator=draw)
    return errors.scatter_add(2, strands, torch.full(strands.shape, 0.45))


def medaka() -> Iterator[Case]:
    draw = torch.Generator().manual_seed(0)
    for hidden_size, name in MEDAKA.items():
        with tarfile.open(FOLDER / f"medaka/data/{name}_model_pt.tar.gz") as archive:
            file = archive.extractfile("model/weights.pt")
            assert file is not None
            weights = torch.load(file, map_location="cpu", weights_only=True)
        network = load(Polisher(hidden_size), weights)
        for batch, positions in ((1, 10_000), (8, 1000), (16, 500)):
            counts = pileup(batch, positions, draw)
            yield Case(
                f"{batch} of {positions:,} positions",
                f"BiGRU 2 x {hidden_size}",
                str(tuple(counts.shape)),
                network,
                lambda module, counts=counts: module(counts),
                best_of,
            )
