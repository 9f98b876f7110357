"""From an image request to encoded images."""
