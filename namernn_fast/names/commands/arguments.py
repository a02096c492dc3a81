"""Options shared by several commands, and argparse types for options."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from namernn_fast import FusedRNN

from ..checkpoint import PRETRAINED, pretrained_checkpoint, recorded
from ..dataset import DATA_URL, DATA_VARIABLE, NamesData, load_names
from ..files import replacing
from ..folding import Folding
from ..prediction import Predictor, load
from ..splitting import METHODS, Split, split
from ..text import escaped

PROGRAM = "python -m namernn_fast.names"
RNN_CLASSES: dict[str, type[nn.RNN]] = {"fused": FusedRNN, "torch": nn.RNN}


def number(
    kind: type[int] | type[float], words: str, accepts: Callable[[float], bool]
) -> Callable[[str], float]:
    """Returns an argparse type for numbers of type `kind` for which `accepts` returns true.

    Error messages describe the valid numbers with `words`.
    """

    def parse(text: str) -> float:
        try:
            if accepts(value := kind(text)):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"'{escaped(text)}' is not {words}")

    return parse


# A count must fit in a C int, and a seed must be valid for torch.
COUNT = number(int, "a whole number above 0", lambda value: 0 < value < 2**31)
SEED = number(int, "a whole number from 0 to 2**63 - 1", lambda value: 0 <= value < 2**63)
POSITIVE = number(float, "a number above 0", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = number(float, "a number from 0", lambda value: 0 <= value < math.inf)
FRACTION = number(float, "a number from 0 to below 1", lambda value: 0 <= value < 1)
PROBABILITY = number(float, "a number from 0 to 1", lambda value: 0 <= value <= 1)
SHARE = number(float, "a number above 0 and below 1", lambda value: 0 < value < 1)


def path(text: str) -> Path:
    """Parses a path for argparse."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def model(text: str) -> Path:
    """Parses the path or the name of a trained model for argparse, and returns the path."""
    return pretrained_checkpoint() if text == PRETRAINED else path(text)


def device(text: str) -> torch.device:
    """Parses a device for argparse, and checks that the device works."""
    try:
        found = torch.device(text)
        torch.zeros(1, device=found).item()
    # Each type of device raises a different exception if the device is unavailable.
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"{escaped(text)} cannot be used ({reason})") from error
    return found


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of an option, unless the default is None, False or an empty list."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if default is None or default is False or default == []:
            return action.help
        return super()._get_help_string(action)


def add_parser(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], description: str
) -> argparse.ArgumentParser:
    """Adds a command and returns its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=description,
        description=f"{description[0].upper()}{description[1:]}.",
        formatter_class=_HelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the options that choose a trained model, its device and its RNN class."""
    parser.add_argument(
        "--checkpoint",
        type=model,
        default=PRETRAINED,
        metavar="PATH",
        help=f"a trained model; '{PRETRAINED}' is the one that comes with the package, and a file "
        f"of that name is ./{PRETRAINED}",
    )
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds the options that choose the device and the RNN class of a model."""
    parser.add_argument("--device", type=device, default="cpu", help="device to run the model on")
    parser.add_argument(
        "--rnn",
        choices=sorted(RNN_CLASSES),
        default="fused",
        help="FusedRNN, or torch.nn.RNN for comparison",
    )


def load_predictor(arguments: argparse.Namespace) -> Predictor:
    """Loads the model that the options select; prints a note if it is not the pretrained model."""
    path: Path = arguments.checkpoint
    predictor = load(path, device=arguments.device, rnn_class=RNN_CLASSES[arguments.rnn])
    if not path.samefile(pretrained_checkpoint()):
        say(f"the model is {path}, not the pretrained one: {_record(predictor.info)}")
    if predictor.checkpoint.is_sample():
        say("this model was trained on the small embedded sample, not on the names data set")
    return predictor


def _record(info: dict[str, Any]) -> str:
    """Returns a description of when a model was trained and how accurate it is."""
    date = recorded(info, str, "trained")
    accuracy = recorded(info, float, "metrics", "test_accuracy")
    trained = "training date not recorded" if date is None else f"trained on {date:.10}"
    if accuracy is None or not 0 <= accuracy <= 1:
        return f"{trained}, test accuracy not recorded"
    return f"{trained}, test accuracy {accuracy:.1%}"


def add_data(parser: argparse.ArgumentParser) -> None:
    """Adds the options that choose the data."""
    parser.add_argument(
        "--data",
        metavar="PATH",
        help=f"a folder of <Language>.txt, or a zip with data/names/<Language>.txt (without it: "
        f"${DATA_VARIABLE}, else a cached download of {DATA_URL}, else a small sample)",
    )
    parser.add_argument(
        "--no-sample", action="store_true", help="fail when the data cannot be downloaded"
    )


def load_data(arguments: argparse.Namespace) -> NamesData:
    """Loads the data that the options of `add_data` choose."""
    return load_names(arguments.data, allow_sample=not arguments.no_sample)


def add_split(parser: argparse.ArgumentParser) -> None:
    """Adds the options that choose how to split the data."""
    parser.add_argument(
        "--split",
        choices=METHODS,
        default="string",
        help="string: no name is in two parts; random: by rows, as in tutorials, which leaks names",
    )
    parser.add_argument("--split-seed", type=SEED, default=0, help="the seed of the split")
    parser.add_argument(
        "--validation", type=SHARE, default=0.1, help="the validation part's share of the data"
    )
    parser.add_argument("--test", type=SHARE, default=0.2, help="the test part's share of the data")


def data_files(arguments: argparse.Namespace) -> list[tuple[str, Path]]:
    """Returns the user's files that `load_names` will read, each with the option that names it."""
    option, named = "--data", arguments.data
    if named is None:
        option, named = DATA_VARIABLE, os.environ.get(DATA_VARIABLE)
    if not named:
        return []
    source = Path(os.path.expanduser(named))
    files = source.glob("*.txt") if source.is_dir() else [source]
    return [(option, file) for file in files]


def split_data(
    data: NamesData, arguments: argparse.Namespace, folding: Folding | None = None
) -> Split:
    """Splits the data according to the options of `add_split`; see `split` for `folding`."""
    return split(
        data,
        folding=folding,
        method=arguments.split,
        validation=arguments.validation,
        test=arguments.test,
        seed=arguments.split_seed,
    )


def write_text(target: Path, text: str) -> None:
    """Writes a file that an option names, and prints a message with its path."""
    with replacing(target) as file:
        file.write(f"{text}\n".encode())
    print(f"wrote {escaped(str(target))}")


def say(text: str) -> None:
    """Prints a line for the user on standard error."""
    print(escaped(text), file=sys.stderr, flush=True)
