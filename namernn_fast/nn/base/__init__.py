"""The base classes of the layers, the step modules and the token layers."""
