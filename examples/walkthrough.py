# %% [markdown]
# # A recurrent network, from one formula to the language of a surname
#
# This page starts with one formula and ends with a trained network that reads the surname *Frank*
# character by character and predicts which language it comes from. It is for readers who know
# matrices, derivatives and some Python, and who are new to recurrent networks.
#
# Every figure is drawn by the code above it, and the code asserts every number in the text. So the
# page is also a test: `python examples/walkthrough.py` runs it as a program, and `make docs
# ONLY=walkthrough` builds the notebook and this page.

# %%
import time
import unicodedata

import matplotlib.pyplot as plt
import numpy as np
import torch

from namernn_fast import FusedRNN, explain, names

plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})
INK, BLUE, ORANGE, GREEN, GREY = "#333333", "#0072b2", "#d55e00", "#009e73", "#bbbbbb"

# %% [markdown]
# ## 1. The formula: the state after each step
#
# A recurrent network reads a sequence $x_1, x_2, \ldots, x_T$ one element at a time. A vector, the
# *state* $h_t$, summarizes the elements read so far. Each step computes the new state from the
# previous state and the new element:
#
# $$h_t = \tanh(h_{t-1} W_h + x_t W_x + b), \qquad h_0 = 0$$
#
# The weights $W_h$, $W_x$ and $b$ are the same at every step, so the network can read sequences of
# any length. The function $\tanh$ keeps each number of the state between $-1$ and $1$.
#
# Our first sequences consist of three symbols, 0, 1 and 2. Each symbol is encoded as a *one-hot*
# vector, such as $(0, 1, 0)$ for the symbol 1. The product $x_t W_x$ is then one row of $W_x$: the
# row of that symbol, as an embedding layer would look it up.

# %%
SYMBOLS, UNITS = 3, 4
rng = np.random.default_rng(7)
W_h = 0.5 * rng.normal(size=(UNITS, UNITS))
W_x = 0.6 * rng.normal(size=(SYMBOLS, UNITS))
b = np.zeros(UNITS)


def run(sequence):
    """Returns the states h_1 ... h_T, one per row."""
    h, states = np.zeros(UNITS), []
    for x in np.eye(SYMBOLS)[sequence]:
        h = np.tanh(h @ W_h + x @ W_x + b)
        states.append(h)
    return np.array(states)


assert run([0, 1, 2]).shape == (3, UNITS)
assert np.array_equal(np.eye(SYMBOLS)[1] @ W_x, W_x[1])  # a one-hot vector picks a row
print(run([0, 1, 2]).round(2))

# %% [markdown]
# ## 2. Why order matters
#
# The sequences 0 1 2 and 1 0 2 contain the same symbols. The sum of their three embeddings is the
# same, because addition ignores the order. The recurrent network can tell them apart: in the last
# state, the first symbol has been multiplied by $W_h$ twice, and the second symbol once. The order
# matters for names: *-ov* at the end says more than an *o* and a *v* anywhere.

# %% alt="The states of run([0, 1, 2]) and of run([1, 0, 2]) as two heat maps"
orders = [0, 1, 2], [1, 0, 2]
first, second = (run(order) for order in orders)
assert np.allclose(W_x[orders[0]].sum(0), W_x[orders[1]].sum(0))
assert np.abs(first[-1] - second[-1]).max() > 0.1

figure, panels = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
for axes, order, states in zip(panels, orders, (first, second), strict=True):
    image = axes.imshow(states.T, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", alpha=0.65)
    for (t, unit), value in np.ndenumerate(states):
        axes.text(t, unit, f"{value:.2f}", ha="center", va="center", fontsize=9)
    axes.set_xticks(range(3), [f"$h_{t + 1}$\nread {symbol}" for t, symbol in enumerate(order)])
    axes.set(yticks=range(UNITS), ylabel="unit", title=f"run({order})")
figure.colorbar(image, label="state")
plt.show()

# %% [markdown]
# ## 3. The network unrolled
#
# Drawn once, the network is a box with a loop. Drawn once for each step, the loop becomes a chain:
# the network is *unrolled*. The copies are not separate networks: all share $W_h$, $W_x$ and $b$.


# %% alt="The network with its loop, and unrolled over three steps" tags=["drawing"]
def box(axes, x, y, text, colour):
    style = {"boxstyle": "round,pad=0.8", "facecolor": colour, "edgecolor": INK}
    axes.text(x, y, text, ha="center", va="center", fontsize=12, color=INK, bbox=style)


def arrow(axes, start, end, text, place, colour=INK, bend=0.0):
    """Draws an arrow, with a label at the offset `place` from its middle."""
    style = {"arrowstyle": "-|>", "color": colour, "connectionstyle": f"arc3,rad={bend}"}
    axes.annotate("", end, start, arrowprops=style)
    middle = np.mean([start, end], axis=0) + place
    axes.text(*middle, text, ha="center", va="center", fontsize=9, color=colour)


def step(axes, x, t):
    box(axes, x, 1.5, f"$h_{t}$", "#dfe7f2")
    box(axes, x, 0, f"$x_{t}$", "#f3e3d0")
    arrow(axes, (x, 0.33), (x, 1.17), "$W_x$", (0.25, 0))


def draw_unrolled(width, left):
    """Draws the unrolled network with h_0 at x = left, and returns the axes."""
    _, axes = plt.subplots(figsize=(0.85 * width, 2.7), layout="constrained")
    axes.set(xlim=(0, width), ylim=(-0.5, 2.7), aspect="equal")
    axes.axis("off")
    box(axes, left, 1.5, "$h_0$", "white")
    for t in range(1, 4):
        step(axes, left + 2 * t, t)
        arrow(axes, (left + 2 * t - 1.67, 1.5), (left + 2 * t - 0.33, 1.5), "$W_h$", (0, 0.15))
    return axes


axes = draw_unrolled(width=10.5, left=3.7)
step(axes, 0.8, "t")
arrow(axes, (1.1, 1.85), (0.5, 1.85), "$W_h$", (0, 0.6), bend=1.5)
axes.text(2.3, 1.5, "=", fontsize=18, ha="center", va="center")
plt.show()

# %% [markdown]
# ## 4. Back-propagation through time
#
# Training needs the derivative of a loss $L$ with respect to each weight. Suppose that the loss
# depends only on the last state, as in a classifier of names. We write $a_t$ for the argument of
# $\tanh$:
#
# $$a_t = h_{t-1} W_h + x_t W_x + b, \qquad h_t = \tanh(a_t)$$
#
# Vectors are rows, and the gradient with respect to a vector or matrix has the same shape. Let
# $\delta_t$ be the gradient of the loss with respect to $a_t$. The derivative of $\tanh(a)$ is
# $1 - \tanh(a)^2$, so the chain rule gives, with $\odot$ for the element-wise product,
#
# $$\delta_t = \frac{\partial L}{\partial h_t} \odot (1 - h_t \odot h_t)$$
#
# The state $h_{t-1}$ affects the loss only through $a_t$, where it is multiplied by $W_h$. So going
# one step back in time multiplies the gradient by the transpose of $W_h$:
#
# $$\frac{\partial L}{\partial h_{t-1}} = \delta_t W_h^\top$$
#
# Applying the two equations in turn, from $t = T$ down to $t = 1$, gives every $\delta_t$. Each
# weight is used at every step, and its gradient is the sum over all steps:
#
# $$\frac{\partial L}{\partial W_h} = \sum_{t=1}^{T} h_{t-1}^\top \delta_t, \qquad
# \frac{\partial L}{\partial W_x} = \sum_{t=1}^{T} x_t^\top \delta_t, \qquad
# \frac{\partial L}{\partial b} = \sum_{t=1}^{T} \delta_t$$

# %% alt="The unrolled network with the gradients that go back" tags=["drawing"]
axes = draw_unrolled(width=9.5, left=0.6)
for t in range(1, 4):
    start, end = (0.5 + 2 * t, 1.85), (-1.3 + 2 * t, 1.85)
    arrow(axes, start, end, f"$\\delta_{t} W_h^\\top$", (0, 0.55), ORANGE, bend=0.35)
box(axes, 8.7, 1.5, "$L$", "white")
arrow(axes, (6.93, 1.5), (8.4, 1.5), "", (0, 0))
arrow(axes, (8.6, 1.85), (6.7, 1.85), r"$\partial L / \partial h_3$", (0, 0.55), ORANGE, bend=0.35)
plt.show()


# %% [markdown]
# Written by hand, the backward pass is as short as the forward pass. It reads the states that the
# forward pass has stored.


# %%
def backward(sequence, states, grad_h):
    """Returns the gradients of W_h, W_x and b; grad_h is the gradient of the last state."""
    d_wh, d_wx, d_b = np.zeros_like(W_h), np.zeros_like(W_x), np.zeros_like(b)
    inputs = np.eye(SYMBOLS)[sequence]
    before = np.vstack([np.zeros(UNITS), states[:-1]])  # h_0 ... h_(T-1)
    for t in reversed(range(len(sequence))):
        delta = grad_h * (1 - states[t] ** 2)
        d_wh += np.outer(before[t], delta)
        d_wx += np.outer(inputs[t], delta)
        d_b += delta
        grad_h = delta @ W_h.T
    return d_wh, d_wx, d_b


sequence, target = [0, 1, 2, 2, 1], np.array([0.5, -0.5, 0.5, -0.5])
states = run(sequence)
by_hand = backward(sequence, states, states[-1] - target)  # the loss is |h_T - target|^2 / 2

# %% [markdown]
# PyTorch's autograd must compute the same gradients for the same loop. So must the layers `nn.RNN`
# and `FusedRNN`. These layers store the transposes of our matrices, and two biases $b_{ih}$ and
# $b_{hh}$; the sum of the two is our $b$.

# %%
weights = [torch.tensor(value, requires_grad=True) for value in (W_h, W_x, b)]
h = torch.zeros(UNITS, dtype=torch.float64)
for x in torch.eye(SYMBOLS, dtype=torch.float64)[sequence]:
    h = torch.tanh(h @ weights[0] + x @ weights[1] + weights[2])
((h - torch.tensor(target)) ** 2).sum().div(2).backward()
for ours, weight in zip(by_hand, weights, strict=True):
    np.testing.assert_allclose(ours, weight.grad, atol=1e-12)

for rnn_class in (torch.nn.RNN, FusedRNN):
    layer = rnn_class(SYMBOLS, UNITS, dtype=torch.float64)
    values = {"weight_hh_l0": W_h.T, "weight_ih_l0": W_x.T, "bias_ih_l0": b, "bias_hh_l0": 0 * b}
    layer.load_state_dict({name: torch.tensor(value) for name, value in values.items()})
    output, h_n = layer(torch.eye(SYMBOLS, dtype=torch.float64)[sequence])
    ((h_n[0] - torch.tensor(target)) ** 2).sum().div(2).backward()
    np.testing.assert_allclose(output.detach(), states, atol=1e-12)
    np.testing.assert_allclose(layer.weight_hh_l0.grad.T, by_hand[0], atol=1e-12)
print("By hand, by autograd, by nn.RNN and by FusedRNN: the same gradients.")

# %% [markdown]
# ## 5. Where gradients vanish, and where they explode
#
# A step back in time multiplies the gradient by $1 - h_t \odot h_t$, which is at most 1, and by
# $W_h^\top$. To see the effect of both factors, take $W_h = g\,Q$ with a number $g$ and an
# orthogonal matrix $Q$, which preserves norms. Then one step back scales the gradient's norm by at
# most $g$, and $k$ steps scale it by at most $g^k$:
#
# - for $g < 1$ the gradient **vanishes**: the network does not learn from early elements of a long
#   sequence;
# - for $g > 1$ the gradient may **explode**: one training step then ruins the weights. States near
#   $-1$ or $1$, where $\tanh$ is flat, reduce the gradient again.

# %% alt="The length of the gradient against the steps back, for five values of g"
rng = np.random.default_rng(0)
LENGTH, WIDTH = 50, 32
orthogonal, _ = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))
inputs = 0.1 * rng.normal(size=(LENGTH, WIDTH))  # x_t W_x + b of a long sequence


def gradient_norms(g):
    """Returns the gradient norms for h_T, h_(T-1), ... h_0. The first norm is 1."""
    h, states = np.zeros(WIDTH), []
    for x in inputs:
        h = np.tanh(g * h @ orthogonal + x)
        states.append(h)
    gradients = [np.full(WIDTH, WIDTH**-0.5)]
    for h in reversed(states):
        gradients.append(g * (gradients[-1] * (1 - h**2)) @ orthogonal.T)
    return np.linalg.norm(gradients, axis=1)


back = np.arange(LENGTH + 1)
figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
for g, colour in ((0.5, BLUE), (0.9, GREEN), (1.0, INK), (1.5, "#cc79a7"), (3.0, ORANGE)):
    norms = gradient_norms(g)
    assert (norms <= g**back * (1 + 1e-9)).all()
    axes.semilogy(back, norms, color=colour)
    axes.semilogy(back, g**back, color=colour, linestyle=":", linewidth=1)
    axes.text(LENGTH + 1, norms[-1], f"g = {g}", color=colour, va="center")
axes.axvspan(0, 20, color=GREY, alpha=0.25, linewidth=0)
axes.text(10, 1e-13, "within the longest name", ha="center", fontsize=9)
axes.set(xlim=(0, LENGTH + 6), ylim=(1e-16, 1e16), xlabel="steps back from the loss")
axes.set_ylabel("length of the gradient\n(dotted: the bound $g^k$)")
plt.show()
assert gradient_norms(0.5)[-1] < 1e-12
assert gradient_norms(3.0)[-1] > 1e3

# %% [markdown]
# The usual remedy for exploding gradients is *clipping*, which shortens a gradient that is too
# long. The LSTM and the GRU were designed to avoid vanishing gradients. A surname has at most 20
# characters (the shaded part of the figure), which is short enough for this simple network.
#
# ## 6. The names
#
# The data set has surnames in 18 languages, written in Latin letters. It is read from the folder in
# the environment variable `NAMERNN_FAST_DATA`, or downloaded. Without a network, the code uses a
# sample of about 20 names per language, which is enough to try everything. The figure below always
# shows the whole data set; the code contains its numbers.

# %% alt="The number of names of each language in the data set, and how long its names are"
COUNTS = {
    "Arabic": 2000, "Chinese": 268, "Czech": 519, "Dutch": 297, "English": 3668, "French": 277,
    "German": 724, "Greek": 203, "Irish": 232, "Italian": 709, "Japanese": 991, "Korean": 94,
    "Polish": 139, "Portuguese": 74, "Russian": 9408, "Scottish": 100, "Spanish": 298,
    "Vietnamese": 73,
}  # fmt: skip
# LENGTHS[n] is the number of names with n characters.
LENGTHS = [0, 0, 49, 335, 1319, 2711, 3925, 3683, 3068, 2272]
LENGTHS += [1462, 711, 325, 120, 45, 15, 5, 25, 3, 1]

data = names.load_names()
which = "the embedded sample of the data set" if data.is_sample else "the data set"
print(f"This page was made with {which}: {len(data.rows):,} names.")
if not data.is_sample:
    assert data.counts() == COUNTS
    assert np.bincount([len(names.ASCII.fold(name)) for name, _ in data.rows]).tolist() == LENGTHS

figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4.4), layout="constrained")
ranked = sorted(COUNTS, key=COUNTS.get)
bars = left.barh(ranked, [COUNTS[language] for language in ranked], color=BLUE)
left.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
left.margins(x=0.12, y=0.01)
left.tick_params(axis="y", labelsize=9)
left.set(title="names of each language", xlabel="names")
right.bar(range(len(LENGTHS)), LENGTHS, width=1, color=BLUE, edgecolor="white")
right.set(title="length of a name", xlabel="characters", ylabel="names", xticks=range(0, 21, 5))
plt.show()
majority = max(COUNTS.values()) / sum(COUNTS.values())
print(
    f"The most frequent language, {ranked[-1]}, has {majority:.1%} of the {sum(LENGTHS):,} names."
)

# %% [markdown]
# Look at the bars before you trust an accuracy: a classifier that always answers Russian is right
# for nearly half of the names.
#
# The alphabet of this network has 31 characters, so names are *folded* to ASCII: Unicode's
# decomposition (NFD) separates a letter from its accents, the accents are dropped, and capitals
# become lower-case letters. A table contains the usual spellings of the few letters that do not
# decompose. (The network that comes with the package keeps the accented letters that are common in
# the data: a Müller is more likely to be German than a Muller.)

# %%
decomposed = unicodedata.normalize("NFD", "Ślusàrski")
print([unicodedata.name(character) for character in decomposed if unicodedata.combining(character)])
for name in ("Ślusàrski", "O’Neal", "Strauß", "Frank"):
    print(f"{name:10} {names.ASCII.fold(name):10} {names.encode(name).tolist()}")
assert (len("Ślusàrski"), len(decomposed), len(names.ASCII.alphabet)) == (9, 11, 31)
assert names.ASCII.fold("Ślusàrski") == "slusarski"
assert (names.ASCII.fold("O’Neal"), names.ASCII.fold("Strauß")) == ("o'neal", "strauss")
assert [names.ASCII.alphabet[index] for index in names.encode("Frank")] == list("frank")

# %% [markdown]
# ## 7. Packing: a batch of names without padding
#
# A batch contains many names, so that one matrix product handles all of them. But names differ in
# length. *Padding* extends the short names to the length of the longest, so the network also
# computes states for the padding. *Packing* sorts the names from longest to shortest and stores the
# batch one step at a time: all first characters, then all second characters, and so on. The list
# `batch_sizes` contains the number of names that have a character at each step.

# %%
batch = ["Li", "Frank", "Ślusàrski", "O'Neal", "Nguyen"]
encoded = names.encode_names(batch)
packed = encoded.pack(encoded.by_length(torch.arange(len(batch))))
assert packed.batch_sizes.tolist() == [5, 5, 4, 4, 4, 3, 1, 1, 1]
theirs = torch.nn.utils.rnn.pack_sequence(list(map(names.encode, batch)), enforce_sorted=False)
assert torch.equal(packed.data, theirs.data)


# %% alt="Five names as a padded table, packed, and as the run packed.data" tags=["drawing"]
def draw_cells(axes, rows, title):
    """Draws each (step, character) pair as a cell, with two colours for even and odd steps."""
    for y, row in enumerate(rows):
        for x, (t, character) in enumerate(row):
            colour = "#e5e5e5" if character == "0" else ("#cfe2f3", "#f9dcc4")[t % 2]
            axes.add_patch(plt.Rectangle((x, y), 1, 1, facecolor=colour, edgecolor="white"))
            axes.text(x + 0.5, y + 0.5, character, ha="center", va="center", fontsize=9)
    axes.set(xlim=(0, max(map(len, rows))), ylim=(len(rows), 0), aspect="equal", title=title)
    axes.axis("off")


sizes, longest = packed.batch_sizes.tolist(), len(packed.batch_sizes)
texts = [names.ASCII.fold(name) for name in batch]
padded = [list(enumerate(text.ljust(longest, "0"))) for text in texts]
ragged = [list(enumerate(text)) for text in sorted(texts, key=len, reverse=True)]
steps = np.repeat(np.arange(longest), sizes)
run_of_data = [
    (t, names.ASCII.alphabet[index]) for t, index in zip(steps, packed.data, strict=True)
]
figure, panels = plt.subplot_mosaic(
    "AB;CC", figsize=(9.5, 3.8), layout="constrained", height_ratios=[4, 1]
)
draw_cells(panels["A"], padded, f"padded: {longest * len(batch)} cells")
draw_cells(panels["B"], ragged, f"packed: {sum(sizes)} cells")
panels["B"].text(-0.3, 5.5, "batch_sizes", ha="right", va="center", color=ORANGE)
for t, size in enumerate(sizes):
    panels["B"].text(t + 0.5, 5.5, size, ha="center", va="center", color=ORANGE)
draw_cells(panels["C"], [run_of_data], "packed.data, step after step")
plt.show()

# %% [markdown]
# In batches of 64 random names, this fraction of the cells would be padding:

# %%
all_lengths = np.repeat(range(len(LENGTHS)), LENGTHS)
picks = np.random.default_rng(0).choice(all_lengths, (200, 64))
padding = 1 - (picks.sum(1) / (64 * picks.max(1))).mean()
print(f"{padding:.0%}")
assert 0.25 < padding < 0.55

# %% [markdown]
# ## 8. `nn.RNN` and `FusedRNN`: one result, two speeds
#
# `nn.RNN` calls several operators at every step. `FusedRNN` is a drop-in replacement that runs a
# whole sequence in one operator. Trained from the same weights on the same batches, both give the
# same losses up to rounding. The classifier consists of an embedding, the recurrent layer, and a
# linear layer that computes a score for each language from the last state.

# %% alt="The losses of nn.RNN and of FusedRNN over the steps, and how many times as fast a step is"
parts = names.split(data, folding=names.ASCII)
train = parts.train
STEPS = 40


def trained_step_by_step(rnn_class):
    """Yields the loss and the seconds of each step of training."""
    torch.manual_seed(0)
    model = names.NameClassifier(len(data.languages), rnn_class=rnn_class)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    draw = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        picked = torch.randint(len(train.labels), (64,), generator=draw)
        indices = train.names.by_length(picked)
        started = time.perf_counter()
        logits = model(train.names.pack(indices))
        loss = torch.nn.functional.cross_entropy(logits, train.labels[indices])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item(), time.perf_counter() - started


# The two models take turns, so that other load on the machine slows down both.
both = zip(*map(trained_step_by_step, (torch.nn.RNN, FusedRNN)), strict=True)
torch_losses, torch_times, fused_losses, fused_times = np.array([a + b for a, b in both]).T
print(f"largest difference of the losses: {np.abs(torch_losses - fused_losses).max():.1e}")
np.testing.assert_allclose(fused_losses, torch_losses, rtol=1e-3)
assert torch_losses[-5:].mean() < torch_losses[0]  # both learn

ratios = torch_times / fused_times
low, median, high = np.percentile(ratios, [25, 50, 75])
spread = f"half of the steps: {low:.1f} to {high:.1f}"
print(f"A step with FusedRNN is {median:.1f} times as fast; {spread}")
figure, (left, right) = plt.subplots(
    1, 2, figsize=(9.5, 3.2), layout="constrained", width_ratios=[2, 1]
)
left.plot(torch_losses, color=ORANGE, linewidth=4, alpha=0.5, label="nn.RNN")
left.plot(fused_losses, ".", color=BLUE, label="FusedRNN")
left.set(xlabel="step of training", ylabel="loss (cross-entropy)")
left.legend(frameon=False)
right.boxplot(ratios, orientation="horizontal", showfliers=False, tick_labels=[""])
right.axvline(1, color=GREY, linestyle="--")
right.set(xlabel="time of nn.RNN / time of FusedRNN", xlim=(0, None))
plt.show()

# %% [markdown]
# The ratios above were measured on the machine that built this page, and include the optimizer.
# `docs/performance.md` has more careful measurements.
#
# ## 9. The full training run
#
# An *epoch* is one pass over the training names. After each epoch, the network is tested on the
# *validation* set: names that it does not train on. If its accuracy on this set no longer
# improves, more training only memorizes the training names. The network from the epoch with the
# best validation accuracy is kept.

# %% alt="The accuracy on training and on validation names after each epoch"
recipe = names.RECIPES["plain"].changed(epochs=8, model={"hidden_size": 64, "embedding_size": 32})
fitted = names.fit(parts, recipe)
epochs = [epoch.number for epoch in fitted.history]
of_train = [epoch.train_accuracy for epoch in fitted.history]
of_validation = [epoch.validation_accuracy for epoch in fitted.history]
best = int(np.argmax(of_validation))
figure, axes = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
axes.plot(epochs, of_train, color=GREY, marker="o", label="training, while it learns")
axes.plot(epochs, of_validation, color=BLUE, marker="o", label="validation")
axes.plot(epochs[best], of_validation[best], "o", color=ORANGE, markersize=10, label="kept")
axes.set(xlabel="epoch", ylabel="share of right answers", ylim=(0, 1), xticks=epochs)
axes.legend(frameon=False)
plt.show()
accuracy = fitted.checkpoint.info["metrics"]["test_accuracy"]
print(
    f"64 units, {recipe.epochs} epochs: right for {accuracy:.1%} of {len(parts.test):,} test names."
)
assert of_train[-1] > of_train[0]
assert data.is_sample or accuracy > majority

# %% [markdown]
# ## 10. The classifier that comes with the package
#
# The network that comes with the package has 256 units instead of 64, and was trained on the data
# set. `names.load()` loads it. To use your own model, train it with `python -m namernn_fast.names
# train`, which prints where it saved the model, and load it with `names.load(path)`.

# %%
predictor = names.load()
examples = ["Frank", "Ślusàrski", "O'Neal", "Nakamura", "Papadopoulos", "Nguyen", "Ivanov"]
for name, answers in zip(examples, predictor.predict(examples, top=3), strict=True):
    shown = ", ".join(f"{language} {probability:.0%}" for language, probability in answers)
    print(f"{name:14}{shown}")
probabilities = predictor.probabilities(examples)
assert probabilities.shape == (len(examples), len(predictor.languages))
assert torch.allclose(probabilities.sum(1), torch.ones(len(examples)))

# %% [markdown]
# A model must be tested on names that it was not trained on. `names.split` has divided the names
# into a training, a validation and a test set, and no string is in two sets. A hash identifies
# the split: if the model's file records the same hash, the model was not trained on our test set.

# %%
if parts.info["sha256"] == predictor.info["split"]["sha256"]:
    test = names.split(data).test  # the same names, with the accents that the model reads
    guesses = predictor.probabilities(test.texts).argmax(1)
    accuracy = (guesses == test.labels).float().mean().item()
    print(f"Right for {accuracy:.1%} of {len(guesses):,} test names.")
    assert accuracy > majority
else:
    print("The model was trained with another split of other names: nothing to measure here.")

# %% [markdown]
# ## 11. Frank, character by character
#
# The model reads *frank* in five steps. Each letter updates the state. At the end a linear layer
# computes a score for each of the 18 languages from $h_5$.

# %% alt="f, r, a, n, k enter one by one; the state h_5 leads to 18 languages" tags=["drawing"]
name = "Frank"  # or your own
text, states = predictor.states(name)
answers = predictor.prefix_probabilities(name)
length = len(text)
figure, (axes, bars) = plt.subplots(
    1, 2, figsize=(9.5, 4), layout="constrained", width_ratios=[3, 1]
)
axes.set(xlim=(-0.6, length + 1.4), ylim=(-0.6, 2.2), aspect="equal")
axes.axis("off")
box(axes, 0, 1.3, "$h_0$", "white")
for t, letter in enumerate(text, 1):
    box(axes, t, 1.3, f"$h_{t}$", "#dfe7f2")
    box(axes, t, 0, letter, "#f3e3d0")
    arrow(axes, (t, 0.25), (t, 1.05), "", (0, 0))
    arrow(axes, (t - 0.72, 1.3), (t - 0.28, 1.3), "", (0, 0))
arrow(axes, (length + 0.28, 1.3), (length + 1.4, 1.3), "linear layer", (-0.05, 0.25), ORANGE)
shares = answers[-1].tolist()
bars.barh(predictor.languages[::-1], shares[::-1], color=BLUE)
bars.tick_params(axis="y", labelsize=8)
bars.margins(y=0.01)
bars.set(xlabel="probability", xlim=(0, 1))
plt.show()

# %% [markdown]
# The next figure shows the states $h_1, \ldots, h_5$: one row for each character, one column for
# each unit. The columns are sorted by the last state. Nobody chose what a unit stands for, so it is
# hard to interpret the rows. The linear layer reads the whole last row.

# %% alt="The states of the model after each character of frank, as a heat map"
states = states.numpy()
assert len(states) == length
figure, axes = plt.subplots(figsize=(9.5, 2.6), layout="constrained")
by_last = states[:, states[-1].argsort()]
image = axes.imshow(by_last, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", interpolation="none")
ticks = [f"$h_{{{t + 1}}}$  after {text[: t + 1]}" for t in range(length)]
axes.set_yticks(range(length), ticks)
axes.set_xlabel(f"units, sorted by $h_{{{length}}}$")
figure.colorbar(image, label="state")
plt.show()

# %% [markdown]
# The states of the model follow the formula of section 1: the NumPy loop, given the trained
# weights, computes the same last state.

# %%
model = predictor.checkpoint.model
embedding = model.embedding.weight.detach().numpy()
w_ih, w_hh, b_ih, b_hh = (weight.detach().numpy() for weight in model.rnn.parameters())
h = np.zeros(model.rnn.hidden_size)
for index in names.encode(name, predictor.folding):
    h = np.tanh(h @ w_hh.T + embedding[index] @ w_ih.T + b_ih + b_hh)
np.testing.assert_allclose(h, states[-1], atol=1e-4)
print("The loop in NumPy gives the last state of the model.")

# %% [markdown]
# The linear layer can be applied after each character, not only after the last: its answer after
# *fr* is the model's prediction for the name *Fr*. These answers show how the prediction changes
# as the model reads more characters, although training only used the answer at the end of a name.
# The figure leaves out languages that are never likely.

# %% alt="The probabilities of languages after each character of frank, as bars"
by_linear_layer = model.classifier(torch.tensor(states)).softmax(1)
assert torch.allclose(answers, by_linear_layer, atol=1e-4)
assert torch.allclose(answers[-1], predictor.probabilities([name])[0], atol=1e-4)
assert torch.allclose(answers[1], predictor.probabilities([text[:2]])[0], atol=1e-4)
shown = {*answers.argmax(1).tolist(), *answers[-1].topk(4).indices.tolist()}
shown = sorted(shown, key=answers[-1].tolist().__getitem__)
figure, panels = plt.subplots(1, length, figsize=(9.5, 2.8), sharey=True, layout="constrained")
for t, axes in enumerate(np.atleast_1d(panels)):
    shares = answers[t, shown].tolist()
    bars = axes.barh([predictor.languages[place] for place in shown], shares, color=BLUE)
    bars[shares.index(max(shares))].set_color(ORANGE)
    axes.set(title=text[: t + 1], xlim=(0, 1))
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
figure.supxlabel("probability after each character (orange: the most likely)", fontsize=10)
plt.show()

# %% [markdown]
# ## 12. Devices
#
# A model and its inputs must be on the same device:
#
# - `cpu`: `FusedRNN` runs a C++ kernel;
# - `cuda`, a GPU: `FusedRNN` runs a Triton kernel;
# - `mps`, the GPU of a Mac: `FusedRNN` runs ATen operators, one step at a time.
#
# A GPU is faster if there is enough work to do in parallel. This model is small and names are
# short, so measure before you choose: the last cell times each device of this machine. `explain`
# says which code runs a call.

# %%
devices = ["cpu"]
if torch.accelerator.is_available():
    devices.append(torch.accelerator.current_accelerator().type)  # such as "cuda" or "mps"
many = [name for name, _ in data.rows[:2000]]
for device in devices:
    there = names.load(device=device)
    there.probabilities(many)  # the first call on a GPU compiles kernels
    started = time.perf_counter()
    on_device = there.probabilities(many)
    seconds = time.perf_counter() - started
    print(f"{device}: {len(many) / seconds:,.0f} names a second")
    assert torch.allclose(on_device, predictor.probabilities(many), atol=1e-3)
print(explain(model.rnn, torch.zeros(5, 1, model.rnn.input_size)))

# %% [markdown]
# ## Where to go next
#
# - Give `backward` a loss at every step, not only at the last. Which line changes?
# - Start section 5 with $W_h$ drawn from a normal distribution. For which scale do gradients
#   neither vanish nor explode?
# - Run section 11 with your own name, and find the character at which the model becomes sure.
# - Train your own model with `python -m namernn_fast.names train`, then run the `predict` command
#   that it prints.
