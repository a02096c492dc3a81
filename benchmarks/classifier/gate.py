"""The gate of the classifier: nothing is timed before losses and labels are known to be correct.

The oracle is the user's program in float64. The error budget of `namernn_fast.testing` applies to
the losses of the first steps and to the scores that determine the labels; the rival is the user's
program in float32, which runs `nn.RNN`. Each program builds its own batches and folds the names, so
different batches or names show up as a larger error.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.classifier.program import Corpus, Program
from benchmarks.classifier.with_torch import WithTorch
from namernn_fast.testing import BudgetError, ErrorBudget

Weights = dict[str, Tensor]


def losses(program: Program, corpus: Corpus, batch_size: int, steps: int) -> Tensor:
    """Trains a program for some steps; returns the losses, float64 `(steps,)`."""
    generator = torch.Generator().manual_seed(2)
    passes = -(-steps * batch_size // len(corpus.names))
    orders = [torch.randperm(len(corpus.names), generator=generator) for _ in range(passes)]
    batches = torch.cat(orders).split(batch_size)[:steps]
    found = [program.train(program.batches(batch, len(batch)))[0] for batch in batches]
    return torch.tensor(found, dtype=torch.float64)


def check_losses(
    programs: Sequence[type[Program]],
    corpus: Corpus,
    weights: Weights,
    batch_size: int,
    steps: int,
) -> Weights:
    """Checks the losses of every program's first steps, with equal initial weights and batches.

    Returns:
        The weights of the oracle after these steps, in float32.

    Raises:
        BudgetError: The error of a loss exceeds its budget.
    """
    oracle = WithTorch(corpus, weights)
    oracle.model.double()
    exact = losses(oracle, corpus, batch_size, steps)
    theirs = losses(WithTorch(corpus, weights), corpus, batch_size, steps)
    # Rounding errors cancel in the mean over a batch: correct losses err by 1.5 units.
    budget = ErrorBudget(torch.float32, units=4)
    for program in programs:
        ours = losses(program(corpus, weights), corpus, batch_size, steps)
        budget.add(f"{program.name}, batches of {batch_size}: losses", ours, theirs, exact)
    budget.check()
    return {name: value.float() for name, value in oracle.model.state_dict().items()}


def check_labels(
    programs: Mapping[type[Program], Program], corpus: Corpus, names: Sequence[str]
) -> None:
    """Checks that programs with the same weights give the same labels.

    A label may differ if the oracle's scores of the two languages differ by less than the errors
    that the budget allows.

    Args:
        programs: Programs by their class, with the same weights.
        corpus: The corpus with the languages.
        names: The names to label.

    Raises:
        BudgetError: A label's score is too far below the oracle's best score.
    """
    weights = next(iter(programs.values())).model.state_dict()
    oracle = WithTorch(corpus, weights)
    theirs = oracle.scores(names)
    oracle.model.double()
    exact = oracle.scores(names)
    budget = ErrorBudget(torch.float32)
    budget.add("scores", theirs, theirs, exact)
    allowed = budget.allowed("scores")
    places = {language: place for place, language in enumerate(corpus.languages)}
    for program_class, program in programs.items():
        chosen = torch.tensor([places[label] for label in program.label(names)])
        missed = exact.amax(1) - exact.gather(1, chosen.unsqueeze(1)).squeeze(1)
        if float(missed.max()) > 2 * allowed:
            worst = int(missed.argmax())
            language = corpus.languages[chosen[worst]]
            raise BudgetError(
                f"{program_class.name}: {language} for {names[worst]!r} has a score "
                f"{float(missed[worst]):.3g} below the best, and may have {2 * allowed:.3g}"
            )
