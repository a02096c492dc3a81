"""Describes the results of the names study, in a section of docs/names.md and in the model card."""

import statistics
from typing import Any

from namernn_fast.bench.tables import markdown
from namernn_fast.names.checkpoint import WEAK_RECALL
from namernn_fast.names.distillation import MADE_UP
from namernn_fast.names.formatting import with_mark

MAJORITY = "majority"
NGRAM, BARE, WEIGHTED = "n-grams", "n-grams, bare", "n-grams, TF-IDF"
PLAIN, REFERENCE, ONE, DISTILLED = "plain", "reference", "one network of it", "distilled"
UNUSUAL = "unusual"  # how unusual the test names are
SYSTEMS = {
    MAJORITY: "the most frequent language, always",
    NGRAM: "logistic regression on the counts of character n-grams, chosen on validation parts",
    BARE: "the n-grams without the prior correction of 0.3, which the reference has too",
    WEIGHTED: "logistic regression on TF-IDF of up to 5 characters, with the correction",
    PLAIN: "the defaults of `NameClassifier`: one direction, last state, recipe `plain`",
    DISTILLED: "recipe `distilled`: the plain network, taught by the reference; ships pretrained",
    ONE: "the first network of the reference",
    REFERENCE: "recipe `reference`: several networks of n-gram embeddings, two directions",
}
RIVALS = (NGRAM, BARE, WEIGHTED)
"""The baselines that each network is tested against."""
FIGURES = (("accuracy", "accuracy", 100, 2, " points"), ("macro_f1", "macro-F1", 1, 3, ""))
"""What is tested: its key and label, and the factor, digits and unit that it is shown with."""

CARD_TEXT = """# Model card: the pretrained network of `namernn_fast.names`

`names.safetensors` ({size}, float16 weights) predicts which of {languages} languages a surname
comes from. It is the plain network: an embedding with 64 features per character, a vanilla RNN with
256 hidden units in one direction, and a linear layer on the last state.

**A surname is not an ethnicity, a nationality or a mother tongue.** The network sees only the
spelling. Do not use it to make decisions about people.

## Training

The network was distilled from the reference ensemble of this project: it was trained on the
probabilities that the ensemble predicts for the training names and for made-up names ({made_up}
drawn, duplicates removed). `make bench ONLY=names RECORD=1` repeats the training.

Data: the names data set of the PyTorch tutorials, from `spro/practical-pytorch`, {rows} rows,
copyright Sean Robertson, MIT licence. Split: method "{method}", seed {seed}, SHA-256
`{sha256}`.
The weights are under the MIT licence of this project.

## Figures

On the {names} names of the test set, which were not used for training:

{table}

No classifier that sees only the string can have an accuracy above {ceiling}.

## Limits

- Nearly half of the data is Russian, and some languages have fewer than a hundred names. Recall is
  below 20 % for {weak}: these languages are marked as weak.
- The network assigns every string to one of the {languages} languages. A name is marked as unusual
  if its characters are less probable than in 98 % of the validation names; predictions for unusual
  names are unreliable.
- The network reads only Latin letters; names in other scripts are rejected. The data has Arabic,
  Chinese, Greek, Russian and other names in one romanisation each. The network knows the accented
  letters {accented}; other accented letters lose their accents.
- Probabilities assume names like those in the training data, and the recipe favours rare
  languages. A probability is neither a share of the people with a name nor a certainty.
"""


def spread(values: list[float], factor: float = 1, digits: int = 3) -> str:
    """Returns the mean and the standard deviation over the splits."""
    mean, deviation = factor * statistics.mean(values), factor * statistics.stdev(values)
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def report(found: dict[str, Any]) -> str:
    """Returns the section of docs/names.md, which says which system is best and by how much."""
    train, validation, test = found["names"][0]
    verdicts = "\n".join(
        verdict(name, rival, tests)
        for rival, networks in found["tests"].items()
        for name, tests in networks.items()
    )
    return "\n\n".join(
        [
            f"Mean ± standard deviation over the test parts of {len(found['splits'])} splits with "
            f"different seeds. The first split has {train:,} training, {validation:,} validation "
            f"and {test:,} test names; its SHA-256 is `{found['splits'][0]['sha256'][:16]}`. "
            f"Seconds are processor time of one thread on {found['cpu']}; torch {found['torch']}.",
            markdown(figure_rows(found)),
            "\n".join(f"- **{name}**: {text}." for name, text in SYSTEMS.items()),
            conclusion(found["tests"]),
            "The list compares each network with each kind of n-grams on the same test names. "
            "Intervals come from a paired bootstrap over the strings of all splits, with fixed "
            "trained models. The corrected t test (Nadeau and Bengio, 2003) also accounts for the "
            "spread between splits and seeds.",
            verdicts,
            "Recall of each language in %, mean over the splits. A language is weak if the "
            f"distilled network finds less than {100 * WEAK_RECALL:.0f} % of its names on average. "
            "The pretrained network learned from the first split; its card lists weak languages.",
            markdown(recall_rows(found["systems"])),
            unusual(found["unusual"]),
            well_known(found["well_known"]),
        ]
    )


def figure_rows(found: dict[str, Any]) -> list[list[str]]:
    """Returns a row for each system with its figures on all names."""
    rows = [
        ["", "accuracy %", "macro-F1", "top-3 %", "log loss", "calibration error", "seconds"],
        ["ceiling", spread(found["ceiling"], 100, 1), *[""] * 5],
    ]
    for name, figures in found["systems"].items():
        seconds = figures["seconds"]
        rows.append(
            [
                name,
                spread(figures["accuracy"], 100, 1),
                spread(figures["macro_f1"]),
                spread(figures["top3"], 100, 1),
                spread(figures["log_loss"], 1, 2),
                spread(figures["calibration_error"]),
                "" if None in seconds else f"{statistics.median(seconds):.0f}",
            ]
        )
    return rows


def recall_rows(systems: dict[str, Any]) -> list[list[str]]:
    """Returns a row for each language with the recall of every system except the majority."""
    names = [name for name in SYSTEMS if name != MAJORITY]
    rows = [["language", *names]]
    for language in systems[DISTILLED]["recall"]:
        means = {name: statistics.mean(systems[name]["recall"][language]) for name in names}
        title = with_mark(language, weak=means[DISTILLED] < WEAK_RECALL)
        rows.append([title, *(f"{100 * value:.0f}" for value in means.values())])
    return rows


def unusual(found: dict[str, list[float]]) -> str:
    """Returns, in words, how often the network is right on unusual names."""
    share, accuracy, others = (spread(values, 100, 1) for values in found.values())
    return (
        f"**Unusual names.** {share} % of the test names are unusual. The distilled network gets "
        f"{accuracy} % of them right, and {others} % of the others."
    )


def well_known(rows: list[dict[str, Any]]) -> str:
    """Returns a list of well-known names, with the network's answer where it is wrong."""
    right = sum(row["answer"] == row["language"] for row in rows)
    names: dict[str, list[str]] = {}
    for row in rows:
        answer = f" ({row['answer']} {row['probability']:.2f})"
        text = row["name"] + ("" if row["answer"] == row["language"] else answer)
        names.setdefault(row["language"], []).append(text)
    lines = (f"- **{language}**: {', '.join(texts)}" for language, texts in names.items())
    listed = "\n".join(lines)
    return (
        f"**Well-known names.** The pretrained network gets {right} of these {len(rows)} right; "
        "wrong answers are in brackets. The list was fixed before the training, and many of its "
        f"names are in the data, some under other languages.\n\n{listed}"
    )


def conclusion(tests: dict[str, Any]) -> str:
    """Returns, in words, whether the reference is better than the n-grams."""
    said, p_values = [], []
    for rival in RIVALS:
        figures = tests[rival][REFERENCE]
        outcomes = (f"{outcome(figures[key]['bootstrap'])} in {name}" for key, name, *_ in FIGURES)
        said.append(f"against {rival}: {' and '.join(outcomes)}")
        p_values += [figure["corrected_t_test"]["p_value"] for figure in figures.values()]
    return (
        f"**The reference and the n-grams.** Paired bootstrap: {'; '.join(said)}. By the corrected "
        "t test, which also accounts for the spread between splits and seeds, "
        f"{sum(p < 0.05 for p in p_values)} of these {len(p_values)} differences are "
        f"significant (smallest p = {min(p_values):.2g})."
    )


def outcome(difference: dict[str, float]) -> str:
    """Returns a verdict in words, from a difference's confidence interval."""
    if difference["low"] > 0:
        return "ahead"
    return "behind" if difference["high"] < 0 else "no significant difference"


def verdict(name: str, rival: str, tests: dict[str, Any]) -> str:
    """Returns a line that says how a network compares with a rival."""
    said = []
    for key, label, factor, digits, unit in FIGURES:
        found = tests[key]["bootstrap"]
        low, value, high = (f"{factor * found[k]:+.{digits}f}" for k in ("low", "value", "high"))
        said.append(
            f"{label} {value}{unit} ({low} to {high}): {outcome(found)}, corrected t test p = "
            f"{tests[key]['corrected_t_test']['p_value']:.2g}, {tests[key]['wins']} splits won"
        )
    return f"- **{name}** against {rival}: {'; '.join(said)}."


def card(found: dict[str, Any], bytes_: int, letters: str) -> str:
    """Returns the model card of the pretrained network, which reads the accented `letters`."""
    figures, keys = found["systems"], ("accuracy", "macro_f1", "top3")
    rows = [["", "accuracy %", "macro-F1", "top-3 %"]]
    for name, label in (
        (DISTILLED, "this network"),
        (REFERENCE, "the reference that taught it"),
        (NGRAM, "n-gram logistic regression"),
        (BARE, "the n-grams, rare languages not favoured"),
    ):
        accuracy, macro_f1, top3 = (figures[name][key][0] for key in keys)
        rows.append([label, f"{100 * accuracy:.1f}", f"{macro_f1:.3f}", f"{100 * top3:.1f}"])
    recalls = {language: values[0] for language, values in figures[DISTILLED]["recall"].items()}
    weak = sorted(
        (language for language, recall in recalls.items() if recall < WEAK_RECALL),
        key=lambda language: recalls[language],
    )
    info = found["splits"][0]
    return CARD_TEXT.format(
        size=f"{bytes_ / 1024:.0f} KiB",
        languages=len(recalls),
        made_up=f"{MADE_UP:,}",
        rows=f"{info['data']['rows']:,}",
        method=info["method"],
        seed=info["seed"],
        sha256=info["sha256"],
        names=f"{found['names'][0][2]:,}",
        table=markdown(rows),
        ceiling=f"{100 * found['ceiling'][0]:.1f} %",
        weak=", ".join(f"{language} ({100 * recalls[language]:.0f} %)" for language in weak),
        accented=" ".join(letters),
    )
