"""Subcommands of `fgm-service`, and what they call."""
