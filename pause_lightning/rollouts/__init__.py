"""Sampling replies and keeping them: the Sampler protocol, its engines, the graded rollout, the store on disk."""

from pause_lightning.rollouts.sampler import Reply, Sampler, SamplingSettings
from pause_lightning.rollouts.store import Rollout, RolloutStore

__all__ = ["Reply", "Rollout", "RolloutStore", "Sampler", "SamplingSettings"]
