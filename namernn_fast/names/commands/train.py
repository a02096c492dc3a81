"""`train`: trains a model and saves it."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import inspect
import math
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..checkpoint import (
    PRETRAINED,
    Checkpoint,
    check_worth_replacing,
    load_checkpoint,
    pretrained_checkpoint,
    recorded,
    save_checkpoint,
)
from ..dataset import NamesData
from ..distillation import MADE_UP, distilled
from ..files import Used, cache_folder, check_no_overwrite, check_replaceable, require
from ..model import POOLINGS, NameClassifier
from ..recipes import DESCRIPTIONS, RECIPES, SCHEDULES, Recipe
from ..splitting import Split
from ..steps import process
from ..text import InputError, escaped
from ..training import Epoch, Fit, fit
from . import arguments as options
from .arguments import COUNT, FRACTION, NOT_NEGATIVE, POSITIVE, SEED

# Options that override a value of the recipe or its model: (option, name, type, help).
_NUMBERS = (
    ("--epochs", "epochs", COUNT, "number of passes over the training names"),
    ("--batch-size", "batch_size", COUNT, "names per step, in all processes together"),
    ("--lr", "lr", POSITIVE, "learning rate of AdamW; with one-cycle, its maximum"),
    ("--weight-decay", "weight_decay", NOT_NEGATIVE, "weight decay of AdamW"),
    ("--label-smoothing", "label_smoothing", FRACTION, "share of a label spread evenly"),
    ("--clip", "clip_norm", POSITIVE, "maximum norm of the gradient"),
    ("--members", "members", COUNT, "number of networks whose logits are averaged"),
    ("--prior-correction", "prior_correction", NOT_NEGATIVE, "how much to favour rare languages"),
    ("--embedding-size", "embedding_size", COUNT, "features of an embedded character"),
    ("--hidden-size", "hidden_size", COUNT, "units of the RNN"),
    ("--layers", "num_layers", COUNT, "layers of the RNN"),
    ("--dropout", "dropout", FRACTION, "share of the states dropped between layers"),
    ("--state-dropout", "state_dropout", FRACTION, "share of the linear layer's input dropped"),
    ("--character-dropout", "character_dropout", FRACTION, "share of the characters dropped"),
)
_CHOICES = (
    ("schedule", SCHEDULES, "how the learning rate changes"),
    ("nonlinearity", ("tanh", "relu"), "activation of the RNN"),
    ("pooling", POOLINGS, "which states the linear layer reads"),
)
_SWITCHES = (
    ("bidirectional", "read names in both directions"),
    ("ngrams", "add n-gram embeddings to the input"),
)


def add_parser(commands: Any) -> None:
    """Adds the command `train` to the command line."""
    parser = options.add_parser(commands, "train", run, "train a model and save it")
    parser.add_argument(
        *("--checkpoint", "--output"),
        type=_target,
        metavar="PATH",
        help="where the model is saved (default: names.safetensors in the user's cache folder)",
    )
    options.add_device(parser)
    options.add_data(parser)
    options.add_split(parser)
    parser.add_argument(
        "--seed",
        type=SEED,
        default=0,
        help="the seed of the initial weights, the order of names and the dropout",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace a model of real data by a model of the sample, or replace a file that is not "
        "a model",
    )
    group = parser.add_argument_group("recipe", "how to train; options replace values of --recipe")
    recipes = "; ".join(f"{name}: {text}" for name, text in DESCRIPTIONS.items())
    group.add_argument("--recipe", choices=[*DESCRIPTIONS], default="plain", help=recipes)
    for option, name, kind, text in _NUMBERS:
        group.add_argument(option, dest=name, type=kind, help=_with_default(text, name))
    for name, choices, text in _CHOICES:
        group.add_argument(f"--{name}", choices=choices, help=_with_default(text, name))
    for name, text in _SWITCHES:
        text = _with_default(text, name)
        group.add_argument(f"--{name}", action="store_true", default=None, help=text)
    group.add_argument(
        "--teacher",
        type=options.model,
        metavar="PATH",
        help="a trained model whose answers are learned, for the training names and for made-up "
        "names; use it with --recipe distilled",
    )
    group.add_argument(
        "--made-up",
        type=COUNT,
        help=f"number of names to make up for the teacher (default: {MADE_UP})",
    )


def _with_default(text: str, name: str) -> str:
    """Returns the help text of an option, with its default in each recipe."""
    of_model = inspect.signature(NameClassifier).parameters.get(name)
    values = {}
    for title, recipe in RECIPES.items():
        value = (
            getattr(recipe, name) if of_model is None else recipe.model.get(name, of_model.default)
        )
        values[title] = {False: "no", True: "yes"}[value] if isinstance(value, bool) else str(value)
    usual = values.pop("plain")
    others = [f"{title}: {value}" for title, value in values.items() if value != usual]
    return f"{text} (default: {'; '.join([usual, *others])})"


def run(arguments: argparse.Namespace) -> None:
    """Trains and saves a model."""
    require("safetensors")
    recipe = _recipe(arguments)
    target: Path = arguments.checkpoint or cache_folder() / "names.safetensors"
    _check_inputs_kept(target, arguments)
    with _processes(arguments):
        first = process()[0] == 0
        data = _data(arguments)
        # Check the path first, so that a bad path fails before training, not after it.
        check_replaceable(target)
        if not arguments.force:
            check_worth_replacing(target, data.is_sample)
        teacher = None
        if arguments.teacher is not None:
            teacher = load_checkpoint(arguments.teacher, device=arguments.device)
        parts = options.split_data(data, arguments, None if teacher is None else teacher.folding)
        _check_processes_agree(parts)
        if teacher is not None:
            parts = _taught(parts, teacher, arguments)
        if first:
            print(_description(parts), flush=True)
        fitted = fit(
            parts,
            recipe,
            seed=arguments.seed,
            device=arguments.device,
            rnn_class=options.RNN_CLASSES[arguments.rnn],
            progress=True,
            report=_reporter(recipe) if first else None,
        )
        if first:
            _save(target, fitted)


def _target(text: str) -> Path:
    """Parses the path of a new model for argparse."""
    if text == PRETRAINED:
        raise argparse.ArgumentTypeError(
            f"'{PRETRAINED}' is the model that comes with the package; ./{PRETRAINED} is a file"
        )
    return options.path(text)


def _check_inputs_kept(target: Path, arguments: argparse.Namespace) -> None:
    """Raises an error if the model would overwrite an input."""
    inputs: list[Used] = [("predict without options", pretrained_checkpoint())]
    if arguments.teacher is not None:
        inputs.append(("--teacher", arguments.teacher))
    check_no_overwrite([("--checkpoint", target)], [*inputs, *options.data_files(arguments)])


def _data(arguments: argparse.Namespace) -> NamesData:
    """Loads the names. If several processes train together, only the first downloads the data."""
    rank, processes = process()
    if rank > 0:
        dist.barrier()
    data = options.load_data(arguments)
    if rank == 0 and processes > 1:
        dist.barrier()
    return data


def _taught(parts: Split, teacher: Checkpoint, arguments: argparse.Namespace) -> Split:
    """Returns the split with a training set that the teacher has labelled."""
    if recorded(teacher.info, str, "split", "sha256") != parts.info["sha256"]:
        raise InputError(
            f"{arguments.teacher}: the teacher was trained on another split, so names of the test "
            "part may have been training names"
        )
    if teacher.languages != parts.languages:
        raise InputError(f"{arguments.teacher}: the teacher's languages differ from the data's")
    correction = recorded(teacher.info, float, "recipe", "prior_correction")
    if correction is None or not math.isfinite(correction):
        raise InputError(f"{arguments.teacher}: the teacher's recipe is not recorded")
    taught = distilled(
        parts,
        teacher.model,
        arguments.made_up or MADE_UP,
        prior_correction=correction,
        seed=arguments.seed,
    )
    digest = hashlib.sha256(arguments.teacher.read_bytes()).hexdigest()
    return dataclasses.replace(taught, info={**taught.info, "teacher": digest})


def _check_processes_agree(parts: Split) -> None:
    """Raises an error if processes that train together have read different data."""
    _, processes = process()
    if processes == 1:
        return
    found: list[Any] = [None] * processes
    dist.all_gather_object(found, parts.info["sha256"])
    if len(set(found)) > 1:
        raise InputError("the processes that train together have read different data")


def _reporter(recipe: Recipe) -> Callable[[Epoch], None]:
    def report(epoch: Epoch) -> None:
        which = f"network {epoch.member} of {recipe.members}, " if recipe.members > 1 else ""
        print(f"{which}{epoch}", flush=True)

    return report


def _recipe(arguments: argparse.Namespace) -> Recipe:
    """Returns the recipe that the options select."""
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    of_recipe = [field.name for field in dataclasses.fields(Recipe) if field.name in given]
    of_model = [name for name in inspect.signature(NameClassifier).parameters if name in given]
    recipe = RECIPES[arguments.recipe].changed(
        **{name: given[name] for name in of_recipe},
        model={name: given[name] for name in of_model},
    )
    if arguments.teacher is None and (arguments.made_up or arguments.recipe == "distilled"):
        option = "--made-up" if arguments.made_up else "--recipe distilled"
        raise InputError(f"{option} needs --teacher")
    if recipe.model.get("dropout") and recipe.model.get("num_layers", 1) == 1:
        raise InputError("--dropout applies between layers, so it needs --layers 2 or more")
    return recipe


def _description(parts: Split) -> str:
    data, names = parts.info["data"], parts.info["names"]
    return escaped(
        f"{data['rows']:,} names in {len(parts.languages)} languages from {data['source']}; "
        f"{names['train']:,} to train, {len(parts.validation):,} to validate, "
        f"{len(parts.test):,} to test; split {parts.info['sha256'][:16]}"
    )


def _save(target: Path, fitted: Fit) -> None:
    save_checkpoint(target, fitted.checkpoint)
    print(f"saved {escaped(str(target))}")
    path = escaped(shlex.quote(str(target.absolute())))
    print("predict uses the pretrained model unless this one is named:")
    print(f"  {options.PROGRAM} predict --checkpoint {path} Frank")


@contextmanager
def _processes(arguments: argparse.Namespace) -> Iterator[None]:
    """Joins the process group while the block runs, if torchrun started several processes."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    # Import torch.distributed.nn before the process group exists: at import, the module's functions
    # bind the current group as a default argument. If an optimizer's first step imported the module
    # instead, these defaults would keep the group's threads alive until interpreter shutdown, when
    # a thread that frees a tensor aborts the process.
    importlib.import_module("torch.distributed.nn")

    device = torch.device(arguments.device)
    try:
        if device.type == "cuda":
            arguments.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(arguments.device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=10)
        )
    except (KeyError, ValueError) as error:  # one of torchrun's variables is missing or invalid
        raise InputError(f"the environment variables are not from torchrun ({error})") from error
    try:
        yield
    finally:
        dist.destroy_process_group()
