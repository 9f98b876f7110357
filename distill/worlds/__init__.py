"""Toy datasets that ship with the project. The rest of `distill` works without this package."""
