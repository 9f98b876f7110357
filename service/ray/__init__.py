"""Replicas over many GPUs and hosts, on Ray Serve."""
