"""`predict`: tells the languages of names."""

from __future__ import annotations

import argparse
from typing import Any

from ..prediction import load
from ..text import escaped
from .arguments import COUNT, RNN_CLASSES, add_model, say_which_model
from .arguments import add_parser as add_command


def add_parser(commands: Any) -> None:
    """Adds the command to the command line."""
    parser = add_command(commands, "predict", run, "tell the languages of names")
    parser.add_argument("names", nargs="+", metavar="NAME")
    add_model(parser, "the trained model")
    parser.add_argument("--top", type=COUNT, default=3, help="languages to print")


def run(arguments: argparse.Namespace) -> None:
    """Predicts as the options say."""
    predictor = load(
        arguments.checkpoint, device=arguments.device, rnn_class=RNN_CLASSES[arguments.rnn]
    )
    say_which_model(predictor.checkpoint)
    answers = predictor.predict(arguments.names, arguments.top)
    for name, answer in zip(arguments.names, answers, strict=True):
        print(escaped(name))
        for language, probability in answer:
            print(f"  {probability:.3f}  {language}")
