"""Predicts a surname's language from its characters, the task that `FusedRNN` was made for.

    from namernn_fast import names

    predictor = names.load()  # the pretrained model; names.load(path) loads a checkpoint
    predictor.predict(["Frank"])  # a list of (language, probability) for each name

    fitted = names.fit(names.split(names.load_names()))
    predictor = names.Predictor(fitted.checkpoint)

On the command line: `python -m namernn_fast.names predict Frank`. Training and prediction need only
torch. Checkpoints, downloads and progress bars need `pip install namernn_fast[names]`.
"""

from .checkpoint import Checkpoint, load_checkpoint, pretrained_checkpoint, save_checkpoint
from .dataset import NamesData, load_names, read_names
from .download import DownloadError
from .encoding import EncodedNames, encode, encode_names
from .folding import ASCII, Folding
from .model import NameClassifier, NameEnsemble
from .prediction import Predictor, load
from .recipes import RECIPES, Recipe
from .splitting import LabelledNames, Split, split
from .steps import Batch, batches, train_epoch, train_step, validate
from .text import InputError
from .training import Epoch, Fit, fit

__all__ = [
    "ASCII",
    "RECIPES",
    "Batch",
    "Checkpoint",
    "DownloadError",
    "EncodedNames",
    "Epoch",
    "Fit",
    "Folding",
    "InputError",
    "LabelledNames",
    "NameClassifier",
    "NameEnsemble",
    "NamesData",
    "Predictor",
    "Recipe",
    "Split",
    "batches",
    "encode",
    "encode_names",
    "fit",
    "load",
    "load_checkpoint",
    "load_names",
    "pretrained_checkpoint",
    "read_names",
    "save_checkpoint",
    "split",
    "train_epoch",
    "train_step",
    "validate",
]
