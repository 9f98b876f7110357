"""One file a resource; each has a `router`, and the folder is the list of them."""
