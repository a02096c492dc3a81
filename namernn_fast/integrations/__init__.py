"""How the layer appears to `torch.compile`, `torch.func.vmap` and `torch.onnx.export`."""
