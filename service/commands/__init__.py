"""The groups of commands below `fgm-service`, a noun in each file."""
