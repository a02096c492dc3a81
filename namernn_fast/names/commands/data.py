"""`data`: tells what is in the names data, and what is odd about it."""

from __future__ import annotations

import argparse
import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..dataset import load_names
from ..files import check_no_overwrite, check_replaceable, replacing
from ..formatting import Cell, aligned, literal, markdown
from ..report import DataReport, LanguageFacts, describe
from ..text import escaped
from .arguments import add_data, add_split, data_files, path, split_data
from .arguments import add_parser as add_command

# Columns of the table of languages.
_HEADER = (
    "language",
    "rows",
    "distinct",
    "repeats",
    "shared",
    "spelled",
    "dropped",
    "junk",
    "train",
    "valid.",
    "test",
)
_LEGEND = (
    "distinct: folded names; repeats: rows beyond the first of each; shared: names that other "
    "languages have too;",
    "spelled: rows that the table of spellings changes; dropped: rows with characters that folding "
    "drops;",
    "junk: rows that are no clean names; train, valid., test: names in the parts of the split",
)


def add_parser(commands: Any) -> None:
    """Adds the command to the command line."""
    parser = add_command(commands, "data", run, "tell what is in the names data")
    add_data(parser)
    add_split(parser)
    parser.add_argument(
        "--report",
        type=path,
        metavar="FILE",
        help="write all facts and rows, as JSON if the file is called .json, else as Markdown",
    )


def run(arguments: argparse.Namespace) -> None:
    """Reports as the options say."""
    if arguments.report is not None:
        check_no_overwrite([("--report", arguments.report)], data_files(arguments))
        check_replaceable(arguments.report)
    data = load_names(arguments.data, allow_sample=not arguments.no_sample)
    parts = split_data(data, arguments)
    report = describe(data, parts)
    print(escaped(f"{len(data.rows):,} names in {len(data.languages)} languages: {data.source}"))
    print(f"SHA-256 of the data {data.sha256}\n")
    print(aligned(_HEADER, _languages(report)))
    print("\n".join(_LEGEND))
    print()
    for title, text in _totals(report):
        print(escaped(f"{title}: {text}"))
    if arguments.report is not None:
        _write(arguments.report, report)
        print(f"wrote {escaped(str(arguments.report))}")


def _languages(report: DataReport) -> list[list[Cell]]:
    return [_row(facts) for facts in (*report.languages, report.total)]


def _row(facts: LanguageFacts) -> list[Cell]:
    return [
        facts.language,
        facts.rows,
        facts.distinct,
        facts.repeats,
        facts.shared,
        facts.spelled,
        facts.dropped,
        facts.junk,
        facts.train,
        facts.validation,
        facts.test,
    ]


def _totals(report: DataReport) -> list[tuple[str, str]]:
    """Returns the facts of the whole data: (title, text)."""
    distinct, folding, ceiling = report.distinct, report.folding, report.ceiling
    lengths, sizes = report.lengths, report.split["names"]
    junk = ", ".join(f"{len(rows)} {rule}" for rule, rows in report.junk_rows.items() if rows)
    lost = ", ".join(
        f"'{character}' ({times:,})" for character, times in report.dropped_characters.items()
    )
    totals = [
        (
            "distinct",
            f"{distinct['pairs as written']:,} pairs of a name and a language, "
            f"{distinct['pairs folded']:,} once folded",
        ),
        (
            "shared",
            f"{distinct['strings under several languages as written']:,} strings are under several "
            f"languages, {distinct['strings under several languages folded']:,} once folded",
        ),
        (
            "folding",
            f"changes {folding['rows changed']:,} rows in more than case, "
            f"{folding['rows changed by the spellings']:,} of them by the table of spellings; "
            f"drops {lost or 'nothing'}",
        ),
        ("junk", f"{report.total.junk:,} rows ({junk or 'none'}); kept as they are"),
        (
            "ceiling",
            f"the best function of the string has {ceiling['rows as written']:.1%} of the rows "
            f"right and {ceiling['pairs as written']:.1%} of the distinct pairs, of the folded "
            f"string {ceiling['rows folded']:.1%} and {ceiling['pairs folded']:.1%}",
        ),
        (
            "length",
            f"{lengths['mean as written']:.2f} on average, at most "
            f"{lengths['longest as written']:.0f}, once folded {lengths['longest folded']:.0f}",
        ),
        (
            "split",
            f"{report.split['method']}, seed {report.split['seed']}: {sizes['train']:,} to train, "
            f"{sizes['validation']:,} to validate, {sizes['test']:,} to test; SHA-256 "
            f"{report.split['sha256'][:16]}…; ceiling of the test part {ceiling['test part']:.1%}",
        ),
    ]
    for title, shares in report.leak.items():
        if title == "this split" and report.split["method"] == "random":
            continue
        totals.append(
            (
                f"leak of {'the random split' if title == 'random split' else 'this split'}",
                f"{shares['pairs']:.1%} of the test part are seen before the test, "
                f"{shares['strings']:.1%} when the language is ignored",
            )
        )
    return totals


def _write(target: Path, report: DataReport) -> None:
    """Writes the whole report."""
    if target.suffix.lower() == ".json":
        text = json.dumps(report.values(), indent=1, ensure_ascii=True)
    else:
        text = page(report)
    with replacing(target) as file:
        file.write(f"{text}\n".encode())


def page(report: DataReport) -> str:
    """Returns the whole report in Markdown."""
    facts = {
        "source": report.data["source"],
        "SHA-256 of the data": report.data["sha256"],
        "SHA-256 of the split": report.split["sha256"],
        **dict(_totals(report)),
    }
    characters: list[list[Cell]] = [
        [f"U+{ord(character):04X}", unicodedata.name(character, "no name"), times]
        for character, times in report.dropped_characters.items()
    ]
    sections = [
        ("Languages", [markdown(_HEADER, _languages(report)), "\n".join(_LEGEND)]),
        ("Facts", [f"- {literal(title)}: {literal(text)}" for title, text in facts.items()]),
        (
            "Characters that folding drops",
            [markdown(("character", "its name", "times"), characters)],
        ),
        ("Rows with dropped characters", [_rows(report.dropped_rows)]),
        ("Rows that the table of spellings changes", [_rows(report.spelled_rows)]),
        ("Junk rows", [literal(report.junk_policy)]),
    ]
    for rule, rows in report.junk_rows.items():
        title = f"Junk rows: {rule}"
        sections.append((title, [f"The rule: {literal(report.junk_rules[rule])}.", _rows(rows)]))
    shared: list[list[Cell]] = [
        [text, ", ".join(languages)] for text, languages in report.shared_strings.items()
    ]
    sections.append(
        ("Folded names under several languages", [markdown(("name", "languages"), shared)])
    )
    texts = ["# The names data"]
    for title, paragraphs in sections:
        texts += [f"## {title}", ("\n" if title == "Facts" else "\n\n").join(paragraphs)]
    return "\n\n".join(texts)


def _rows(rows: Sequence[dict[str, Any]]) -> str:
    """Returns a table of dictionaries that have the same keys."""
    if not rows:
        return "None."
    return markdown(tuple(rows[0]), [[_quoted(value) for value in row.values()] for row in rows])


def _quoted(value: Any) -> Cell:
    """Returns text whose blanks at the ends are seen."""
    return f'"{value}"' if isinstance(value, str) and value != value.strip() else value
