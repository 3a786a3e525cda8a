"""Version of the framework, written into checkpoints and logs."""

VERSION = "0.2.0"
