"""The student folder: written by the exporter, read by the pipeline."""
