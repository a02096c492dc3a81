"""Exports a model to ONNX, for any batch and any length, and runs it with onnxruntime.

    python examples/onnx_export.py

The model reads token ids of sequences of different lengths. Its layer becomes one RNN node. The
script prints the nodes. Then it runs batch sizes and lengths that were not used for the export, and
prints the largest difference between onnxruntime and the model. It takes a few seconds. Install the
required packages with `pip install "namernn_fast[onnx]"`.
"""

import io

try:
    import onnxruntime
except ModuleNotFoundError as error:
    advice = "run: pip install 'namernn_fast[onnx]'"
    raise SystemExit(f"{error.name} is not installed; {advice}") from error

import torch
from torch import nn
from torch.export import Dim

from namernn_fast import TokenRNN

VOCABULARY, CLASSES = 50, 5


class Classifier(nn.Module):
    """Maps padded token ids (batch, steps) and their lengths to scores (batch, CLASSES)."""

    def __init__(self):
        super().__init__()
        self.rnn = TokenRNN(VOCABULARY, 32, 64, batch_first=True)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, ids, lengths):
        return self.head(self.rnn.last_state(ids, lengths=lengths)[-1])


def draw(batch, steps):
    """Returns random token ids and lengths. The longest length is `steps`."""
    lengths = torch.randint(1, steps + 1, (batch,))
    lengths[0] = steps
    return torch.randint(VOCABULARY, (batch, steps)), lengths


def main():
    """Exports the model, and compares onnxruntime with torch."""
    torch.manual_seed(0)
    model = Classifier().eval()
    program = torch.onnx.export(
        model,
        draw(3, 7),
        dynamo=True,
        input_names=["ids", "lengths"],
        output_names=["scores"],
        dynamic_shapes=({0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, {0: Dim.DYNAMIC}),
        verbose=False,
    )
    file = io.BytesIO()  # or the name of a file
    program.save(file)
    nodes = [node.op_type for node in program.model_proto.graph.node]
    print(f"{len(nodes)} nodes, {nodes.count('RNN')} of them RNN: {', '.join(nodes)}")

    session = onnxruntime.InferenceSession(file.getvalue())
    for shape in ((1, 1), (3, 7), (16, 40), (100, 12)):
        ids, lengths = draw(*shape)
        (scores,) = session.run(["scores"], {"ids": ids.numpy(), "lengths": lengths.numpy()})
        with torch.no_grad():
            expected = model(ids, lengths)
        torch.testing.assert_close(torch.from_numpy(scores), expected)
        distance = (torch.from_numpy(scores) - expected).abs().max()
        print("batch {}, steps {}: equal, largest distance {:.1e}".format(*shape, distance))


if __name__ == "__main__":
    main()
