"""Reinforcement learning within one rank: simulators, networks, rollouts, the update.

Imports `gossip.parameters` and the ground, and no MPI; imported by `train`. Entry point: `rollout.Collector`, whose
rollouts `learner.Learner` takes.
"""
