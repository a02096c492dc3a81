"""The language of a surname, from its characters: the application that `FusedRNN` was made for.

    from namernn_fast.names import fit, load_names, predict

    fitted = fit(load_names())
    predict(fitted.model, ["Frank"])  # probabilities of fitted.languages

On the command line: `python -m namernn_fast.names train`, then `… predict Frank`. Downloads and
progress bars need `pip install namernn_fast[names]`; everything else needs torch alone.
"""

from .checkpoint import load_checkpoint, save_checkpoint
from .dataset import NamesData, load_names, read_names
from .download import DownloadError
from .model import NameClassifier, predict
from .text import ALPHABET, EncodedNames, InputError, encode, encode_names, fold
from .training import (
    Epoch,
    Fit,
    LabelledNames,
    batches,
    evaluate,
    fit,
    split,
    train_epoch,
    train_step,
)

__all__ = [
    "ALPHABET",
    "DownloadError",
    "EncodedNames",
    "Epoch",
    "Fit",
    "InputError",
    "LabelledNames",
    "NameClassifier",
    "NamesData",
    "batches",
    "encode",
    "encode_names",
    "evaluate",
    "fit",
    "fold",
    "load_checkpoint",
    "load_names",
    "predict",
    "read_names",
    "save_checkpoint",
    "split",
    "train_epoch",
    "train_step",
]
