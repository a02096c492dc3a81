"""`data`: describes the names data and its irregularities."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, astuple
from typing import Any

from ..files import check_no_overwrite, check_replaceable
from ..folding import ASCII
from ..formatting import Entry, aligned, literal, markdown
from ..report import JUNK, DataReport, describe
from ..text import escaped
from .arguments import add_data, add_split, data_files, load_data, path, split_data, write_text
from .arguments import add_parser as add_command

# Columns of the table with one row per language.
_HEADER = ("language", "rows", "distinct", "repeats", "shared", "junk", "train", "valid.", "test")
_LEGEND = (
    "distinct: folded names; repeats: rows beyond the first of each; shared: names that other "
    "languages have too;",
    "junk: rows that are not clean names; train, valid., test: names in the parts of the split",
)


def add_parser(commands: Any) -> None:
    """Adds the command `data` to the command line."""
    parser = add_command(commands, "data", run, "describe the names data")
    add_data(parser)
    add_split(parser)
    parser.add_argument(
        "--report",
        type=path,
        metavar="FILE",
        help="write all facts and odd rows, as JSON if the name ends in .json, else as Markdown",
    )


def run(arguments: argparse.Namespace) -> None:
    """Prints the report, and writes a longer report if --report is given."""
    if arguments.report is not None:
        check_no_overwrite([("--report", arguments.report)], data_files(arguments))
        check_replaceable(arguments.report)
    data = load_data(arguments)
    parts = split_data(data, arguments, ASCII)
    report = describe(data, parts)
    print(escaped(f"{len(data.rows):,} names in {len(data.languages)} languages: {data.source}"))
    print(f"SHA-256 of the data {data.sha256}\n")
    print(aligned(_HEADER, _languages(report)))
    print("\n".join(_LEGEND))
    print()
    for title, text in _facts(report):
        print(escaped(f"{title}: {text}"))
    if arguments.report is not None:
        is_json = arguments.report.suffix.lower() == ".json"
        text = json.dumps(asdict(report), indent=1) if is_json else page(report)
        write_text(arguments.report, text)


def _languages(report: DataReport) -> list[list[Entry]]:
    return [list(astuple(facts)) for facts in (*report.languages, report.total)]


def _facts(report: DataReport) -> list[tuple[str, str]]:
    """Returns (title, text) for each fact about the whole data set."""
    lost = Counter(character for row in report.odd_rows for character in row.dropped)
    characters = ", ".join(f"'{character}' ({times:,})" for character, times in lost.most_common())
    rules = Counter(rule for row in report.odd_rows for rule in row.junk)
    junk = ", ".join(f"{rules[rule]} {rule}" for rule in JUNK if rule in rules)
    ceiling, info = report.ceiling, report.split
    facts = [
        (
            "folding to ASCII (of duplicates and of the split)",
            f"the table of spellings changes {sum(bool(row.spelled) for row in report.odd_rows):,} "
            f"rows; dropped are {characters or 'no characters'}",
        ),
        ("junk", f"{report.total.junk:,} rows ({junk or 'none'}); kept as they are"),
        (
            "ceiling",
            f"the best function of the folded string gets {ceiling['rows']:.1%} of the rows right, "
            f"{ceiling['distinct pairs']:.1%} of the distinct pairs of a name and a language, and "
            f"{ceiling['test part']:.1%} of the test part",
        ),
        ("split", f"{info['method']}, seed {info['seed']}; SHA-256 {info['sha256'][:16]}…"),
    ]
    for title, shares in report.leak.items():
        if title == "this split" and info["method"] == "random":
            continue
        facts.append(
            (
                f"leak of {'the random split' if title == 'random split' else 'this split'}",
                f"{shares['pairs']:.1%} of the test part are seen before the test, "
                f"{shares['strings']:.1%} when the language is ignored",
            )
        )
    return facts


def page(report: DataReport) -> str:
    """Returns the whole report in Markdown."""
    facts = {
        "source": report.split["data"]["source"],
        "SHA-256 of the data": report.split["data"]["sha256"],
        "SHA-256 of the split": report.split["sha256"],
        **dict(_facts(report)),
    }
    rules = {rule: words for rule, (words, _) in JUNK.items()}
    header = ("row", "language", "name", "folded", "spelled", "dropped", "junk")
    odd_rows: list[list[Entry]] = []
    for row in report.odd_rows:
        name = f'"{row.name}"' if row.name != row.name.strip() else row.name
        shown = asdict(row) | {"name": name, "junk": ", ".join(row.junk)}
        odd_rows.append([shown[title] for title in header])
    shared: list[list[Entry]] = [
        [text, ", ".join(languages)] for text, languages in report.shared_strings.items()
    ]
    return "\n\n".join(
        [
            "# The names data",
            "## Languages",
            markdown(_HEADER, _languages(report)),
            "\n".join(_LEGEND),
            "## Facts",
            _listed(facts),
            "## Odd rows",
            "Rows that the table of spellings changes, rows with characters that folding drops, "
            "and junk. They stay as they are, so that figures can be compared with published ones.",
            _listed(rules),
            markdown(header, odd_rows),
            "## Folded names under several languages",
            markdown(("name", "languages"), shared),
        ]
    )


def _listed(texts: Mapping[str, str]) -> str:
    """Returns a Markdown list of titles and their texts."""
    return "\n".join(f"- {literal(title)}: {literal(text)}" for title, text in texts.items())
