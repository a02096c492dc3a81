"""Prepared modules and streams, whose weights are packed once, and steps without the dispatcher."""
