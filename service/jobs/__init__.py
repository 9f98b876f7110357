"""Files, bulk batches and distillation jobs: what outlives the process."""
