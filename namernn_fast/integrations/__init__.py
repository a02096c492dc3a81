"""How the layer appears to `torch.compile`, vmap, ONNX, TorchScript, `torch.fx`, FLOP counters."""
