"""Modules and streams with weights packed once, and steps that skip torch's dispatcher."""
