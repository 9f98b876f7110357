"""Name and version of the package."""

from importlib.metadata import PackageNotFoundError, version

NAME = "flow-generator-matching"
try:
    VERSION = version(NAME)  # once: it is read from the disk
except PackageNotFoundError:  # a checkout that is not installed
    VERSION = "0"
