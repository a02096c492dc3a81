"""The command line: `python -m namernn_fast.names train` and `… predict NAME …`.

Exit codes: 0 for success; 1 for a failure at run time (network, disk, memory); 2 for wrong input
(options, data, checkpoints, names); 130 when interrupted. Failures are one line on standard error.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from namernn_fast import FusedRNN

from .checkpoint import default_checkpoint, load_checkpoint, save_checkpoint
from .dataset import DATA_URL, DATA_VARIABLE, load_names
from .files import check_replaceable
from .model import predict
from .text import InputError
from .training import fit

_PROGRAM = "python -m namernn_fast.names"
_RNN_CLASSES: dict[str, type[nn.RNN]] = {"fused": FusedRNN, "torch": nn.RNN}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code.

    Args:
        argv: the arguments, `sys.argv[1:]` if None.

    Raises:
        SystemExit: options are wrong (argparse, code 2), or help was asked for.
    """
    try:
        arguments = _parser().parse_args(argv)
        arguments.command(arguments)
        sys.stdout.flush()
    except InputError as error:
        return _failed(error, 2)
    except BrokenPipeError:
        # The reader of the output has gone; Python's own flush at exit must not report it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    # PyTorch raises RuntimeError when memory runs out or a device cannot do something.
    except (OSError, RuntimeError, MemoryError, ModuleNotFoundError) as error:
        return _failed(error, 1)
    except KeyboardInterrupt:
        return _failed("interrupted", 130)
    return 0


def _failed(reason: object, code: int) -> int:
    print(f"{_PROGRAM}: error: {_one_line(reason)}", file=sys.stderr)
    return code


def _one_line(reason: object) -> str:
    text = " ".join(str(reason).split()) or type(reason).__name__
    # Names of files and languages must not send control characters to the terminal.
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _train(arguments: argparse.Namespace) -> None:
    if arguments.dropout and arguments.layers == 1:
        raise InputError("--dropout acts between layers, so it needs --layers 2 or more")
    # Checked here so that a bad path fails before the training, not after it.
    check_replaceable(arguments.checkpoint)
    data = load_names(arguments.data, allow_sample=not arguments.no_sample)
    print(
        f"{len(data.rows):,} names in {len(data.languages)} languages from {data.source}",
        flush=True,
    )
    fitted = fit(
        data,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        lr=arguments.lr,
        seed=arguments.seed,
        held_out=arguments.held_out,
        clip_norm=arguments.clip,
        device=arguments.device,
        rnn_class=_RNN_CLASSES[arguments.rnn],
        progress=True,
        report=lambda epoch: print(epoch, flush=True),
        embedding_size=arguments.embedding_size,
        hidden_size=arguments.hidden_size,
        num_layers=arguments.layers,
        bidirectional=arguments.bidirectional,
        nonlinearity=arguments.nonlinearity,
        dropout=arguments.dropout,
    )
    save_checkpoint(arguments.checkpoint, fitted)
    print(f"saved {arguments.checkpoint}")


def _predict(arguments: argparse.Namespace) -> None:
    model, languages = load_checkpoint(
        arguments.checkpoint, device=arguments.device, rnn_class=_RNN_CLASSES[arguments.rnn]
    )
    probabilities, indices = predict(model, arguments.names).topk(
        min(arguments.top, len(languages))
    )
    for name, values, places in zip(
        arguments.names, probabilities.tolist(), indices.tolist(), strict=True
    ):
        print(name)
        for value, place in zip(values, places, strict=True):
            print(f"  {value:.3f}  {languages[place]}")


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--checkpoint",
        type=_path,
        default=default_checkpoint(),
        metavar="PATH",
        help="the trained model (default: %(default)s)",
    )
    common.add_argument("--device", type=_device, default="cpu", help="default: %(default)s")
    common.add_argument(
        "--rnn",
        choices=sorted(_RNN_CLASSES),
        default="fused",
        help="FusedRNN, or torch.nn.RNN for comparison (default: %(default)s)",
    )
    parser = argparse.ArgumentParser(
        prog=_PROGRAM, description="Tell the language of a surname from its characters."
    )
    commands = parser.add_subparsers(required=True, metavar="{train,predict}")

    train = commands.add_parser("train", parents=[common], help="train a model and save it")
    train.set_defaults(command=_train)
    train.add_argument(
        "--data",
        metavar="PATH",
        help=f"a folder of <Language>.txt, or a zip with data/names/<Language>.txt (default: "
        f"${DATA_VARIABLE}, else a cached download of {DATA_URL}, else a small sample)",
    )
    train.add_argument(
        "--no-sample", action="store_true", help="fail when the data cannot be downloaded"
    )
    for option, kind, default, text in (
        ("--epochs", _COUNT, 10, "passes over the training names"),
        ("--batch-size", _COUNT, 64, "names in a step"),
        ("--lr", _POSITIVE, 1e-3, "learning rate of Adam"),
        ("--clip", _POSITIVE, None, "largest norm of the gradient"),
        ("--seed", _SEED, 0, "fixes the split, the initial weights and the order of names"),
        ("--held-out", _FRACTION, 0.2, "share of the names that is not trained on"),
        ("--embedding-size", _COUNT, 64, "numbers that stand for a character"),
        ("--hidden-size", _COUNT, 256, "numbers in the state of the RNN"),
        ("--layers", _COUNT, 1, "layers of the RNN"),
        ("--dropout", _FRACTION, 0.0, "share of the states dropped between layers"),
    ):
        train.add_argument(
            option, type=kind, default=default, help=f"{text} (default: %(default)s)"
        )
    train.add_argument("--bidirectional", action="store_true", help="read names both ways")
    train.add_argument(
        "--nonlinearity", choices=("tanh", "relu"), default="tanh", help="default: %(default)s"
    )

    ask = commands.add_parser("predict", parents=[common], help="tell the language of names")
    ask.set_defaults(command=_predict)
    ask.add_argument("names", nargs="+", metavar="NAME")
    ask.add_argument(
        "--top", type=_COUNT, default=3, help="languages to print (default: %(default)s)"
    )
    return parser


def _number(
    kind: type[int] | type[float], words: str, accepts: Callable[[float], bool]
) -> Callable[[str], float]:
    """Returns an argparse type for numbers of `kind` that `accepts` takes; `words` name them."""

    def parse(text: str) -> float:
        try:
            if accepts(value := kind(text)):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text!r} is not {words}")

    return parse


# The upper bounds are those of a C int and of torch's seeds.
_COUNT = _number(int, "a whole number above 0", lambda value: 0 < value < 2**31)
_SEED = _number(int, "a whole number from 0 to 2**63 - 1", lambda value: 0 <= value < 2**63)
_POSITIVE = _number(float, "a number above 0", lambda value: 0 < value < math.inf)
_FRACTION = _number(float, "a number from 0 to below 1", lambda value: 0 <= value < 1)


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.zeros(1, device=device).item()
    # Each kind of device has its own error type when it is absent.
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"{text} cannot be used ({reason})") from error
    return device


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        # A name may hold characters that the terminal's encoding does not have.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.exit(main())
