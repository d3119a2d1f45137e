"""The version of the package, which a checkout that nobody installed has too."""

VERSION = "0.1.0"
