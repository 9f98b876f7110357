"""What a Stable Diffusion 3 model is made of: its folder, its networks, and how they are computed."""
