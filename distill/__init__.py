"""Distill a flow-matching text-to-image teacher into a one-step student (Flow Generator Matching).

Importing this package imports no torch; the modules below do where they need it.
"""
