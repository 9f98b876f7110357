"""From accepted work to pixels: `batcher` decides, `backend` computes, `engine` connects them to requests."""
