"""The gate of the classifier: nothing is timed before losses and labels are known to be correct.

The oracle is the user's program in float64. The error budget of `namernn_fast.testing` applies to
the losses of the first steps and to the scores that determine the labels; the rival is the user's
program in float32, which runs `nn.RNN`. Each program makes its own batches, so a difference in the
batches shows up as a larger error.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.names.data import Corpus
from benchmarks.names.programs import Program, Weights, WithTorch
from namernn_fast.testing import BudgetError, ErrorBudget


def losses(program: Program, corpus: Corpus, batch_size: int, steps: int) -> Tensor:
    """Trains a program for some steps; returns the losses, float64 `(steps,)`."""
    generator = torch.Generator().manual_seed(2)
    passes = -(-steps * batch_size // len(corpus.names))
    orders = [torch.randperm(len(corpus.names), generator=generator) for _ in range(passes)]
    batches = torch.cat(orders).split(batch_size)[:steps]
    found = [program.train(program.batches(batch, len(batch)))[0] for batch in batches]
    return torch.tensor(found, dtype=torch.float64)


def check_losses(
    program: Callable[[Corpus, Weights], Program],
    corpus: Corpus,
    weights: Weights,
    batch_size: int,
    steps: int,
) -> Weights:
    """Checks the losses of a program's first steps against the oracle on the same batches.

    Returns:
        The weights of the oracle after these steps, in float32.

    Raises:
        BudgetError: The error of a loss exceeds its budget.
    """
    oracle = WithTorch(corpus, weights)
    oracle.model.double()
    ours, theirs, exact = (
        losses(each, corpus, batch_size, steps)
        for each in (program(corpus, weights), WithTorch(corpus, weights), oracle)
    )
    # Rounding errors partly cancel in a batch's mean: correct losses have errors of 1.5 units.
    budget = ErrorBudget(torch.float32, units=4)
    budget.add(f"losses, batches of {batch_size}", ours, theirs, exact)
    budget.check()
    return {name: value.float() for name, value in oracle.model.state_dict().items()}


def check_labels(program: Program, corpus: Corpus, names: Sequence[str]) -> None:
    """Checks the labels of a program against the scores of the oracle with the same weights.

    A label may differ if the oracle's scores of the two languages differ by less than the errors
    that the budget allows.

    Raises:
        BudgetError: A label's score is too far below the oracle's best score.
    """
    oracle = WithTorch(corpus, program.model.state_dict())
    theirs = oracle.scores(names)
    oracle.model.double()
    exact = oracle.scores(names)
    budget = ErrorBudget(torch.float32)
    budget.add("scores", theirs, theirs, exact)
    limit = 2 * budget.allowed("scores")
    labels = program.label(names)
    chosen = torch.tensor([corpus.languages.index(label) for label in labels])
    missed = exact.amax(1) - exact.gather(1, chosen.unsqueeze(1)).squeeze(1)
    worst = int(missed.argmax())
    if float(missed[worst]) > limit:
        raise BudgetError(
            f"the score of {labels[worst]} for {names[worst]!r} is {float(missed[worst]):.3g} "
            f"below the best, more than the limit of {limit:.3g}"
        )
