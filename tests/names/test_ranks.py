"""Training with two torchrun processes matches training with one process."""

import pytest
import torch

from namernn_fast.names import load_checkpoint, read_names, split

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this torch has no gloo",
)


@pytest.mark.slow
def test_two_processes_match_the_losses_of_one_process(folder, run, run_program, root, tmp_path):
    count = len(split(read_names(folder)).train)
    # The last batch has a single name, so the second process gets no name.
    batch_size = next(size for size in range(40, count) if count % size == 1)
    options = ["train", "--data", str(folder), "--epochs", "2", "--batch-size", str(batch_size)]
    options += ["--embedding-size", "5", "--hidden-size", "7", "--lr", "0.01", "--clip", "1"]
    # Processes draw different dropout masks, so character dropout is off.
    options += ["--schedule", "one-cycle", "--members", "2", "--character-dropout", "0"]
    options += ["--checkpoint"]
    run(*options, tmp_path / "one")

    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = ["-m", "namernn_fast.names", *options, tmp_path / "two"]
    out = run_program(*torchrun, *program, cwd=root)
    # Only one process reports and saves.
    assert len(out.splitlines()) == 1 + 4 + 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["names", "one", "two"]

    one, two = (load_checkpoint(tmp_path / name) for name in ("one", "two"))
    assert one.info["split"] == two.info["split"]
    for ours, theirs in zip(two.info["history"], one.info["history"], strict=True):
        for name in ("train_loss", "validation_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)
        assert ours["train_accuracy"] == pytest.approx(theirs["train_accuracy"], abs=1 / count)
    states = (two.model.state_dict(), one.model.state_dict())
    torch.testing.assert_close(*states, rtol=1e-3, atol=1e-4)
