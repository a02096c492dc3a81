"""Tests the pretrained model: its size, options and answers, and the pages that describe it."""

import torch
from torch import nn

from namernn_fast import FusedRNN, names
from namernn_fast.names.checkpoint import KIND
from namernn_fast.names.tensor_files import MAX_BYTES, read_values

PATH = names.pretrained_checkpoint()
CARD = PATH.with_name("MODEL_CARD.md").read_text(encoding="utf-8")


def test_the_pretrained_model_is_small_and_has_default_options():
    from safetensors import safe_open

    assert PATH.stat().st_size < 2**20 < MAX_BYTES
    with safe_open(PATH, framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
    checkpoint = names.load_checkpoint(PATH)
    assert checkpoint.model.config == names.NameClassifier(18).config
    assert not checkpoint.is_sample()
    assert "/" not in read_values(PATH, KIND)["split"]["data"]["source"]


def test_the_pretrained_model_works_without_a_home_folder(homeless):
    answers = names.load().predict(["Frank", "Ślusàrski", "Nakamura", "O’Neal"], top=1)
    assert [answer[0][0] for answer in answers] == ["German", "Polish", "Japanese", "Irish"]


def test_fused_rnn_and_nn_rnn_give_equal_probabilities_on_real_data(real_folder):
    """FusedRNN reads ids, shares prefixes and keeps only the last state, unlike nn.RNN."""
    rows = [name for name, _ in names.read_names(real_folder).rows]
    ours, torchs = (
        names.load(PATH, rnn_class=kind).probabilities(rows) for kind in (FusedRNN, nn.RNN)
    )
    assert (ours - torchs).abs().max() <= 1e-6


def test_the_model_card_and_split_match_the_real_data(real_folder):
    parts = names.split(names.read_names(real_folder))
    info = names.load_checkpoint(PATH).info["split"]
    assert info["sha256"] == parts.info["sha256"]
    assert info["data"]["sha256"] == parts.info["data"]["sha256"]
    assert parts.info["sha256"] in CARD
    scores = names.load().probabilities(parts.test.texts)
    accuracy = (scores.argmax(1) == parts.test.labels).double().mean().item()
    [row] = [line for line in CARD.splitlines() if line.startswith("| this network ")]
    assert row.split("|")[2].strip() == f"{100 * accuracy:.1f}"


def test_the_readme_shows_the_actual_answers(root, run):
    command = "$ python -m namernn_fast.names predict "
    _, _, after = (root / "README.md").read_text(encoding="utf-8").partition(command)
    arguments, _, shown = after.partition("\n")
    assert run("predict", *arguments.split()) == (shown.partition("```")[0], "")
