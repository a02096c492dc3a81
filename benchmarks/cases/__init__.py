"""Pretrained models of other packages, with torch's recurrent layers and with the fused ones."""
