"""Bulk batches: thousands of image requests in one file, each answered exactly once in an output or error file."""
