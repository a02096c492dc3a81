"""The base class of each kind of module: layers, step modules and token layers."""
