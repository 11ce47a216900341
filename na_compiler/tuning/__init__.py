"""`tune`: times what the planner would choose from on the device itself, and records what was fastest."""

from na_compiler.tuning.tuner import Timed, Tuning, tune

__all__ = ["Timed", "Tuning", "tune"]
