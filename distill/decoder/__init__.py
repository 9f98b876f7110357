"""Training of small decoders: networks that decode what a VAE decodes, distilled from it without data."""
