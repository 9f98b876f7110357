"""Serve one-step students over REST, in the OpenAI Images format."""
