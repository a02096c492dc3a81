"""Runs the names application through its public functions."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from benchmarks.classifier.program import EMBEDDING, HIDDEN, LEARNING_RATE, Corpus, Program
from namernn_fast.names import (
    ASCII,
    Batch,
    Checkpoint,
    LabelledNames,
    NameClassifier,
    Predictor,
    Recipe,
    batches,
    encode_names,
    train_epoch,
)


class Application(Program):
    """The names application of this package."""

    name = "application"
    shares = True

    def __init__(self, corpus: Corpus, weights: dict[str, Tensor]):
        self.data = LabelledNames(
            tuple(map(ASCII.fold, corpus.names)), encode_names(corpus.names), corpus.labels
        )
        self.model = NameClassifier(len(corpus.languages), EMBEDDING, HIDDEN)
        self.model.load_state_dict(weights)
        self.recipe = Recipe(lr=LEARNING_RATE)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=self.recipe.lr,
            weight_decay=self.recipe.weight_decay,
            fused=True,
        )
        self.predictor = Predictor(Checkpoint(self.model, corpus.languages, {}))

    def batches(self, order: Tensor, batch_size: int) -> Iterable[Batch]:
        return batches(self.data, order, batch_size)

    def train(self, batches: Iterable[Batch]) -> tuple[float, float]:
        return train_epoch(self.model, self.optimizer, batches, self.recipe)

    def label(self, names: Sequence[str]) -> list[str]:
        self.model.eval()
        return self.predictor.languages_of(names)
