"""The one place that holds the version; ``tad --version`` and the store's attributes read it."""

__version__ = "0.1.0"
